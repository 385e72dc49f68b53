"""Where KV memory goes when many sequences share it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness import style
from harness.plots_memory import SCALE_TEXT
from harness.runs import trials
from harness.series import is_scale_model
from harness.shares import SPOKEN
from harness.sharing import (
    PAPER_BATCHED,
    PAPER_LOADS,
    PAPER_SHARES,
    Shared,
    paper_multiples,
    shared,
)
from harness.tabular import figure_of, known

COLOURS = (style.SKY, style.GREY, style.YELLOW, style.PLUM)
SHARES = {
    f"{name}_share": (spoken, colour)
    for (name, spoken), colour in zip(SPOKEN.items(), COLOURS, strict=True)
}
PAPER_COLOURS = (style.BLACK, style.DARK)
MULTIPLE = "sequences a GiB of KV, × slots max"
POOLS_TEXT = "Beside each bar: sequences at once, and the KV memory that they shared."
PAPER_TEXT = "Figure 13: OPT-13B, all in 12 GB of KV memory."


@style.styled
def figure_waste(rows: pd.DataFrame) -> Figure:
    """Draw shares of committed KV memory and sequences at once, beside the paper's figures.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows with ``live_share`` and the other shares (means over a trace's busy part).

    Returns
    -------
    matplotlib.figure.Figure
        Ours and the paper's shares (figure 2), then sequences at once in a GiB of KV memory, ours
        and the paper's (figure 13), both as multiples of slots of the longest request.
    """
    own = trials(rows)
    ours = shared(own)
    labels = [one.label for one in ours]
    lines = (len(ours), len(PAPER_SHARES), len(ours), 1.6 * len(PAPER_BATCHED))
    heights = [n + 0.8 for n in lines]
    figure = style.new_figure(2.0 + 0.17 * sum(heights), 4, gridspec_kw={"height_ratios": heights})
    here, paper, held, batched = figure.axes
    _share_bars(here, labels, [one.shares for one in ours])
    scaled = is_scale_model(own)
    here.set_title("on the scale model" if scaled else "measured here", loc="left")
    percents = [
        [None if v is None else v / 100 for v in values] for values in PAPER_SHARES.values()
    ]
    _share_bars(paper, list(PAPER_SHARES), percents)
    paper.set_title("PagedAttention paper (SOSP '23), figure 2", loc="left")
    for axes in (here, paper):
        axes.set_xlabel("share of KV memory, %")
    _held_bars(held, ours)
    _batched_bars(batched)
    handles = [Patch(color=colour, label=name) for name, colour in SHARES.values()]
    handles += [
        Patch(color=colour, label=f"paper, {load}")
        for load, colour in zip(PAPER_LOADS, PAPER_COLOURS, strict=True)
    ]
    style.legend(figure, handles)
    style.badge(figure, POOLS_TEXT, PAPER_TEXT, SCALE_TEXT if scaled else "")
    return figure


def _held_bars(axes: Axes, ours: list[Shared]) -> None:
    """Sequences at once in a GiB; as multiples where slots of the longest request are an arm."""
    multiples = any(one.of_slots is not None for one in ours)
    widths = []
    for y, one in enumerate(ours):
        value = one.of_slots if multiples else one.per_gib
        width = value if value is not None else float("nan")
        text = "no figure"
        if value is not None:
            each = f"{figure_of(value, 3)}{'×' if multiples else ''}"
            text = f"{each}: {figure_of(one.sequences, 3)} in {figure_of(one.kv_gib, 3)} GiB"
        elif one.sequences is not None:
            text = f"{figure_of(one.sequences, 3)} in no KV memory that is known"
        widths.append(style.figured_bar(axes, y, width, text, style.look(one.strategy)[0]))
    axes.set_xlim(0, 1.75 * max(widths, default=0) or 1)
    axes.set_xlabel(MULTIPLE if multiples else MULTIPLE.partition(",")[0])
    _label_bars(axes, [one.label for one in ours])


def _batched_bars(axes: Axes) -> None:
    """Figure 13's requests at once, a bar a load."""
    found = paper_multiples()
    for y, multiples in enumerate(found.values()):
        for lift, value, colour in zip((-0.2, 0.2), multiples, PAPER_COLOURS, strict=True):
            axes.barh(y + lift, value, 0.38, color=colour, zorder=2)
            axes.annotate(
                f"{figure_of(value, 3)}×",
                (value, y + lift),
                (2, 0),
                fontsize=6,
                textcoords="offset points",
                va="center",
            )
    axes.set_title("PagedAttention paper, figure 13", loc="left")
    axes.set_xlabel("requests at once, × Orca (Max)")
    axes.set_xlim(0, 1.15 * max(max(m) for m in found.values()))
    _label_bars(axes, list(found))


def _share_bars(axes: Axes, labels: list[str], values: list[list[float | None]]) -> None:
    for y, shares in enumerate(values):
        left = 0.0
        for share, (_, colour) in zip(shares, SHARES.values(), strict=True):
            if not isinstance(share, float) or not known(share):
                continue
            axes.barh(y, 100 * share, 0.75, left, color=colour, zorder=2)
            if share > 0.07:
                white = colour == style.PLUM
                axes.text(
                    left + 50 * share,
                    y,
                    f"{100 * share:.1f}",
                    ha="center",
                    va="center",
                    fontsize=6,
                    color="white" if white else "black",
                )
            left += 100 * share
        if not left:
            axes.text(1, y, "no figure", va="center", fontsize=6)
    _label_bars(axes, labels)
    axes.set_xlim(0, 100)


def _label_bars(axes: Axes, labels: list[str]) -> None:
    axes.set_yticks(range(len(labels)), [style.plain(x) for x in labels], fontsize=6.5)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
