"""How far each remedy moves the three OOM points, and what it costs."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness import style
from harness.plots_throughput import ATTENTION_ONLY, SPEED_OF_SCALE_MODEL
from harness.remedies import POINTS, Point, Remedy, remedies
from harness.runs import frame
from harness.series import is_scale_model, rank_of
from harness.tabular import figure_of, short_tokens

# A point's marker and its place in its row; the colour is the strategy's.
MARKS = {"startup": ("^", -0.27), "admit": ("s", 0.0), "resident": ("o", 0.27)}
TOKENS_FROM, TOKENS_TO = 1e5, 1e8
POINTS_TEXT = "Marks: largest ok. Arrow: nothing failed up to the end of the sweep."
WIDE_TEXT = "Dotted: the point lies on the line, not looked for more closely."
WEIGHTS_TEXT = "Where an arm names the weights, each step reads them too."


@style.styled
def figure_remedies(rows: pd.DataFrame, summary: dict[str, Any]) -> Figure:
    """Draw each arm's three OOM points, and its decode rate beside them.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of the run: they say what an arm's model is, what it differs by, why it has no rate.
    summary : dict
        summary.json: an entry an arm under ``strategies``.

    Returns
    -------
    matplotlib.figure.Figure
        A row an arm; arms that differ by one thing stand under one heading.
    """
    rows = frame(rows)
    arms = remedies(rows, summary)
    places, headings = _places(arms)
    bottom = max([*places, *(y for y, _ in headings), 0]) + 0.7
    figure = style.new_figure(1.2 + 0.2 * bottom, 1, 2, sharey=True, width_ratios=(1.6, 1))
    points, price = figure.axes
    points.set_zorder(price.get_zorder() + 1)  # a long heading runs over the second panel
    points.patch.set_visible(False)
    for y, one in zip(places, arms, strict=True):
        for key, point in one.points.items():
            _point(points, y, one, key, point)
        _bar(price, y, one)
    for y, text in headings:
        heading = points.text(
            0.01,
            y,
            style.plain(text),
            transform=points.get_yaxis_transform(),
            fontsize=6,
            weight="bold",
            va="center",
            bbox=style.WHITE_BOX,
            zorder=3,
        )
        heading.set_in_layout(False)
    ends = [n for one in arms for p in one.points.values() for n in (p.ok, p.not_ok) if n]
    points.set_xlim(
        min([TOKENS_FROM, *(0.6 * n for n in ends)]), 2 * max([TOKENS_TO, *ends])
    )  # room for the arrows
    style.token_axis(points, "tokens")
    points.set_yticks(places, [style.plain(one.name) for one in arms], fontsize=6.5)
    points.set_ylim(bottom, -0.7)
    for axes in figure.axes:
        axes.tick_params("y", length=0)
        axes.grid(axis="y", visible=False)
    rates = [one.tokens_per_second or 0 for one in arms]
    price.set_xlim(0, 1.6 * max([*rates, 0]) or 1)
    lengths = {one.at_tokens for one in arms if one.at_tokens is not None}
    at = f"\nat {short_tokens(lengths.pop())} resident" if len(lengths) == 1 else ""
    price.set_xlabel(style.plain(f"decode, tok/s{at}"))
    _legend(figure, arms)
    wide = any(p.wide for one in arms for p in one.points.values())
    weights = (rows["read_weights"].isin(["device", "offload"])).any()
    style.badge(
        figure,
        POINTS_TEXT,
        WIDE_TEXT if wide else "",
        ATTENTION_ONLY,
        WEIGHTS_TEXT if weights else "",
        *_left_out_texts(arms),
        SPEED_OF_SCALE_MODEL if is_scale_model(rows) else "",
    )
    return figure


def _left_out_texts(arms: list[Remedy]) -> list[str]:
    """Say of each arm what its rate leaves out."""
    return [f"{one.name}: without {one.left_out}." for one in arms if one.left_out]


def _places(arms: list[Remedy]) -> tuple[list[float], list[tuple[float, str]]]:
    """Return each arm's row, and the headings' rows and texts.

    An arm whose base stands in the group above it joins the group.
    """
    groups: list[list[Remedy]] = []
    for one in arms:
        if not groups or one.base not in {other.name for other in groups[-1]}:
            groups.append([])
        groups[-1].append(one)
    places: list[float] = []
    headings: list[tuple[float, str]] = []
    y = 0.0
    for group in groups:
        if group[0].model:
            sizes = {one.token_bytes for one in group if one.token_bytes}
            size = f", {sizes.pop() / 1024:g} KiB a token" if len(sizes) == 1 else ""
            headings.append((y, group[0].model + size))
            y += 0.9
        places += [y + n for n in range(len(group))]
        y += len(group)
    return places, headings


def _point(axes: Axes, y: float, one: Remedy, key: str, point: Point) -> None:
    colour, _ = style.look(one.strategy)
    marker, lift = MARKS[key]
    at = y + lift
    if point.wide and point.not_ok is not None:
        axes.plot([point.ok, point.not_ok], [at, at], ":", color=colour, linewidth=0.9)
    axes.plot(point.ok, at, marker, color=colour, markersize=3.3, markeredgewidth=0, zorder=3)
    if point.unbounded:
        axes.annotate(
            "",
            (point.ok, at),
            (9, 0),
            textcoords="offset points",
            arrowprops={"arrowstyle": "<|-", "color": colour, "lw": 0.8, "mutation_scale": 5}
            | {"shrinkA": 0, "shrinkB": 1.5},
        )
    if key == "resident":
        axes.annotate(
            style.plain(short_tokens(point.ok)),
            (point.ok, at),
            (-4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=5.5,
            color=colour,
        )


def _bar(axes: Axes, y: float, one: Remedy) -> None:
    rate = one.tokens_per_second or float("nan")
    text = figure_of(rate, 3) if one.tokens_per_second else one.untimed
    style.figured_bar(axes, y, rate, text, style.look(one.strategy)[0])


def _legend(figure: Figure, arms: list[Remedy]) -> None:
    marks = [
        Line2D([], [], color=style.DARK, marker=marker, linestyle="", label=name)
        for (marker, _), name in zip(MARKS.values(), POINTS.values(), strict=True)
    ]
    colours = [
        Line2D([], [], color=style.look(s)[0], linewidth=4, label=style.plain(s))
        for s in sorted({one.strategy for one in arms}, key=rank_of)
    ]
    blank = [Line2D([], [], linestyle="", label="")] * max(0, len(marks) - len(colours))
    if len(colours) <= len(marks):  # marks above, colours below: a legend is set by columns
        both = zip(marks, [*colours, *blank], strict=True)
        style.legend(figure, [handle for pair in both for handle in pair], columns=3)
    else:
        style.legend(figure, [*marks, *colours], columns=3)
