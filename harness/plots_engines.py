"""What engines ask for at start-up, item by item."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
Y_LABEL = "context, tokens"
ROW_POINTS, NOTE_SIZE = 10.0, 6.0
BESIDE_AXES_POINTS = 22.0  # of a column's width, without the ticks' labels
REACH = 2.05  # of the longest bar: notes stand behind them
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
    every = [bar for found in bars for bar in found]
    sizes = (own["capacity_bytes"] * scale(own) / GIB).dropna()
    reach = REACH * max([*(bar.end for bar in every), *sizes])
    beside = max(style.text_points(bar.context, NOTE_SIZE) for bar in every) + BESIDE_AXES_POINTS
    width = 72 * style.WIDTH_INCHES - beside
    ends = [(part["capacity_bytes"] * scale(part) / GIB).dropna().unique() for _, part in models]
    panels = [
        _panel(found, max(device, default=0.0), reach, width)
        for found, device in zip(bars, ends, strict=True)
    ]
    heights = [panel.rows + 1.0 for panel in panels]
    figure = style.new_figure(
        0.85 + 0.14 * sum(heights) + 0.2 * len(models),
        len(models),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    label_points = style.text_points(Y_LABEL, style.TEXT_SIZE)
    for axes, (model, _), panel, device in zip(figure.axes, models, panels, ends, strict=True):
        _stack(axes, panel)
        for value in device:
            axes.axvline(value, color="black", linewidth=1, linestyle=(0, (4, 2)))
        axes.set_title(style.plain(f"{model or 'any'} model, one rank"), loc="left")
        fits = label_points < ROW_POINTS * (panel.rows + 1)
        axes.set_ylabel(Y_LABEL if fits else Y_LABEL.split(",")[0])
    figure.axes[-1].set_xlim(0, reach)
    figure.axes[-1].set_xlabel("asked for at start-up, GiB of one GPU")
    used = {name for bar in every for name in bar.held}
    handles: list[Patch | Line2D] = [Patch(color=c, label=n) for n, c in ITEMS.items() if n in used]
    handles.append(
        Patch(facecolor="white", edgecolor="black", hatch="////", label="failed or refused")
    )
    named = " or ".join(dict.fromkeys(f"{size:.1f}" for size in sizes))
    handles.append(Line2D([], [], color="black", ls=(0, (4, 2)), label=f"device: {named} GiB free"))
    style.legend(figure, handles, columns=3)
    style.badge(
        figure,
        _versions(own),
        REPEATS_TEXT if len(every) < len(own) else "",
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


@dataclass(frozen=True)
class Bar:
    """A trial: its curve, its context, GiB by item, GiB that were refused, what is said of it."""

    label: str
    context: str
    held: dict[str, float]
    refused: float
    said: str

    @property
    def end(self) -> float:
        """GiB asked for."""
        return sum(self.held.values()) + self.refused


@dataclass(frozen=True)
class Panel:
    """A model's bars and their curves' names by the row in which each stands, and their rows."""

    headings: list[tuple[float, str, float]]
    bars: list[tuple[float, Bar]]
    notes: list[tuple[float, str]]
    rows: float


def _bars(part: pd.DataFrame, events: pd.DataFrame) -> list[Bar]:
    """Return a bar a trial."""
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
            out.append(Bar(one.label, tokens(row["context_tokens"]), found, refused, said))
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


def _panel(bars: list[Bar], device_gib: float, reach: float, width: float) -> Panel:
    """Place bars under their curves' names; notes stand clear of the device's line.

    What does not fit beside its bar is broken into lines, and takes the rows that they need;
    ``width`` are the points of ``reach`` GiB.
    """
    panel, y, last = Panel([], [], [], 0.0), 0.0, ""
    for bar in bars:
        if bar.label != last:
            size = 6.5 if len(bar.label) < LONG_LABEL else 5.0
            lines = style.broken(bar.label, 0.99 * width, size, "bold")
            panel.headings.append((y + (_rows(lines) - 1) / 2, "\n".join(lines), size))
            last, y = bar.label, y + _rows(lines)
        at = max(bar.end, device_gib)
        note = f"{bar.end:.0f}" + (f"  {bar.said}" if bar.said else "")
        lines = style.broken(note, width * (1 - at / reach), NOTE_SIZE)
        middle = y + (_rows(lines) - 1) / 2
        panel.bars.append((middle, bar))
        panel.notes.append((at, "\n".join(lines)))
        y += _rows(lines)
    return replace(panel, rows=y)


def _rows(lines: list[str]) -> float:
    """Return how many rows of bars lines of text take."""
    return max(1.0, 0.75 * len(lines))


def _stack(axes: Axes, panel: Panel) -> None:
    """Draw the bars of a panel, what is said of each, and their curves' names."""
    for y, label, size in panel.headings:
        heading = axes.text(
            0.01,
            y,
            style.plain(label),
            fontsize=size,
            va="center",
            weight="bold",
            bbox=style.WHITE_BOX,
            transform=axes.get_yaxis_transform(),
        )
        heading.set_in_layout(False)  # its place is known, and it squeezes no axes
    for (y, bar), (at, note) in zip(panel.bars, panel.notes, strict=True):
        _bar(axes, y, bar)
        style.bar_note(axes, at, y, note, bool(bar.said), NOTE_SIZE)
    axes.set_yticks([y for y, _ in panel.bars], [bar.context for _, bar in panel.bars], fontsize=6)
    axes.tick_params("y", length=0)
    axes.set_ylim(panel.rows - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def _bar(axes: Axes, y: float, bar: Bar) -> None:
    """Draw one stacked bar."""
    left = 0.0
    for name, colour in ITEMS.items():
        width = bar.held.get(name, 0)
        axes.barh(y, width, 0.75, left, color=colour, zorder=2)
        if name == REQ_TO_TOKEN and width >= LABELLED_GIB:
            middle = left + width / 2
            axes.text(middle, y, f"{width:.2f}", fontsize=6, ha="center", va="center", zorder=3)
        left += width
    if bar.refused:
        style.failed_bar(axes, y, bar.refused, left, 0.75)
