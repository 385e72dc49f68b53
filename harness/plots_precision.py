"""What FP8 K/V buy and cost: bytes a token, tokens held, decode rate, error."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness import style
from harness.plots_throughput import ATTENTION_ONLY, SPEED_OF_SCALE_MODEL
from harness.runs import frame, trials
from harness.series import Series, is_scale_model, rank_of, scale, series
from harness.tabular import figure_of, known, short_tokens

LEAST = 0.01  # of any figure that is told exactly
HELD_TEXT = "Resident: the longest sequence held; arrow: the sweep ended there."
ERROR_TEXT = "Error: of the kernels, relative RMS, against float64 on the same quantised K/V."
DECODE_TEXT = (
    "Error: relative RMS of decode against float64, on the stored K/V and, with rounding, "
    "on the BF16 values before the K/V dtype rounded them."
)


@style.styled
def figure_precision(rows: pd.DataFrame) -> Figure:
    """Draw K/V bytes a token, tokens held, decode rate and errors of each KV dtype.

    Parameters
    ----------
    rows : pandas.DataFrame

    Returns
    -------
    matplotlib.figure.Figure
        A bar a dtype and configuration. Rate and errors are medians at the longest resident length
        at which any configuration was timed; one that was not says so. Rows of earlier versions
        know no error that rounding K and V is a part of: they have a panel less.
    """
    own = trials(rows)
    bars = series(own, ("kv_dtype",))
    ok = own[own["status"] == "ok"]
    timed = ok[ok["attention_decode_tokens_per_second"] > 0]
    length = timed["resident_tokens"].max()
    both = timed["unrounded_decode_error"].notna().any()
    lines = 3 if both else 2
    height = 1.3 + lines * (0.5 + 0.15 * max(len(bars), 1))
    errors = ("decode_gate_error", "unrounded_decode_error") if both else ("gate_error",)
    figure = style.new_figure(height, lines, 2, sharey=True)
    unused = figure.axes[3] if both else None  # so that both errors stand side by side
    panels = [axes for axes in figure.axes if axes is not unused]
    size, held, rate = panels[:3]
    if unused is not None:
        unused.set_axis_off()
    widths: list[list[float]] = [[] for _ in panels]
    for y, one in enumerate(bars):
        part = one.rows
        there = part[part["resident_tokens"].eq(length) & part["status"].eq("ok")]
        values = (
            ((part["kv_bytes_per_token"] * scale(part)).median() / 1024, ""),
            _held(part),
            (there["attention_decode_tokens_per_second"].median(), ""),
            *((1e3 * there[column].median(), "") for column in errors),
        )
        for axes, own_widths, (value, mark) in zip(panels, widths, values, strict=True):
            own_widths.append(_bar(axes, y, one, value, mark))
    at = f"\nat {short_tokens(length)} resident" if known(length) else ""
    size.set_xlabel("KV a token, KiB")
    held.set_xlabel("resident, M tokens")
    rate.set_xlabel(f"decode, tok/s{at}")
    named = ("error, 10⁻³", "with rounding, 10⁻³") if both else ("error, 10⁻³",)
    for axes, name in zip(panels[3:], named, strict=True):
        axes.set_xlabel(name + at)
    largest = max([*widths[3], *widths[-1]], default=0)  # errors share a scale
    widths[3:] = [[largest]] * len(errors)
    names = _names(bars)
    for axes, own_widths in zip(panels, widths, strict=True):
        axes.set_xlim(0, 1.45 * max(own_widths, default=0) or 1)
        axes.grid(axis="y", visible=False)
        axes.tick_params("y", length=0)
    for axes in (size, rate, panels[3]) if both else (size, rate):
        axes.set_yticks(range(len(bars)), [style.plain(n) for n in names], fontsize=6.5)
    size.set_ylim(len(bars) - 0.4, -0.6)
    strategies = sorted({one.strategy for one in bars}, key=rank_of)
    style.legend(
        figure, [Patch(color=style.look(s)[0], label=style.plain(s)) for s in strategies], columns=3
    )
    scaled = SPEED_OF_SCALE_MODEL if is_scale_model(frame(own)) else ""
    error_text = DECODE_TEXT if both else ERROR_TEXT
    style.badge(figure, HELD_TEXT, error_text, ATTENTION_ONLY, scaled)
    return figure


def _held(part: pd.DataFrame) -> tuple[float, str]:
    """Return the most tokens held, in millions, and ``→`` where nothing refused more."""
    most = part["resident_tokens"].max()
    if not known(most) or most <= 0:
        return float("nan"), ""
    refused = part["status"].isin(["oom", "refused"]) & part["resident_tokens"].gt(0)
    return most / 1e6, "" if refused.any() else " →"


def _names(bars: list[Series]) -> list[str]:
    """Return the labels without a strategy that all of them share."""
    several = len({one.strategy for one in bars}) > 1
    short = [one.label.removeprefix(f"{one.strategy}, ") for one in bars]
    return [one.label for one in bars] if several else short


def _bar(axes: Axes, y: float, one: Series, value: float, mark: str = "") -> float:
    text = (figure_of(value, 3) if value > LEAST else f"< {LEAST}") + mark
    text = text if known(value) else "not timed"
    if not known(value) and one.rows["status"].ne("ok").all():
        text = str(one.rows["status"].iloc[0])
    return style.figured_bar(axes, y, value, text, style.look(one.strategy)[0])
