"""Memory against configured context."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from harness import style
from harness.series import (
    Series,
    by_model,
    is_scale_model,
    needed_bytes,
    points,
    scale,
    series,
)
from harness.sizes import GIB
from harness.tabular import percent, short_tokens

SCALE_TEXT = "Scale model on a host: bytes are multiplied up to the modelled device."
FILL_TEXT = "Solid marks: the whole context is filled."
Notes = dict[tuple[float, float], tuple[str, str]]


@style.styled
def figure_memory(rows: pd.DataFrame) -> Figure:
    """Draw memory against configured context: peak, committed KV, capacity, OOM marks.

    Parameters
    ----------
    rows : pandas.DataFrame
        Rows of trials.csv. A trial that ran out of memory is drawn at what it would have needed:
        the bytes in use before it asked plus the bytes that it asked for.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a model; a curve for each strategy, configuration and fill.
    """
    own = points(rows)
    models = list(by_model(own))
    figure = style.new_figure(0.8 + 2.2 * len(models), len(models), sharex=True)
    handles: dict[str, Line2D] = {}
    for axes, (model, part) in zip(figure.axes, models, strict=True):
        notes: Notes = {}
        for one in series(part):
            handles.setdefault(one.label, _curves(axes, one, notes))
        ends = part.loc[part["status"] != "ok", "status"].unique()
        for marker, text in dict.fromkeys(style.ENDS[s] for s in ends if s in style.ENDS):
            handles[text] = _mark(marker, text)
        _write(axes, notes)
        for value in (part["capacity_bytes"] * scale(part)).dropna().unique():
            style.capacity_line(axes, value / GIB)
        style.token_axis(axes, "")
        style.plain_log_axis(axes, "peak device memory, GiB")
        axes.set_title(style.plain(f"{model} model{_token_bytes(part)}"), loc="left")
    figure.axes[-1].set_xlabel("configured context, tokens")
    handles["KV"] = Line2D(
        [], [], color=style.DARK, linestyle=":", label="KV pool alone (highest fill)"
    )
    style.legend(figure, list(handles.values()))
    partly = FILL_TEXT if (own["fill"] < 1).any() else ""
    style.badge(figure, partly, SCALE_TEXT if is_scale_model(own) else "")
    return figure


def _curves(axes: Axes, one: Series, notes: Notes) -> Line2D:
    """Draw a strategy's curve for each fill, the fullest on top; returns its legend entry."""
    look = style.curve(one.strategy, one.turn)
    marks, fullest = 0, pd.Series(dtype=float)
    fills = sorted(one.rows["fill"].fillna(1).unique())
    for fill in fills:
        rows = one.rows[one.rows["fill"].fillna(1) == fill].sort_values("context_tokens")
        ok = rows["status"] == "ok"
        peaks = _per_context(rows[ok], "peak_device_bytes")
        part = {"markerfacecolor": "white", "linestyle": "--", "linewidth": 1} if fill < 1 else {}
        axes.plot(
            peaks.index, peaks, **(look | part | ({"linestyle": ""} if len(peaks) < 2 else {}))
        )
        marks += _bad_ends(axes, one.strategy, rows[~ok], peaks, notes)
        if fill == fills[-1]:
            fullest = peaks
            kv = _per_context(rows[ok], "kv_committed_bytes")
            axes.plot(kv[kv > 0].index, kv[kv > 0], color=look["color"], ls=":", lw=0.9)
        elif not peaks.empty:
            notes[peaks.index[-1], peaks.iloc[-1]] = (f"{percent(fill)} filled", look["color"])
    for at, (text, _) in list(notes.items()):
        full = fullest.get(at[0])
        if text.endswith("filled") and full and abs(at[1] / full - 1) < 0.05:
            del notes[at]  # a static pool's curves lie on one another
    label = one.label
    if not (one.rows["status"] == "ok").any():
        look |= {"marker": "X", "markersize": 6, "linestyle": ""}
        label += " (never ok)" if marks else " (no memory figure)"
    return Line2D([], [], label=style.plain(label), **look)


def _per_context(rows: pd.DataFrame, column: str) -> pd.Series:
    """Return the largest of a byte column at each context, GiB of the modelled device."""
    gib = (rows[column] * scale(rows) / GIB).groupby(rows["context_tokens"]).max()
    return gib.dropna()


def _bad_ends(axes: Axes, strategy: str, bad: pd.DataFrame, peaks: pd.Series, notes: Notes) -> int:
    """Mark what did not end well at what it needed; returns how many marks were drawn."""
    colour, _ = style.look(strategy)
    needed = needed_bytes(bad).fillna(bad["peak_device_bytes"]) * scale(bad) / GIB
    for (_, row), y in zip(bad.iterrows(), needed, strict=True):
        if not y > 0:
            continue
        marker = style.ENDS.get(row["status"], ("d", ""))[0]
        x = row["context_tokens"]
        if not peaks.empty and peaks.index[-1] < x:
            axes.plot([peaks.index[-1], x], [peaks.iloc[-1], y], color=colour, ls="-", lw=0.6)
        axes.plot([x], [y], color=colour, marker=marker, markersize=7, markeredgecolor="white")
        if row["oom_phase"] == "fill":
            text = f"starts, full at\n{short_tokens(row['resident_tokens'])} tokens"
        else:
            text = f"does not start: needs {y:.0f} GiB" if row["oom_requested_bytes"] > 0 else ""
        if text and x == bad["context_tokens"].max():
            notes[x, y] = (text, colour)
    return int((needed > 0).sum())


def _write(axes: Axes, notes: Notes) -> None:
    for at, (text, colour) in notes.items():
        above, partly = text.startswith("does not"), text.endswith("filled")
        offset, vertical = ((-6, 3), "bottom") if above else ((9, -9), "top")
        if partly:  # a dashed curve may come from the left
            offset, vertical = (4, -5), "top"
        axes.annotate(
            style.plain(text),
            at,
            xytext=offset,
            textcoords="offset points",
            ha="right",
            va=vertical,
            linespacing=1,
            fontsize=6.5,
            color=colour,
            annotation_clip=False,
        )


def _mark(marker: str, text: str) -> Line2D:
    return Line2D([], [], color=style.DARK, marker=marker, linestyle="", markersize=6, label=text)


def _token_bytes(part: pd.DataFrame) -> str:
    sizes = (part["kv_bytes_per_token"] * scale(part)).dropna().unique()
    return f": {sizes[0] / 1024:g} KiB of KV a token" if len(sizes) == 1 else ""
