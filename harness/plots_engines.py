"""What engines ask for at start-up, item by item, and what a pool's fraction changes."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness import style
from harness.plots_memory import SCALE_TEXT
from harness.plots_phases import frame_timeline, ledger_of
from harness.series import (
    by_model,
    is_scale_model,
    needed_bytes,
    options_of,
    points,
    scale,
    series,
)
from harness.sizes import GIB
from harness.tabular import tokens

REQ_TO_TOKEN = "request-to-token"
ITEMS = {
    "context": style.GREY,
    "weights": style.DARK,
    "KV pool": style.SKY,
    REQ_TO_TOKEN: style.YELLOW,
    "other tables": style.INDIGO,
    "CUDA graphs": style.FOREST,
    "workspace": style.PLUM,
}
LONG_LABEL = 48
LABELLED_GIB = 40.0  # a table as broad as its figure is long
REPEATS_TEXT = "Of repeats the first is drawn."


@style.styled
def figure_root_cause(rows: pd.DataFrame, timeline: pd.DataFrame) -> Figure:
    """Draw what each engine asks for at start-up at each context, against the device.

    Parameters
    ----------
    rows : pandas.DataFrame
    timeline : pandas.DataFrame
        The ledger's events; a trial without any is drawn from its row's columns.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a model, a stacked bar for each configuration, context and fill: the first of its
        repeats. What failed is hatched and named, at the size that was asked for.
    """
    own, events = points(rows), frame_timeline(timeline)
    models = list(by_model(own))
    bars = [_bars(part, events) for _, part in models]
    heights = [len(found) + len({b[0] for b in found}) + 1.0 for found in bars]
    figure = style.new_figure(
        0.85 + 0.14 * sum(heights) + 0.2 * len(models),
        len(models),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (model, part), found in zip(figure.axes, models, bars, strict=True):
        ends = (part["capacity_bytes"] * scale(part) / GIB).dropna().unique()
        _stack(axes, found, max(ends, default=0.0))
        for value in ends:
            axes.axvline(value, color="black", linewidth=1, linestyle=(0, (4, 2)))
        axes.set_title(style.plain(f"{model or 'any'} model, one rank"), loc="left")
        axes.set_ylabel("context, tokens")
    figure.axes[-1].set_xlabel("asked for at start-up, GiB of one GPU")
    used = {name for found in bars for bar in found for name in bar[2]}
    handles: list[Patch | Line2D] = [Patch(color=c, label=n) for n, c in ITEMS.items() if n in used]
    handles.append(
        Patch(facecolor="white", edgecolor="black", hatch="////", label="failed or refused")
    )
    sizes = (own["capacity_bytes"] * scale(own) / GIB).dropna()
    device = " or ".join(dict.fromkeys(f"{size:.1f}" for size in sizes))
    handles.append(
        Line2D([], [], color="black", ls=(0, (4, 2)), label=f"device: {device} GiB free")
    )
    style.legend(figure, handles, columns=3)
    drawn = sum(len(found) for found in bars)
    style.badge(
        figure,
        _versions(own),
        REPEATS_TEXT if drawn < len(own) else "",
        SCALE_TEXT if is_scale_model(own) else "",
    )
    return figure


def _versions(own: pd.DataFrame) -> str:
    """Say whose formulas these are, and whether they were allocated."""
    emulated = own[own["emulated_version"] != ""]
    if emulated.empty:
        return ""
    named = (emulated["strategy"] + " " + emulated["emulated_version"]).unique()
    planned = (emulated["basis"] == "planned").all()
    what = "planned from" if planned else "allocated as by"
    return f"Start-ups {what} the source of {' and '.join(named)}."


Bar = tuple[str, str, dict[str, float], float, str]


def _bars(part: pd.DataFrame, events: pd.DataFrame) -> list[Bar]:
    """Return a bar a trial: its curve, context, GiB by item, GiB refused, what was said."""
    out: list[Bar] = []
    for one in series(part):
        rows = one.rows.sort_values(["context_tokens", "fill", "repeat"])
        for _, row in rows.drop_duplicates(["context_tokens", "fill"]).iterrows():
            factor = (row["scale"] if row["scale"] > 0 else 1) / GIB
            found = {k: v * factor for k, v in items_of(row, events).items()}
            refused, said = 0.0, ""
            if row["status"] != "ok":
                refused = max(row["oom_requested_bytes"] * factor, 0.0)
                name = row["oom_allocation"] or row["oom_phase"]
                said = f"{style.ENDS.get(row['status'], ('', row['status']))[1]}: {name}"
                said += f" of {refused:.1f}" if refused else ""
                if row["status"] == "refused" and row["oom_free_bytes"] >= 0:
                    has = row["oom_free_bytes"] * factor
                    said = f"refused: {refused:.1f} > {has:.1f}"
            out.append((one.label, tokens(row["context_tokens"]), found, refused, said))
    return out


def items_of(row: pd.Series, events: pd.DataFrame) -> dict[str, float]:
    """Return the bytes that a trial held at start-up by item, own bytes, from its ledger events.

    Events of the fill and of timing are left out; without any event the row's columns are taken.
    """
    own = ledger_of(row, events)
    own = own[~own["phase"].isin(["fill", "decode", "prefill"])]
    if row["status"] != "ok":  # pieces of it that fitted are part of what was asked for
        own = own[own["allocation"] != row["oom_allocation"]]
    if own.empty:
        names = {
            "context_bytes": "context",
            "weights_bytes": "weights",
            "kv_committed_bytes": "KV pool",
        }
        names |= {"tables_bytes": "other tables", "workspace_bytes": "workspace"}
        return {item: row[column] for column, item in names.items() if row[column] > 0}
    item = [item_name(p, a) for p, a in zip(own["phase"], own["allocation"], strict=True)]
    sums = own["event_bytes"].fillna(0).groupby(pd.Series(item, index=own.index)).sum()
    return {name: float(sums[name]) for name in ITEMS if sums.get(name, 0) > 0}


def item_name(phase: str, allocation: str) -> str:
    """Return the figure's name of an allocation."""
    if allocation == "req_to_token":
        return REQ_TO_TOKEN
    if "graph" in allocation and "page_table" not in allocation:
        return "CUDA graphs"
    named = {"context": "context", "nccl": "context", "weights": "weights", "pool": "KV pool"}
    return named.get(phase) or (
        "other tables" if phase == "tables" or "table" in allocation else "workspace"
    )


def _stack(axes: Axes, bars: list[Bar], device_gib: float) -> None:
    """Draw the bars under their curves' names; notes stand clear of the device's line."""
    y, last, ticks = -1.0, "", []
    for label, context, found, refused, said in bars:
        y += 1
        if label != last:
            heading = axes.text(
                0.01,
                y,
                style.plain(label),
                fontsize=6.5 if len(label) < LONG_LABEL else 5,
                va="center",
                weight="bold",
                bbox=style.WHITE_BOX,
                transform=axes.get_yaxis_transform(),
            )
            heading.set_in_layout(False)  # it may run over the axes' end, not squeeze them
            last, y = label, y + 1
        ticks.append((y, context))
        end = _bar(axes, y, found, refused)
        note = f"{end:.0f}" + (f"  {said}" if said else "")
        style.bar_note(axes, max(end, device_gib), y, note, bool(said))
    axes.set_yticks([at for at, _ in ticks], [context for _, context in ticks], fontsize=6)
    axes.tick_params("y", length=0)
    axes.set_ylim(y + 0.6, -0.6)
    axes.grid(axis="y", visible=False)
    reach = max(sum(found.values()) + refused for *_, found, refused, _ in bars)
    axes.set_xlim(0, max(axes.get_xlim()[1], reach * 1.95))


def _bar(axes: Axes, y: float, found: dict[str, float], refused: float) -> float:
    """Draw one stacked bar; returns where it ends."""
    left = 0.0
    for name, colour in ITEMS.items():
        width = found.get(name, 0)
        axes.barh(y, width, 0.75, left, color=colour, zorder=2)
        if name == REQ_TO_TOKEN and width >= LABELLED_GIB:
            middle = left + width / 2
            axes.text(middle, y, f"{width:.2f}", fontsize=6, ha="center", va="center", zorder=3)
        left += width
    if refused:
        axes.barh(y, refused, 0.75, left, fc="white", hatch="////", ec="black", lw=0.5, zorder=2)
    return left + refused


@style.styled
def figure_mem_fraction(rows: pd.DataFrame) -> Figure:
    """Draw what a static pool asks for at each fraction, of the context and of the device.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows with ``mem_fraction``; what the fraction is of stands in ``strategy_options``.

    Returns
    -------
    matplotlib.figure.Figure
        A curve for each meaning (and whatever else varies): the first in the strategy's colour, the
        others in neutral ones. Crosses did not start.
    """
    own = points(rows)
    own = own[own["mem_fraction"].notna()]
    meaning = [options_of(v).get("mem_fraction_of", "") for v in own["strategy_options"]]
    handles = []
    looks = (
        (style.look("static")[0], "o"),
        (style.DARK, "s"),
        (style.BLACK, "^"),
        (style.SKY, "v"),
    )
    curves = [
        (of, one)
        for of in dict.fromkeys(meaning)
        for one in series(own[[m == of for m in meaning]], ("context_tokens",), ("mem_fraction",))
    ]
    figure = style.new_figure(2.3 + 0.13 * len(curves))
    axes = figure.axes[0]
    for n, (of, one) in enumerate(curves):
        colour, marker = looks[n % len(looks)]
        part = one.rows.sort_values("mem_fraction")
        factor = scale(part) / GIB
        ok = part["status"] == "ok"
        height = part["peak_device_bytes"].where(ok, needed_bytes(part)) * factor
        axes.plot(part["mem_fraction"], height, color=colour, lw=1)
        axes.plot(part["mem_fraction"][ok], height[ok], marker, color=colour)
        axes.plot(part["mem_fraction"][~ok], height[~ok], "X", color=colour, ms=6.5)
        label = one.label + (f", fraction of the {of}" if of else "")
        handles.append(Line2D([], [], color=colour, marker=marker, label=style.plain(label)))
    handles.append(Line2D([], [], color=style.DARK, marker="X", ls="", label="does not start"))
    sizes = (own["capacity_bytes"] * scale(own)).dropna().unique() / GIB
    for value in sizes:
        line = axes.axhline(
            value, color=style.BLACK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5
        )
        line.set_label(f"device: {' or '.join(f'{size:.1f}' for size in sizes)} GiB free")
    handles += [line] if len(sizes) else []
    axes.margins(y=0.12)
    axes.set(xlabel="mem_fraction", ylabel="needed at start-up, GiB")
    axes.set_ylim(bottom=0)
    style.legend(figure, handles, columns=1)
    at = " and ".join(tokens(c) for c in own["context_tokens"].dropna().unique())
    style.badge(figure, f"Context {at}.", SCALE_TEXT if is_scale_model(own) else "")
    return figure
