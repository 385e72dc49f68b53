"""What the engines themselves hold at start-up, each beside its emulation with the same flags."""

from __future__ import annotations

from dataclasses import dataclass

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

NOTE_SIZE, LINE = 5.5, 0.5  # a further line of a note, in rows
REACH = 1.9  # of the longest bar: notes stand behind them
BESIDE_AXES_POINTS = 12.0  # of a column's width, without the ticks' labels

LEFT_OUT_TEXT = "Not drawn: {} starts at other contexts, with other flags, or repeated."


@dataclass(frozen=True)
class Bar:
    """A start: GiB by item, GiB that were asked for in vain, where the bar ends, what is said."""

    held: dict[str, float]
    asked: float
    end: float
    said: str
    alpha: float

    @property
    def note(self) -> str:
        """What stands behind the bar."""
        return f"{self.end:.1f}{self.said}"


Pair = tuple[str, list[Bar]]


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
    panels = [(model, _pairs(part, emulated, events)) for model, part in by_model(real)]
    pairs = [pair for _, found in panels for pair in found]
    names = [line for label, _ in pairs for line in label.split("\n")]
    beside = max(style.text_points(name, NOTE_SIZE) for name in names) + BESIDE_AXES_POINTS
    device = (real["capacity_bytes"].dropna() / GIB).unique()
    reach = REACH * max([*(bar.end for _, bars in pairs for bar in bars), *device])
    notes = Notes(max(device, default=0.0), reach, 72 * style.WIDTH_INCHES - beside)
    heights = [sum(_height(bars, notes) for _, bars in found) + 0.6 for _, found in panels]
    figure = style.new_figure(
        0.95 + 0.27 * sum(heights) + 0.2 * len(panels),
        len(panels),
        sharex=True,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, (model, found) in zip(figure.axes, panels, strict=True):
        _panel(axes, found, notes)
        axes.set_title(style.plain(f"{model or 'any'} model, one rank"), loc="left")
        for value in device:
            axes.axvline(value, color="black", linewidth=1, linestyle=(0, (4, 2)))
    figure.axes[-1].set_xlim(0, reach)
    used = {name for _, bars in pairs for bar in bars for name in bar.held}
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
    twins = any(len(bars) > 1 for _, bars in pairs)
    style.badge(
        figure,
        f"Upper bars: {started}, started. Lower, pale: their emulations."
        if twins
        else f"{started}, started themselves.",
        LEFT_OUT_TEXT.format(left_out) if left_out else "",
    )
    return figure


def _pairs(part: pd.DataFrame, emulated: pd.DataFrame, events: pd.DataFrame) -> list[Pair]:
    """Each start with its emulation, by engine, context and flags."""
    found: list[Pair] = []
    order = part.assign(_flags=part["strategy_options"].map(lambda v: len(flags_text(v))))
    order = order.sort_values(["strategy", "context_tokens", "_flags"], kind="stable")
    for _, row in order.iterrows():
        same = emulated
        for column in ("strategy", "model", "context_tokens", "strategy_options"):
            same = same[same[column] == row[column]]
        label = f"{row['strategy']} {tokens(row['context_tokens'])}"
        bars = [
            _bar(row, events, 1.0),
            *(_bar(twin, events, 0.45) for _, twin in same[:1].iterrows()),
        ]
        found.append((f"{label}\n{flags_text(row['strategy_options'])}", bars))
    return found


def _bar(row: pd.Series, events: pd.DataFrame, alpha: float) -> Bar:
    """Return what a start held, or asked for."""
    held = {k: v / GIB for k, v in items_of(row, events).items()}
    rest = row["unexplained_bytes"] / GIB
    if row["engine_version"] and rest > 0:
        held[NOT_NAMED] = rest
    end = sum(held.values())
    if row["status"] == "ok":
        return Bar(held, 0.0, end, "", alpha)
    said = f"  {row['status']}"
    if row["status"] == "crash":  # with everything allocated
        end = max(end, row["peak_device_bytes"] / GIB)
    else:
        said += f": {row['oom_allocation'] or row['oom_phase']}"
    asked = row["oom_requested_bytes"] / GIB if row["oom_requested_bytes"] > 0 else 0.0
    return Bar(held, asked, end + asked, said, alpha)


@dataclass(frozen=True)
class Notes:
    """Where notes stand: clear of the device's line, within ``reach`` GiB on ``width`` points."""

    device_gib: float
    reach: float
    width: float

    def of(self, bar: Bar) -> tuple[float, list[str]]:
        """Return where a bar's note begins, and its lines."""
        line = self.device_gib
        text_gib = style.text_points(bar.note, NOTE_SIZE) * self.reach / self.width
        at = line if bar.end < line < bar.end + text_gib + 2 else bar.end
        return at, style.broken(bar.note, self.width * (1 - at / self.reach), NOTE_SIZE)


def _height(bars: list[Bar], notes: Notes) -> float:
    """Return the rows that a pair takes, with the room to the next."""
    return GAP + sum(_pitch(notes.of(bar)[1]) for bar in bars)


def _pitch(lines: list[str]) -> float:
    return NEXT + LINE * (len(lines) - 1)


def _panel(axes: Axes, pairs: list[Pair], notes: Notes) -> None:
    """Draw the pairs of a model, each bar's note behind it."""
    y, ticks = 0.0, []
    for label, bars in pairs:
        places = []
        for bar in bars:
            at, lines = notes.of(bar)
            places.append(y + (_pitch(lines) - NEXT) / 2)
            _draw(axes, places[-1], bar)
            style.bar_note(axes, at, places[-1], "\n".join(lines), bool(bar.said), NOTE_SIZE)
            y += _pitch(lines)
        ticks.append((sum(places) / len(places), label))
        y += GAP
    axes.set_yticks([at for at, _ in ticks], [style.plain(t) for _, t in ticks], fontsize=NOTE_SIZE)
    axes.tick_params("y", length=0)
    axes.set_ylim(y - GAP + 0.1, -0.4)
    axes.grid(axis="y", visible=False)


def _draw(axes: Axes, y: float, bar: Bar) -> None:
    """Draw one stacked bar."""
    left = 0.0
    for name, colour in COLOURS.items():
        axes.barh(y, bar.held.get(name, 0), BAR, left, color=colour, alpha=bar.alpha, zorder=2)
        left += bar.held.get(name, 0)
    if bar.asked:
        style.failed_bar(axes, y, bar.asked, bar.end - bar.asked, BAR)
