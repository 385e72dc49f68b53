"""What a choice costs: granularity, precision, remedies."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from harness import style
from harness.plots_throughput import ATTENTION_ONLY, SPEED_OF_SCALE_MODEL
from harness.runs import lookup, trials
from harness.series import is_scale_model, scale, series
from harness.sizes import MIB
from harness.tables import strategies
from harness.tabular import figure_of, known

GRAINS = {
    "page_tokens": "page, tokens",
    "block_tokens": "block, tokens",
    "chunk_bytes": "chunk, MiB",
}
GRAIN_METRICS = {
    "grow_stall_us_p99": ("growth stall\np99, µs", 1.0),
    "internal_share": ("internal\nwaste, %", 100.0),
    "attention_decode_bytes_per_second": ("decode, TB/s\n(attention only)", 1e-12),
}
PRECISION_METRICS = {
    "kv_bytes_per_token": ("KV a token,\nKiB", 1 / 1024),
    "attention_decode_tokens_per_second": ("decode, tokens/s\n(attention only)", 1.0),
    "gate_error": ("error against\nfloat64", 1.0),
}
POINTS = {
    "startup": ("start-up", "^", style.BLUE),
    "admit": ("admit", "s", style.GREEN),
    "resident": ("resident", "o", style.VERMILLION),
}


@style.styled
def figure_granularity(rows: pd.DataFrame) -> Figure:
    """Draw growth stalls, waste and decode bandwidth against page, block and chunk size.

    Parameters
    ----------
    rows : pandas.DataFrame

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each size that varies and each metric that was measured.
    """
    own = trials(rows)
    own = own[own["status"] == "ok"]
    panels = [
        (grain, metric)
        for grain in GRAINS
        for metric in GRAIN_METRICS
        if own.loc[own[metric].notna(), grain].nunique() > 1
    ]
    figure = style.new_figure(0.6 + 1.35 * max(len(panels), 1), max(len(panels), 1))
    handles: dict[str, Line2D] = {}
    for axes, (grain, metric) in zip(figure.axes, panels, strict=False):
        label, factor = GRAIN_METRICS[metric]
        size = MIB if grain == "chunk_bytes" else 1
        for one in series(_only(own[own[metric].notna()], grain), leave=tuple(GRAINS)):
            look = _look(one.strategy, one.turn)
            unit = scale(one.rows) if grain == "chunk_bytes" else 1
            middle = (one.rows[metric] * factor).groupby(one.rows[grain] * unit / size).median()
            axes.plot(middle.index, middle, **look)
            handles.setdefault(one.label, Line2D([], [], label=style.plain(one.label), **look))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.set(xlabel=GRAINS[grain], ylabel=label)
        axes.set_ylim(0, axes.dataLim.y1 * 1.12 or 1)
    if not panels:
        figure.axes[0].text(0.5, 0.5, "no size varies in these rows", ha="center")
    style.legend(figure, list(handles.values()))
    style.badge(figure, SPEED_OF_SCALE_MODEL if is_scale_model(own) else ATTENTION_ONLY)
    return figure


def _only(rows: pd.DataFrame, grain: str) -> pd.DataFrame:
    """Return the rows among which most sizes of one kind were tried, the others held.

    A chunk's size follows the page's (it is a multiple), so it counts by its power of two.
    """
    held = pd.DataFrame({g: rows[g].fillna(0) for g in GRAINS if g != grain})
    if "chunk_bytes" in held:
        held["chunk_bytes"] = held["chunk_bytes"].map(lambda n: math.log2(n) // 1 if n > 0 else 0)
    groups = rows.groupby([held[c] for c in held])
    return max((group for _, group in groups), key=lambda group: group[grain].nunique())


@style.styled
def figure_precision(rows: pd.DataFrame) -> Figure:
    """Draw KV bytes a token, decode rate and error of each KV dtype.

    Parameters
    ----------
    rows : pandas.DataFrame

    Returns
    -------
    matplotlib.figure.Figure
        Three panels; a bar a dtype and configuration, the median over what was run.
    """
    own = trials(rows)
    own = own.assign(kv_bytes_per_token=own["kv_bytes_per_token"] * scale(own))
    ok = own[(own["status"] == "ok") | own["attention_decode_step_ms"].isna()]
    longest = ok.groupby(["strategy", "model", "kv_dtype"])["resident_tokens"].transform("max")
    bars = series(ok[ok["resident_tokens"].fillna(0) == longest.fillna(0)], ("kv_dtype",))
    figure = style.new_figure(0.6 + (0.45 + 0.2 * len(bars)) * 3, 3)
    for axes, (metric, (label, factor)) in zip(figure.axes, PRECISION_METRICS.items(), strict=True):
        for y, one in enumerate(bars):
            value = one.rows[metric].dropna().median() * factor
            colour, _ = style.look(one.strategy)
            axes.barh(y, value if known(value) else 0, 0.7, color=colour, zorder=2)
            axes.annotate(
                figure_of(value, 3),
                (value if known(value) else 0, y),
                (2, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
            )
        axes.set_yticks(range(len(bars)), [style.plain(b.label) for b in bars], fontsize=6.5)
        axes.set_ylim(len(bars) - 0.5, -0.5)
        axes.set_xlabel(label.replace("\n", " "))
        axes.margins(x=0.2)
        axes.grid(axis="y", visible=False)
    scaled = SPEED_OF_SCALE_MODEL if is_scale_model(own) else ""
    style.badge(figure, "At the longest resident length of each.", scaled)
    return figure


@style.styled
def figure_remedies(summary: dict[str, Any]) -> Figure:
    """Draw how far each remedy moves the three OOM points, and the decode rate beside it.

    Parameters
    ----------
    summary : dict
        summary.json: an entry a configuration under ``strategies``.

    Returns
    -------
    matplotlib.figure.Figure
        A line a configuration; an arrow where nothing failed up to the sweep's end.
    """
    found = strategies(summary)
    figure = style.new_figure(0.9 + 0.3 * max(len(found), 1))
    axes = figure.axes[0]
    for y, (name, one) in enumerate(found):
        for lift, (point, (_, marker, colour)) in zip((-0.2, 0, 0.2), POINTS.items(), strict=True):
            ok = lookup(one, point, "ok")
            if not isinstance(ok, (int, float)) or ok <= 0:
                continue
            axes.plot(ok, y + lift, marker, color=colour, markersize=4)
            if lookup(one, point, "limited_by") == "sweep_end":
                axes.annotate(
                    "→",
                    (ok, y + lift),
                    (2, -0.5),
                    textcoords="offset points",
                    va="center",
                    color=colour,
                )
        axes.annotate(
            _price(one),
            (1.02, y),
            xycoords=("axes fraction", "data"),
            fontsize=6,
            va="center",
            annotation_clip=False,
        )
        del name
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 9e5), max(high, 1.2e7))
    style.token_axis(axes, "tokens")
    axes.set_yticks(range(len(found)), [style.plain(n) for n, _ in found], fontsize=6)
    axes.set_ylim(len(found) - 0.4, -0.9)
    axes.axvline(1e7, color="black", linewidth=0.8, linestyle=(0, (4, 2)))
    axes.annotate(
        "decode there,\ntokens/s",
        (1.02, -0.9),
        xycoords=("axes fraction", "data"),
        fontsize=6,
        va="center",
        annotation_clip=False,
    )
    handles = [
        Line2D([], [], color=c, marker=m, linestyle="", label=n) for n, m, c in POINTS.values()
    ]
    style.legend(figure, handles, columns=3)
    style.badge(figure, "Largest ok; an arrow: the sweep ended without a failure.", ATTENTION_ONLY)
    return figure


def _price(one: dict[str, Any]) -> str:
    """Return the decode rate at the longest resident length that was timed."""
    timed = [d for d in lookup(one, "decode", default=[]) or [] if isinstance(d, dict)]
    timed = [d for d in timed if known(d.get("resident_tokens"))]
    last = max(timed, key=lambda d: float(d["resident_tokens"]), default={})
    rate = figure_of(last.get("attention_decode_tokens_per_second"), 3)
    return f"{rate} at {float(last['resident_tokens']) / 1e6:.3g}M" if last else "not timed"


def _look(strategy: str, turn: int) -> dict[str, Any]:
    colour, marker = style.look(strategy)
    return {"color": colour, "marker": marker, "linestyle": style.LINES[turn % len(style.LINES)]}
