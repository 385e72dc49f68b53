"""What the size of a page and of a chunk costs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from harness import style
from harness.plots_throughput import ATTENTION_ONLY, SPEED_OF_SCALE_MODEL
from harness.runs import trials
from harness.series import Series, is_scale_model, options_of, scale, series
from harness.sizes import MIB

GRAINS = {
    "page_tokens": "page, tokens",
    "block_tokens": "block, tokens",
    "chunk_bytes": "chunk, MiB",
}
# Column, axis label, factor, whether the axis is logarithmic.
METRICS = {
    "grow_stall_us_p50": ("growth stall\np50, ms", 1e-3, True),
    "grow_stall_us_p99": ("growth stall\np99, ms", 1e-3, True),
    "internal_share": ("internal waste,\n% of KV memory", 100.0, False),
    "attention_decode_bytes_per_second": ("decode, GB/s\n(attention only)", 1e-9, False),
}
ENOUGH_EVENTS = 100
FEW_TEXT = f"Hollow, not joined: fewer than {ENOUGH_EVENTS} growth events; p99 is the longest."
WORKLOADS = {"single": "kernels", "trace": "allocator under a trace", "churn": "allocator, churn"}
GROWTHS = {"sync": "synchronous growth", "ahead": "mapped ahead"}
LOOKS = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."), ("v", (0, (1, 3))))


@style.styled
def figure_granularity(rows: pd.DataFrame) -> Figure:
    """Draw growth stalls, waste and decode bandwidth against page and chunk size.

    Parameters
    ----------
    rows : pandas.DataFrame

    Returns
    -------
    matplotlib.figure.Figure
        A column for each size that varies, a row for each metric that was measured; while one
        size varies the others are held.
    """
    own = trials(rows)
    ok = own[own["status"] == "ok"]
    curves = list(_curves(ok))
    looks = {name: LOOKS[n % len(LOOKS)] for n, (name, _) in enumerate(curves)}
    columns = {g: _only(ok, g) for g in GRAINS if ok[g].nunique() > 1} or {"page_tokens": ok}
    metrics = [m for m in METRICS if ok[m].notna().any()] or list(METRICS)[:1]
    figure = style.new_figure(
        1.5 + 0.98 * len(metrics) + 0.1 * len(curves),
        len(metrics),
        len(columns),
        sharey="row",
        sharex="col",
    )
    table = [figure.axes[n : n + len(columns)] for n in range(0, len(figure.axes), len(columns))]
    for line, metric in zip(table, metrics, strict=True):
        for axes, (grain, part) in zip(line, columns.items(), strict=True):
            for name, one in curves:
                mine = one.rows.loc[one.rows.index.intersection(part.index)]
                _draw(axes, mine, grain, metric, style.look(one.strategy)[0], *looks[name])
            axes.set_xscale("log", base=4)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        _value_axis(line, metric)
    for axes, grain in zip(table[-1], columns, strict=True):
        axes.set_xlabel(GRAINS[grain])
    for axes, (grain, part) in zip(table[0], columns.items(), strict=True):
        axes.set_title(_held(part, grain), loc="left", fontsize=6.5)
    _legend(figure, curves, looks)
    failed = len(own) - len(ok)
    apart = len(ok) - len(set().union(*(part.index for part in columns.values())))
    few = (ok["grow_events"] < ENOUGH_EVENTS).any()
    style.badge(
        figure,
        FEW_TEXT if few else "",
        _variants(ok),
        f"Left out, not ended well: {failed} of {len(own)} trials." if failed else "",
        f"Left out, of sizes between the columns: {apart} of {len(own)} trials." if apart else "",
        SPEED_OF_SCALE_MODEL if is_scale_model(own) else ATTENTION_ONLY,
    )
    return figure


def _curves(rows: pd.DataFrame) -> Iterator[tuple[str, Series]]:
    """Return every curve by what was run (kernels or allocator) and how memory grew."""
    leave = (*GRAINS, "arm", "workload", "growth", "sequences", "kernel_variant")
    several = rows["strategy"].nunique() > 1
    deferred = rows["strategy_options"].map(
        lambda text: options_of(text).get("release") == "deferred"
    )
    groups = dict(list(rows.groupby(["workload", "growth", deferred], sort=False)))
    for (workload, growth, late), part in sorted(groups.items(), key=lambda item: _turn(*item[0])):
        kind = WORKLOADS.get(workload, workload)
        grown = GROWTHS.get(growth, growth) + (", deferred release" if late else "")
        found = series(part, leave=leave)
        for one in found:
            more = one.label.removeprefix(one.strategy).removeprefix(", ")
            parts = (one.strategy if several else "", kind, grown, more)
            yield ", ".join(p for p in parts if p), one


def _turn(workload: str, growth: str, deferred: bool) -> tuple[object, ...]:
    """Sorting key: workloads and growths in the order in which they are always named."""
    kinds, grown = list(WORKLOADS), list(GROWTHS)
    return (
        kinds.index(workload) if workload in kinds else len(kinds),
        workload,
        grown.index(growth) if growth in grown else len(grown),
        growth,
        deferred,
    )


def _only(rows: pd.DataFrame, grain: str) -> pd.DataFrame:
    """Return the rows among which most sizes of one kind were tried, the others held.

    A chunk's size follows the page's (it is a multiple), so it counts by its power of two.
    """
    held = {g: rows[g].fillna(0) for g in GRAINS if g != grain}
    if "chunk_bytes" in held:
        held["chunk_bytes"] = held["chunk_bytes"].map(lambda n: math.log2(n) // 1 if n > 0 else 0)
    groups = rows.groupby(list(held.values()))
    return max((group for _, group in groups), key=lambda group: group[grain].nunique())


def _draw(
    axes: Axes, rows: pd.DataFrame, grain: str, metric: str, colour: str, marker: str, line: object
) -> None:
    rows = rows[rows[metric].notna() & rows[grain].notna()]
    if rows.empty:
        return
    factor = METRICS[metric][1]
    size = rows[grain] * scale(rows) / MIB if grain == "chunk_bytes" else rows[grain]
    value = (rows[metric] * factor).groupby(size).median()
    events = rows["grow_events"].groupby(size).min()
    few = (events < ENOUGH_EVENTS) & metric.startswith("grow_stall")
    axes.plot(value[~few].index, value[~few], marker=marker, linestyle=line, color=colour, ms=4)
    axes.plot(value[few].index, value[few], marker, color=colour, ms=4, mfc="white", mew=0.8)


def _value_axis(line: list[Axes], metric: str) -> None:
    """Scale a row of panels alike, by all that is drawn in it."""
    label, _, logarithmic = METRICS[metric]
    first = line[0]
    limits = [axes.dataLim for axes in line if axes.has_data()]
    high = max([limit.y1 for limit in limits], default=0.0)
    if logarithmic and high > 0:
        low = min(limit.minposy for limit in limits)
        first.set_yscale("log")
        first.set_ylim(low / 1.6, high * 1.6)
        steps = (1.0, 2.0, 5.0) if high / low < 30 else (1.0,)
        first.yaxis.set_major_locator(LogLocator(10, subs=steps, numticks=9))
        first.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        first.yaxis.set_minor_formatter(NullFormatter())
    else:
        first.set_ylim(0, 1.15 * high or 1)
    first.set_ylabel(label)


def _held(part: pd.DataFrame, grain: str) -> str:
    """Return the sizes that are held while another varies."""
    texts = []
    if grain != "page_tokens" and part["page_tokens"].nunique() == 1:
        texts.append(f"page {part['page_tokens'].dropna().iloc[0]:g} tokens")
    chunks = (part["chunk_bytes"] * scale(part) / MIB).dropna()
    if grain != "chunk_bytes" and chunks.nunique() == 1:
        texts.append(f"chunk {chunks.iloc[0]:.3g} MiB")
    return ", ".join(texts)


def _variants(rows: pd.DataFrame) -> str:
    """Name the decode kernels, where pages of different size are read by different ones."""
    timed = rows[rows["attention_decode_bytes_per_second"].notna() & rows["kernel_variant"].ne("")]
    if timed["kernel_variant"].nunique() < 2:
        return ""
    pages = timed.groupby("kernel_variant")["page_tokens"].unique()
    names = [f"{k}: {', '.join(f'{n:g}' for n in sorted(v))}" for k, v in pages.items()]
    return f"Decode kernel by page: {'; '.join(names)}."


def _legend(
    figure: Figure, curves: list[tuple[str, Series]], looks: dict[str, tuple[str, Any]]
) -> None:
    handles = []
    for name, one in curves:
        marker, line = looks[name]
        colour, _ = style.look(one.strategy)
        label = style.plain(name)
        handles.append(Line2D([], [], color=colour, marker=marker, linestyle=line, label=label))
    style.legend(figure, handles)
