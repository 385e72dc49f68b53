"""What churn leaves behind: an arm's figures side by side, and memory over the operations."""

from __future__ import annotations

import textwrap

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots_memory import SCALE_TEXT
from harness.plots_throughput import SPEED_OF_SCALE_MODEL
from harness.runs import frame, trials
from harness.series import Series, is_scale_model, rank_of, scale, series
from harness.sizes import GIB
from harness.tabular import figure_of

# Column, axis label, factor, whether it is of the modelled device's bytes.
METRICS = {
    "live_share": ("live share of\ncommitted, %", 100.0, False),
    "largest_admissible_tokens": ("admissible,\nK tokens", 1e-3, False),
    "admissible_of_free_min": ("admissible of\nfree, worst, %", 100.0, False),
    "kv_end_committed_bytes": ("still held at\nthe end, GiB", 1 / GIB, True),
    "grow_stall_us_p99": ("growth stall\np99, ms", 1e-3, False),
    "fill_seconds": ("time of all\noperations, s", 1.0, False),
}
COLUMNS = 3
ADMISSIBLE_TEXT = (
    "Admissible: the longest sequence that would be taken, mean over time; beside it, its "
    "share of the free memory (of the context, where that is less) at the worst moment."
)
NEVER_GREW_TEXT = "–: memory was committed at start-up and never grew."
SLOTS_TEXT = (
    "Slots of static: of the whole context (max), of the next power of two of pages asked for "
    "(pow2), or of the pages asked for (exact)."
)
CHUNK_TEXT = "Chunks: as they were, the size asked for rounded up to whole pages of all layers."
NAME_LETTERS = 20
PANELS = 2


@style.styled
def figure_fragmentation(rows: pd.DataFrame) -> Figure:
    """Draw what churn lost and cost: live share, longest admissible sequence, memory kept, stalls.

    Parameters
    ----------
    rows : pandas.DataFrame

    Returns
    -------
    matplotlib.figure.Figure
        Six panels; a bar an arm, the median over its trials that ended well.
    """
    own = trials(rows)
    arms = series(own)
    count = max(len(arms), 1)
    figure = style.new_figure(1.6 + 2 * (0.4 + 0.135 * count), 2, COLUMNS, sharey=True)
    for axes, (column, (label, factor, scaled)) in zip(figure.axes, METRICS.items(), strict=True):
        widths = []
        for y, one in enumerate(arms):
            ok = one.rows[one.rows["status"] == "ok"]
            value = (ok[column] * (scale(ok) if scaled else 1)).median() * factor
            widths.append(_bar(axes, y, one, value))
        axes.set_xlabel(label, fontsize=6.5)
        axes.set_xlim(0, 1.5 * max(widths, default=0) or 1)
        if label.endswith("%"):
            axes.set_xticks([0, 50, 100])
        axes.set_ylim(count - 0.4, -0.6)
        axes.grid(axis="y", visible=False)
        axes.tick_params("y", length=0)
        axes.tick_params("x", labelsize=6)
    for axes in figure.axes[::COLUMNS]:
        names = ["\n".join(textwrap.wrap(a.own_name, NAME_LETTERS)) for a in arms]
        axes.set_yticks(range(len(arms)), [style.plain(n) for n in names], fontsize=6)
    handles = [Patch(color=style.look(s)[0], label=style.plain(s)) for s in _strategies(arms)]
    style.legend(figure, handles, columns=3)
    style.badge(
        figure,
        ADMISSIBLE_TEXT,
        SLOTS_TEXT if own.loc[own["strategy"].eq("static"), "slot_policy"].nunique() > 1 else "",
        CHUNK_TEXT if real_chunks(arms) else "",
        simulated_text(own),
        NEVER_GREW_TEXT if own["grow_events"].eq(0).any() else "",
        SCALE_TEXT if is_scale_model(own) else "",
        SPEED_OF_SCALE_MODEL if is_scale_model(own) else "",
    )
    return figure


def real_chunks(arms: list[Series]) -> bool:
    """Whether an arm is named by a size of chunk that is not the real one."""
    return any(one.sized_label != one.label for one in arms)


def simulated_text(rows: pd.DataFrame) -> str:
    """Say how long the operations stand for; ``""`` for rows of an earlier version."""
    hours, steps = rows["simulated_hours"].dropna(), rows["step_ms"].dropna().unique()
    if hours.empty or len(steps) != 1:
        return ""
    low, high = (figure_of(n, 2) for n in (hours.min(), hours.max()))
    span = low if low == high else f"{low} to {high}"
    return (
        f"The operations stand for {span} h of decoding, were a step, a token of every open "
        f"sequence, to last {steps[0]:g} ms."
    )


def _bar(axes: Axes, y: float, one: Series, value: float) -> float:
    text = figure_of(value, 3)
    if one.rows["status"].ne("ok").all():
        text = str(one.rows["status"].iloc[0])
    return style.figured_bar(axes, y, value, text, style.look(one.strategy)[0], 5.5)


@style.styled
def figure_churn(rows: pd.DataFrame, timeline: pd.DataFrame) -> Figure:
    """Draw committed and live KV bytes over the operations of churn.

    Parameters
    ----------
    rows : pandas.DataFrame
    timeline : pandas.DataFrame
        Ledger events of the trials: committed bytes, and resident tokens (times the bytes of a
        token: live bytes). Those of the phase ``fill`` are evenly spread over the operations, so
        that a slow arm is as wide as a fast one.

    Returns
    -------
    matplotlib.figure.Figure
        A panel an arm, two beside each other.
    """
    own, events = trials(rows), frame(timeline, TIMELINE_COLUMNS)
    arms = series(own)
    lines = -(-max(len(arms), 1) // PANELS)
    figure = style.new_figure(1.0 + 0.85 * lines, lines, PANELS, sharex=True, sharey=True)
    for axes, one in zip(figure.axes, arms, strict=False):
        drawn = [
            _memory(axes, one, row, factor, events)
            for (_, row), factor in zip(one.rows.iterrows(), scale(one.rows) / GIB, strict=True)
        ]
        if not any(drawn):
            ends = ", ".join(s for s in dict.fromkeys(one.rows["status"]) if s != "ok")
            text = "no ledger events" + (f" ({ends})" if ends else "")
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize=6.5)
        axes.set_title(style.plain(one.own_name), loc="left", fontsize=6.5)
    for axes in figure.axes[len(arms) :]:
        axes.set_axis_off()
    for axes in figure.axes[-PANELS:]:
        axes.set_xlabel("operations, % of all")
    figure.supylabel("KV memory, GiB", fontsize=7.5)
    handles = [Line2D([], [], color=style.BLACK, lw=0.8, ls=":", label="live (holds tokens)")]
    handles += [
        Line2D([], [], color=style.look(s)[0], label=style.plain(f"committed, {s}"))
        for s in _strategies(arms)
    ]
    style.legend(figure, handles)
    style.badge(
        figure,
        simulated_text(own),
        CHUNK_TEXT if real_chunks(arms) else "",
        SCALE_TEXT if is_scale_model(own) else "",
    )
    return figure


def _memory(axes: Axes, one: Series, row: pd.Series, factor: float, events: pd.DataFrame) -> bool:
    """Draw one trial's committed and live bytes; returns whether it had events."""
    mine = events[(events["trial_id"] == row["trial_id"]) & events["phase"].eq("fill")]
    mine = mine[mine["kv_committed_bytes"].notna()].sort_values("seconds", kind="stable")
    if mine.empty:
        return False
    share = [100 * n / max(len(mine) - 1, 1) for n in range(len(mine))]
    live = mine["resident_tokens"].fillna(0) * row["kv_bytes_per_token"] * factor
    axes.plot(share, mine["kv_committed_bytes"] * factor, color=style.look(one.strategy)[0], lw=1)
    axes.plot(share, live, color=style.BLACK, linewidth=0.7, linestyle=":")
    return True


def _strategies(arms: list[Series]) -> list[str]:
    return sorted({one.strategy for one in arms}, key=rank_of)
