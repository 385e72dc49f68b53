"""What the engines themselves hold at start-up, each beside its emulation with the same flags."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from harness import style
from harness.plots_engines import ITEMS, items_of
from harness.plots_phases import frame_timeline
from harness.runs import trials
from harness.series import by_model, options_of
from harness.sizes import GIB
from harness.tabular import tokens

CONTEXTS = (131_072, 10_000_000)
# Flags that are drawn: defaults, and those that help.
HELPING = {"": "default flags", "max_running_requests": "requests", "max_num_seqs": "sequences"}
NOT_NAMED = "not named"
COLOURS = ITEMS | {NOT_NAMED: "#E4E4E4"}
# Where the bars of a pair stand, the height of each, and the room to the next pair.
BAR, NEXT, GAP = 0.42, 0.46, 0.35

LEFT_OUT_TEXT = "Not drawn: {} starts at other contexts, with other flags, or repeated."

Pair = tuple[str, pd.Series, pd.Series | None]


def drawable(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the starts of engines that the figure shows: its contexts, its flags, one repeat."""
    every = trials(rows)
    real = every[(every["engine_version"] != "") & every["context_tokens"].isin(CONTEXTS)]
    real = real[real["purpose"] != "bracket"]
    shown = [flags_text(v) != "" for v in real["strategy_options"]]
    keys = ["model", "strategy", "context_tokens", "strategy_options"]
    return real[shown].drop_duplicates(keys)


def flags_text(options: object) -> str:
    """Name a start's flags: defaults, or the one that helps; ``""`` for any other choice."""
    known = ("version", "page_size", "block_size")
    found = {k: v for k, v in options_of(options).items() if v not in ("", "False")}
    found = {k: v for k, v in found.items() if k not in known}
    if not found:
        return HELPING[""]
    if len(found) == 1 and (key := next(iter(found))) in HELPING:
        return f"{key}={found[key]}"
    return ""


@style.styled
def figure_real_engines(rows: pd.DataFrame, timeline: pd.DataFrame) -> Figure:
    """Draw what each engine held when it was ready, or asked for when it was not.

    Parameters
    ----------
    rows : pandas.DataFrame
        Starts of engines (``engine_version`` filled) and their emulations.
    timeline : pandas.DataFrame
        The items of both.

    Returns
    -------
    matplotlib.figure.Figure
        A panel a model; a pair of bars a start: the engine itself above its emulation. What failed
        is hatched, at the size that was asked for, and named.
    """
    real, events = drawable(rows), frame_timeline(timeline)
    every = trials(rows)
    emulated = every[(every["engine_version"] == "") & (every["emulated_version"] != "")]
    panels = [(model, _pairs(part, emulated)) for model, part in by_model(real)]
    heights = [len(found) + 0.6 for _, found in panels]
    figure = style.new_figure(
        0.95 + 0.27 * sum(heights) + 0.2 * len(panels),
        len(panels),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    used: set[str] = set()
    for axes, (model, found) in zip(figure.axes, panels, strict=True):
        used |= _panel(axes, found, events)
        axes.set_title(style.plain(f"{model or 'any'} model, one rank"), loc="left")
        for value in real["capacity_bytes"].dropna().unique():
            axes.axvline(value / GIB, color="black", linewidth=1, linestyle=(0, (4, 2)))
    figure.axes[-1].set_xlabel("held, or asked for, GiB of one GPU")
    handles: list[Patch | Line2D] = [
        Patch(color=c, label=n) for n, c in COLOURS.items() if n in used
    ]
    handles += [
        Patch(facecolor="white", edgecolor="black", hatch="////", label="failed or refused"),
        Line2D([], [], color="black", ls=(0, (4, 2)), label="device"),
    ]
    style.legend(figure, handles, columns=3)
    versions = real.groupby("strategy")["engine_version"].first()
    started = ", ".join(f"{name} {version}" for name, version in versions.items())
    starts = every[(every["engine_version"] != "") & (every["purpose"] != "bracket")]
    left_out = len(starts) - len(real)
    twins = any(twin is not None for _, found in panels for *_, twin in found)
    style.badge(
        figure,
        f"Upper bars: {started}, started. Lower, pale: their emulations."
        if twins
        else f"{started}, started themselves.",
        LEFT_OUT_TEXT.format(left_out) if left_out else "",
    )
    return figure


def _pairs(part: pd.DataFrame, emulated: pd.DataFrame) -> list[Pair]:
    """Each start with its emulation, by engine, context and flags."""
    found: list[Pair] = []
    order = part.assign(_flags=part["strategy_options"].map(lambda v: len(flags_text(v))))
    order = order.sort_values(["strategy", "context_tokens", "_flags"], kind="stable")
    for _, row in order.iterrows():
        same = emulated
        for column in ("strategy", "model", "context_tokens", "strategy_options"):
            same = same[same[column] == row[column]]
        label = f"{row['strategy']} {tokens(row['context_tokens'])}"
        twin = same.iloc[0] if len(same) else None
        found.append((f"{label}\n{flags_text(row['strategy_options'])}", row, twin))
    return found


def _panel(axes: Axes, pairs: list[Pair], events: pd.DataFrame) -> set[str]:
    """Draw the pairs of a model; returns the items that there are."""
    y, ticks, used, reach = 0.0, [], set[str](), 0.0
    for label, real, twin in pairs:
        ticks.append((y + (NEXT / 2 if twin is not None else 0), label))
        for row, alpha in ((real, 1.0), (twin, 0.45)):
            if row is None:
                continue
            held = {k: v / GIB for k, v in items_of(row, events).items()}
            rest = row["unexplained_bytes"] / GIB
            if row["engine_version"] and rest > 0:
                held[NOT_NAMED] = rest
            used |= set(held)
            reach = max(reach, _bar(axes, y, held, row, alpha))
            y += NEXT
        y += GAP
    axes.set_yticks([at for at, _ in ticks], [style.plain(t) for _, t in ticks], fontsize=5.5)
    axes.tick_params("y", length=0)
    axes.set_ylim(y - GAP + 0.1, -0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, max(axes.get_xlim()[1], reach * 1.7))
    return used


def _bar(axes: Axes, y: float, held: dict[str, float], row: pd.Series, alpha: float) -> float:
    """Draw one stacked bar and say where it ends, and why; returns its end."""
    left = 0.0
    for name, colour in COLOURS.items():
        axes.barh(y, held.get(name, 0), BAR, left, color=colour, alpha=alpha, zorder=2)
        left += held.get(name, 0)
    said = ""
    if row["status"] != "ok":
        asked = max(row["oom_requested_bytes"] / GIB, 0.0)
        said = f"  {row['status']}"
        if row["status"] == "crash":  # with everything allocated
            left = max(left, row["peak_device_bytes"] / GIB)
        else:
            said += f": {row['oom_allocation'] or row['oom_phase']}"
        if asked > 0:
            axes.barh(y, asked, BAR, left, fc="white", hatch="////", ec="black", lw=0.5, zorder=2)
            left += asked
    style.bar_note(axes, left, y, f"{left:.1f}{said}", bool(said), 5.5)
    return left
