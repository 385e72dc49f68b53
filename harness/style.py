"""One look for every figure: colours, markers, axes in powers of ten tokens, files.

Figures are drawn for one column of a paper (3.4 in). The palette is Okabe and Ito's with a few dark
tones beside it, which people with any kind of colour vision can tell apart. A strategy keeps its
colour and marker everywhere, and nothing else has a strategy's colour.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from functools import cache, wraps
from pathlib import Path
from typing import Any, ParamSpec

import matplotlib as mpl
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import text_to_path
from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter

from harness.runs import RunError, write_file

WIDTH_INCHES = 3.4
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, DARK = "#BBBBBB", "#666666"
INDIGO, FOREST, PLUM = "#332288", "#225522", "#5B1846"

_STRATEGY = {
    "static": (VERMILLION, "s"),
    "paged": (BLUE, "o"),
    "eager_pages": (GREEN, "^"),
    "sglang": (ORANGE, "D"),
    "vllm": (PURPLE, "v"),
}
_OTHERS = ((SKY, "P"), (BLACK, "*"), (DARK, "h"), (GREY, "X"))
FONT = "DejaVu Sans"
TEXT_SIZE = 7.5  # of titles and axes' labels
WHITE_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
LEGEND_LETTERS = 72  # that fit a column's width in the legend's size
BADGE_LETTERS = 76  # likewise in a badge's
PIXEL_GRID = 1.05  # letters that are set on whole pixels are broader by less than this
LINES = ("-", "--", ":", "-.")
COMPONENTS = {
    "context": GREY,
    "nccl": "#8C8C8C",
    "weights": DARK,
    "tables": YELLOW,
    "KV": SKY,
    "workspace": PLUM,
    "other": INDIGO,
}
# How a trial that did not end well is marked, and what the mark is called.
ENDS = {
    "oom": ("X", "out of memory"),
    "refused": ("P", "refused"),
    "oom_host": ("X", "out of host memory"),
    "invalid": ("d", "invalid (failed its gate)"),
    "timeout": ("d", "timeout"),
    "crash": ("d", "crash"),
}
RC = {
    "font.family": FONT,
    "font.size": TEXT_SIZE,
    "axes.titlesize": TEXT_SIZE,
    "axes.labelsize": TEXT_SIZE,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "lines.linewidth": 1.3,
    "lines.markersize": 4.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "figure.dpi": 150,
    "savefig.dpi": 300,
    "svg.hashsalt": "kv-alloc-bench",
    "svg.fonttype": "path",
    "text.parse_math": True,
}

P = ParamSpec("P")


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Draw in this style whatever the reader's own settings are."""

    @wraps(draw)
    def inner(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with mpl.rc_context(RC):
            return draw(*args, **kwargs)

    return inner


def look(strategy: str) -> tuple[str, str]:
    """Return a strategy's colour and marker; one of unknown name gets its own, always the same."""
    return _STRATEGY.get(strategy) or _OTHERS[sum(strategy.encode()) % len(_OTHERS)]


def curve(strategy: str, turn: int) -> dict[str, Any]:
    """Return how a strategy's ``turn``-th curve is drawn; a pre-allocating one is broad."""
    colour, marker = look(strategy)
    broad = strategy in ("static", "sglang")
    return {
        "color": colour,
        "marker": marker,
        "markersize": 7 if broad else 4,
        "linewidth": 2.6 if broad else 1.2,
        "linestyle": LINES[turn % len(LINES)],
    }


def plain(text: object) -> str:
    """Return text as matplotlib prints it literally: a ``$`` would begin a formula."""
    return str(text).replace("$", r"\$")


def new_figure(height_inches: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> Figure:  # noqa: ANN401
    """Return a figure of one column's width with its axes, laid out without overlap."""
    figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
    figure.subplots(rows, columns, squeeze=False, **kwargs)
    return figure


def token_axis(axes: Axes, label: str) -> None:
    """Make x a log axis of tokens, labelled in powers of ten."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    if high < 10 * low:  # one label alone is no scale
        axes.set_xlim(10 ** np.floor(np.log10(low)) * 0.9, high)
    axes.xaxis.set_major_locator(LogLocator(10, numticks=20))
    axes.xaxis.set_major_formatter(LogFormatterMathtext(10))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)


def plain_log_axis(axes: Axes, label: str) -> None:
    """Make y a log axis whose ticks (1, 2, 5, 10 ...) are written out."""
    axes.set_yscale("log")
    axes.margins(y=0.1)
    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / max(low, 1e-12) < 500 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(10, subs=steps, numticks=20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(label)


def capacity_line(
    axes: Axes, capacity_gib: float, text: str = "device", below: bool = False
) -> None:
    """Draw where the device ends; its name stands over it at the left, or below at the right."""
    axes.axhline(capacity_gib, color=BLACK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5)
    axes.annotate(
        plain(f"{text}: {capacity_gib:.1f} GiB free"),
        (0.99 if below else 0.01, capacity_gib),
        xycoords=("axes fraction", "data"),
        xytext=(0, -2 if below else 2),
        textcoords="offset points",
        fontsize=6.5,
        ha="right" if below else "left",
        va="top" if below else "bottom",
        bbox=WHITE_BOX,
        zorder=1.6,
    )


def figured_bar(
    axes: Axes, y: float, value: float, text: str, colour: str, size: float = 6
) -> float:
    """Draw a bar from zero with its figure at its end; without a value the text alone, in grey.

    Returns
    -------
    float
        The bar's width.
    """
    there = np.isfinite(value)
    width = float(value) if there else 0.0
    axes.barh(y, width, 0.7, color=colour, zorder=2)
    note = axes.annotate(
        plain(text),
        (width, y),
        (2, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        color=BLACK if there else DARK,
    )
    note.set_in_layout(False)  # it may run over the axis' end, not widen it
    return width


def failed_bar(axes: Axes, y: float, width: float, left: float, height: float) -> None:
    """Draw the part of a stacked bar that was asked for in vain."""
    axes.barh(y, width, height, left, fc="white", hatch="////", ec="black", lw=0.5, zorder=2)


@cache
def text_points(text: str, size: float, weight: str = "normal") -> float:
    """Return how broad one line of text gets at most, in points."""
    font = FontProperties(family=FONT, weight=weight, size=size)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, ismath=False)
    return PIXEL_GRID * float(width)


def broken(text: str, points: float, size: float, weight: str = "normal") -> list[str]:
    """Return text in as few lines of at most ``points`` as it takes, all about as long.

    A word that is longer than a line is broken as well.
    """
    most = len(text)
    while most > 1 and max(_widths(text, most, size, weight)) > points:
        most -= 1
    lines = len(textwrap.wrap(text, most))
    longest = max(len(word) for word in text.split())
    while most > longest and len(textwrap.wrap(text, most - 1)) == lines:
        most -= 1
    return textwrap.wrap(text, most)


def _widths(text: str, letters: int, size: float, weight: str) -> list[float]:
    return [text_points(line, size, weight) for line in textwrap.wrap(text, letters)]


def bar_note(axes: Axes, x: float, y: float, text: str, loud: bool, size: float = 6) -> None:
    """Write behind the end of a stacked bar; ``loud`` is what failed."""
    note = axes.annotate(
        plain(text),
        (x, y),
        xytext=(2, 0),
        textcoords="offset points",
        va="center",
        fontsize=size,
        bbox=WHITE_BOX | {"pad": 0.2},
        color=VERMILLION if loud else BLACK,
        zorder=3,
    )
    note.set_in_layout(False)


def badge(figure: Figure, *texts: str) -> None:
    """Print what a reader must know to read the figure right, under it."""
    said = ["\n".join(textwrap.wrap(t, BADGE_LETTERS)) for t in texts if t]
    if said:
        figure.supxlabel("\n".join(plain(t) for t in said), fontsize=6, color="#444444")


def legend(figure: Figure, handles: Sequence[Artist], columns: int = 2) -> None:
    """Put one legend over all axes, above them; in fewer columns when names are long."""
    if not handles:
        return
    names = [len(str(h.get_label())) for h in handles]
    while columns > 1 and _legend_letters(names, columns) > LEGEND_LETTERS:
        columns -= 1
    figure.legend(
        handles=list(handles),
        loc="outside upper left",
        ncols=columns,
        handlelength=2.2,
        columnspacing=1.2,
        borderaxespad=0.1,
    )


def _legend_letters(names: list[int], columns: int) -> int:
    """Return the width in letters of names set column by column, a handle being 8 of them."""
    size = -(-len(names) // columns)
    return sum(max(names[i : i + size]) + 8 for i in range(0, len(names), size))


def save(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.svg`` into ``folder``; the same figure gives the same bytes."""
    pictures = {"png": io.BytesIO(), "svg": io.BytesIO()}
    unsaid = {"png": {"Software": None}, "svg": {"Date": None, "Creator": None}}
    with mpl.rc_context(RC):
        try:
            _settle(figure)
            for kind, buffer in pictures.items():
                figure.savefig(buffer, format=kind, metadata=unsaid[kind])
        except ValueError as error:
            raise RunError(f"figure {name}: cannot be drawn ({error})") from None
    return [write_file(folder / f"{name}.{k}", b.getvalue()) for k, b in pictures.items()]


def _settle(figure: Figure) -> None:
    """Lay a figure out once, on a grid: the solver's last bits differ from process to process."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:
        left, bottom, width, height = (round(float(v), 5) for v in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
