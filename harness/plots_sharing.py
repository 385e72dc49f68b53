"""Where KV memory goes when many sequences share it."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness import style
from harness.plots_memory import SCALE_TEXT
from harness.runs import trials
from harness.series import is_scale_model, series
from harness.shares import SPOKEN
from harness.tabular import known

COLOURS = (style.SKY, style.GREY, style.YELLOW, style.PLUM)
SHARES = {
    f"{name}_share": (spoken, colour)
    for (name, spoken), colour in zip(SPOKEN.items(), COLOURS, strict=True)
}
# Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
# SOSP 2023, figure 2: per cent of KV memory, in the order of SHARES.
PAPER = {
    "Orca (Max)": (20.4, 13.3, 57.3, 8.9),
    "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
    "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6),
    "vLLM": (96.3, None, None, None),
}


@style.styled
def figure_waste(rows: pd.DataFrame) -> Figure:
    """Draw shares of committed KV memory and sequences admitted, beside the paper's figure 2.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows with ``live_share`` and the other shares (means over a trace's busy part).

    Returns
    -------
    matplotlib.figure.Figure
    """
    own = trials(rows)
    ours = [(s.spoken_label, s.rows) for s in series(own)]
    heights = [len(ours) + 0.8, len(PAPER) + 0.8, len(ours) + 0.8]
    figure = style.new_figure(1.5 + 0.17 * sum(heights), 3, gridspec_kw={"height_ratios": heights})
    shares = [[part[c].dropna().median() for c in SHARES] for _, part in ours]
    _share_bars(figure.axes[0], [label for label, _ in ours], shares)
    scaled = is_scale_model(own)
    figure.axes[0].set_title("on the scale model" if scaled else "measured here", loc="left")
    figure.axes[0].set_xlabel("share of KV memory, %")
    percents = [[None if v is None else v / 100 for v in values] for values in PAPER.values()]
    _share_bars(figure.axes[1], list(PAPER), percents)
    figure.axes[1].set_title("PagedAttention paper (SOSP '23), figure 2", loc="left")
    figure.axes[1].set_xlabel("share of KV memory, %")
    axes = figure.axes[2]
    for y, (label, part) in enumerate(ours):
        colour, _ = style.look(part["strategy"].iloc[0])
        admitted = part["sequences_admitted"].dropna().median()
        axes.barh(y, admitted if known(admitted) else 0, 0.7, color=colour, zorder=2)
        text = f"{admitted:,.0f}" if known(admitted) else "no figure"
        axes.annotate(
            text,
            (admitted if known(admitted) else 0, y),
            (2, 0),
            fontsize=6,
            textcoords="offset points",
            va="center",
        )
        del label
    _label_bars(axes, [label for label, _ in ours])
    axes.set(title="", xlabel="sequences admitted")
    axes.margins(x=0.15)
    handles = [Patch(color=colour, label=name) for name, colour in SHARES.values()]
    style.legend(figure, handles)
    style.badge(figure, SCALE_TEXT if scaled else "")
    return figure


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
