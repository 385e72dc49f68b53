"""What a pool's fraction changes."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness import style
from harness.plots_memory import SCALE_TEXT
from harness.series import is_scale_model, needed_bytes, options_of, points, scale, series
from harness.sizes import GIB
from harness.tabular import tokens


@style.styled
def figure_mem_fraction(rows: pd.DataFrame) -> Figure:
    """Draw what a static pool asks for at each fraction, of the context and of the device.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows with ``mem_fraction``; what the fraction is of stands in ``strategy_options``.

    Returns
    -------
    matplotlib.figure.Figure
        A curve for each meaning (and whatever else varies): the first in the strategy's colour, the
        others in neutral ones. Crosses did not start.
    """
    own = points(rows)
    own = own[own["mem_fraction"].notna()]
    meaning = [options_of(v).get("mem_fraction_of", "") for v in own["strategy_options"]]
    handles = []
    looks = (
        (style.look("static")[0], "o"),
        (style.DARK, "s"),
        (style.BLACK, "^"),
        (style.SKY, "v"),
    )
    curves = [
        (of, one)
        for of in dict.fromkeys(meaning)
        for one in series(own[[m == of for m in meaning]], ("context_tokens",), ("mem_fraction",))
    ]
    figure = style.new_figure(2.3 + 0.13 * len(curves))
    axes = figure.axes[0]
    for n, (of, one) in enumerate(curves):
        colour, marker = looks[n % len(looks)]
        part = one.rows.sort_values("mem_fraction")
        factor = scale(part) / GIB
        ok = part["status"] == "ok"
        height = part["peak_device_bytes"].where(ok, needed_bytes(part)) * factor
        axes.plot(part["mem_fraction"], height, color=colour, lw=1)
        axes.plot(part["mem_fraction"][ok], height[ok], marker, color=colour)
        axes.plot(part["mem_fraction"][~ok], height[~ok], "X", color=colour, ms=6.5)
        label = one.label + (f", fraction of the {of}" if of else "")
        handles.append(Line2D([], [], color=colour, marker=marker, label=style.plain(label)))
    handles.append(Line2D([], [], color=style.DARK, marker="X", ls="", label="does not start"))
    sizes = (own["capacity_bytes"] * scale(own)).dropna().unique() / GIB
    for value in sizes:
        line = axes.axhline(
            value, color=style.BLACK, linewidth=1, linestyle=(0, (4, 2)), zorder=1.5
        )
        line.set_label(f"device: {' or '.join(f'{size:.1f}' for size in sizes)} GiB free")
    handles += [line] if len(sizes) else []
    axes.margins(y=0.12)
    axes.set(xlabel="mem_fraction", ylabel="needed at start-up, GiB")
    axes.set_ylim(bottom=0)
    style.legend(figure, handles, columns=1)
    at = " and ".join(tokens(c) for c in own["context_tokens"].dropna().unique())
    style.badge(figure, f"Context {at}.", SCALE_TEXT if is_scale_model(own) else "")
    return figure
