"""Attention throughput against resident tokens."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness import style
from harness.runs import trials
from harness.series import Series, is_scale_model, rank_of, series

ATTENTION_ONLY = "Attention only: all layers' kernels of one rank, no other work of a model."
SPEED_OF_SCALE_MODEL = "Scale model on a host: these speeds do not transfer to a GPU."
RATES = (
    ("attention_decode_tokens_per_second", "decode, tokens/s\n(attention only)"),
    ("attention_prefill_tokens_per_second", "prefill, tokens/s\n(attention only)"),
)


@style.styled
def figure_throughput(rows: pd.DataFrame) -> Figure:
    """Draw attention decode and prefill rate against resident tokens.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of trials.csv; only rows that ended well carry a rate. A point is the median over
        processes, its bar their range (decode: at least the interquartile range of the steps).

    Returns
    -------
    matplotlib.figure.Figure
        Two panels; a strategy without a timed row is named in the legend.
    """
    own = trials(rows)
    figure = style.new_figure(3.7, 2, sharex=True)
    handles: list[Line2D] = []
    curves = series(own)
    for one in sorted(curves, key=lambda c: (rank_of(c.strategy), c.turn)):
        drawn = [
            _rate(axes, one, column) for axes, (column, _) in zip(figure.axes, RATES, strict=True)
        ]
        label = one.label if any(drawn) else f"{one.label} (no timed row)"
        handles.append(Line2D([], [], label=style.plain(label), **_look(one)))
    for axes, (_, label) in zip(figure.axes, RATES, strict=True):
        style.token_axis(axes, "")
        if axes.has_data():
            style.plain_log_axis(axes, label)
        else:
            axes.set(ylabel=label, yticks=[])
            axes.text(0.5, 0.5, "not timed in this run", transform=axes.transAxes, ha="center")
    figure.axes[-1].set_xlabel("resident tokens")
    style.legend(figure, handles)
    style.badge(figure, ATTENTION_ONLY, SPEED_OF_SCALE_MODEL if is_scale_model(own) else "")
    return figure


def _look(one: Series) -> dict[str, Any]:
    look = style.curve(one.strategy, one.turn)
    return look | {"markerfacecolor": look["color"] if one.turn == 0 else "white"}


def _rate(axes: Axes, one: Series, column: str) -> int:
    """Draw one curve; returns its number of points."""
    ok = one.rows[(one.rows["status"] == "ok") & (one.rows[column] > 0)]
    if ok.empty:
        return 0
    grouped = ok[column].groupby(ok["resident_tokens"])
    middle = grouped.median()
    low, high = grouped.min(), grouped.max()
    if column == RATES[0][0]:
        spread = ok["attention_decode_step_ms_iqr"] / ok["attention_decode_step_ms"] / 2
        half = (spread.fillna(0) * ok[column]).groupby(ok["resident_tokens"]).median()
        low, high = (middle - half).clip(upper=low), (middle + half).clip(lower=high)
    bars = [(middle - low).clip(lower=0), (high - middle).clip(lower=0)]
    axes.errorbar(middle.index, middle, bars, capsize=2, elinewidth=0.8, **_look(one))
    return len(middle)
