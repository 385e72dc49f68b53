"""What more ranks bring: capacity, and a decode step's attention and collectives."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from harness import style
from harness.plots_throughput import ATTENTION_ONLY, SPEED_OF_SCALE_MODEL
from harness.ranks_scaling import Scaled, scaling
from harness.runs import frame
from harness.series import is_scale_model
from harness.sources import as_written
from harness.tabular import short_tokens

SPLITS = {
    "heads": ("heads split (tp)", style.INDIGO, "o"),
    "pages": ("pages dealt out (context)", style.SKY, "s"),
    "both": ("both", style.PLUM, "^"),
}


@style.styled
def figure_capacity_over_ranks(rows: pd.DataFrame) -> Figure:
    """Draw capacity and step times against the number of ranks, a row of panels a model.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of ``experiment=scaling``; hollow marks are planned, filled ones ran.

    Returns
    -------
    matplotlib.figure.Figure
    """
    found = scaling(as_written(frame(rows)))
    models = sorted({s.model for s in found})
    figure = style.new_figure(0.8 + 1.7 * len(models), len(models), 2, sharex=True)
    for row, model in enumerate(models):
        own = [s for s in found if s.model == model]
        capacity, times = figure.axes[2 * row], figure.axes[2 * row + 1]
        for split, (_, colour, marker) in SPLITS.items():
            mine = [s for s in own if _split(s) == split]
            _line(capacity, mine, "capacity_tokens", color=colour, marker=marker)
            _line(times, mine, "attention_ms", color=colour, marker=marker)
            _line(times, mine, "collective_ms", color=colour, marker=marker, linestyle=":")
        capacity.set_title(style.plain(model), loc="left")
        capacity.set_yscale("log")
        capacity.set_ylabel("one sequence, tokens")
        capacity.yaxis.set_major_formatter(FuncFormatter(lambda y, _: short_tokens(y)))
        times.set_ylabel("decode step, ms")
        times.set_ylim(bottom=0)
    for axes in figure.axes[-2:]:
        axes.set_xlabel("ranks")
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({s.ranks for s in found}))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    style.legend(figure, _handles(found))
    style.badge(figure, SPEED_OF_SCALE_MODEL if is_scale_model(frame(rows)) else ATTENTION_ONLY)
    return figure


def _split(one: Scaled) -> str:
    return one.split if one.split in SPLITS else "both"


def _line(axes: Axes, own: list[Scaled], field: str, **look: Any) -> None:  # noqa: ANN401
    drawn = [s for s in own if getattr(s, field) is not None]
    ranks, values = [s.ranks for s in drawn], [getattr(s, field) for s in drawn]
    axes.plot(ranks, values, **(look | {"marker": ""}))
    for one, x, y in zip(drawn, ranks, values, strict=True):
        hollow = {"markerfacecolor": "white"} if one.basis == "planned" else {}
        axes.plot([x], [y], **(look | {"linestyle": ""} | hollow))


def _handles(found: list[Scaled]) -> list[Line2D]:
    splits = {_split(s) for s in found}
    out = [
        Line2D([], [], color=colour, marker=marker, label=label)
        for split, (label, colour, marker) in SPLITS.items()
        if split in splits
    ]
    if any(s.collective_ms is not None for s in found):
        out.append(Line2D([], [], color=style.DARK, linestyle=":", label="collectives"))
    if any(s.basis == "planned" for s in found):
        planned = Line2D([], [], color=style.DARK, marker="o", linestyle="", label="planned")
        planned.set_markerfacecolor("white")
        out.append(planned)
    return out
