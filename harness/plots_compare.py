"""Ratios of two sets of trials with their intervals and the 2 % gate."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import shorten

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from harness import style
from harness.pairing import FEWEST_PAIRS, GATE, METRICS, Ratio

# Strategies have colours of their own; a verdict has none of them.
UNDECIDED = "#8C8C8C"


@style.styled
def figure_compare(found: Sequence[Ratio], a: str = "A", b: str = "B") -> Figure:
    """Draw B / A of every metric and cell with its 95 % interval.

    Parameters
    ----------
    found : sequence of Ratio
    a, b : str
        What is compared.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a metric, a line a cell; hollow points have fewer than three pairs, and an
        interval of theirs may run out of the panel.
    """
    panels = {m: [r for r in found if r.metric == m] for m in METRICS}
    panels = {m: lines for m, lines in panels.items() if lines}
    heights = [len(lines) + 1.0 for lines in panels.values()]
    figure = style.new_figure(
        0.6 + 0.16 * sum(heights) + 0.4 * len(panels),
        len(panels),
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (metric, lines) in zip(figure.axes, panels.items(), strict=True):
        axes.axvspan(1 / (1 + GATE), 1 + GATE, color="#EDEDED", zorder=0)
        axes.axvline(1, color=style.BLACK, linewidth=0.6, zorder=1)
        for y, r in enumerate(lines):
            decided = r.verdict.startswith("B ")
            colour = style.BLACK if decided else UNDECIDED
            if r.pairs > 1:
                axes.plot([r.low, r.high], [y, y], color=colour, linewidth=1.2)
            face = colour if r.pairs >= FEWEST_PAIRS else "white"
            axes.plot(r.ratio, y, marker="o", color=colour, markerfacecolor=face, linestyle="")
        axes.set_yticks(range(len(lines)), [style.plain(shorten(r.cell, 34)) for r in lines])
        axes.set_ylim(len(lines) - 0.5, -0.7)
        firm = [v for r in lines if r.pairs >= FEWEST_PAIRS for v in (r.low, r.high)]
        reach = max(0.03, *(abs(v - 1) for v in [*firm, *(r.ratio for r in lines)])) * 1.1
        axes.set_xlim(max(1 - reach, 0), 1 + reach)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.4g}"))
        axes.set_title(style.plain(METRICS[metric]), loc="left")
        axes.grid(axis="y", visible=False)
    figure.axes[-1].set_xlabel("B / A, 95 % interval; shaded: within 2 %")
    said = (
        f"Black: beyond 2 %; grey: the same, or undecided. Hollow: fewer than {FEWEST_PAIRS} pairs."
    )
    style.badge(figure, f"A = {a}, B = {b}.", said)
    return figure
