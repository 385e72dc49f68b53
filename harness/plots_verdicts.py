"""Verdicts at a glance: each claim, what the rows say of it, and what kind of evidence decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness import style
from harness.evidence import CONDITIONAL, REFUTED, SUPPORTED, UNDECIDED
from harness.tabular import EMPTY

# Colours that no strategy has.
LOOKS = {
    SUPPORTED: ("o", style.FOREST),
    CONDITIONAL: ("d", style.INDIGO),
    REFUTED: ("X", style.PLUM),
    UNDECIDED: ("s", style.GREY),
}
SIZE = 6.5
LINE_INCHES, GAP_INCHES = 0.115, 0.075
CLAIM_AT, VERDICT_AT = 0.085, 0.80  # of the axes' width
HOLLOW = "Hollow: decided by no row of a GPU, but by a scale model, a plan or the source."


@style.styled
def figure_verdicts(claims: Sequence[dict[str, Any]]) -> Figure:
    """Draw one line for each claim of summary.json: the claim, its verdict, what decided.

    Parameters
    ----------
    claims : sequence of dict
        As summary.json holds them under ``claims``: ``id``, ``claim``, ``verdict``, ``basis``.

    Returns
    -------
    matplotlib.figure.Figure
        As high as the claims need.
    """
    points = 72 * style.WIDTH_INCHES * (VERDICT_AT - CLAIM_AT - 0.02)
    texts = [style.broken(str(c.get("claim") or EMPTY), points, SIZE) for c in claims]
    heights = [len(lines) * LINE_INCHES + GAP_INCHES for lines in texts]
    figure = style.new_figure(sum(heights) + 0.3)
    (axes,) = figure.axes
    axes.set(xlim=(0, 1), ylim=(sum(heights), 0))
    axes.axis("off")
    top = 0.0
    for claim, lines, height in zip(claims, texts, heights, strict=True):
        _line(axes, claim, lines, top + height / 2)
        top += height
    style.badge(figure, "" if all(map(measured, claims)) else HOLLOW)
    return figure


def measured(claim: dict[str, Any]) -> bool:
    """Whether rows that a GPU measured are what a verdict rests on."""
    return "measured" in str(claim.get("basis", ""))


def _line(axes: Any, claim: dict[str, Any], lines: list[str], y: float) -> None:  # noqa: ANN401
    verdict = claim["verdict"] if claim.get("verdict") in LOOKS else UNDECIDED
    plain = {"va": "center", "fontsize": SIZE}
    axes.text(0, y, style.plain(claim.get("id") or EMPTY), **plain)
    axes.text(CLAIM_AT, y, style.plain("\n".join(lines)), **plain)
    axes.add_line(_mark(verdict, measured(claim), VERDICT_AT, y))
    axes.text(VERDICT_AT + 0.025, y, verdict, **plain)


def _mark(verdict: str, filled: bool, x: float, y: float) -> Line2D:
    marker, colour = LOOKS[verdict]
    return Line2D(
        [x],
        [y],
        linestyle="none",
        marker=marker,
        color=colour,
        markerfacecolor=colour if filled else "white",
        clip_on=False,
    )
