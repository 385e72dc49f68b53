"""Memory over a trial's phases."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.phases import PHASES, SIZED_PHASES, phase_name
from harness.plots_memory import SCALE_TEXT
from harness.runs import frame
from harness.series import by_model, is_scale_model, points, rank_of, series
from harness.sizes import GIB
from harness.tabular import percent, tokens

# What the rows that one process writes have in common.
PROCESS = (
    "strategy",
    "model",
    "strategy_options",
    "context_tokens",
    "repeat",
    "purpose",
    "rank",
    "workload",
    "sequences",
    "kv_dtype",
    "page_tokens",
    "chunk_bytes",
    "arena",
    "table_order",
    "world_size",
    "emulated_ranks",
    "capacity_bytes",
)
TITLE_POINTS = 200.0  # of a column's width, beside the axis' labels
BARS_TEXT = "A bar: what is held at the end of the phase, or was asked for in it."
COMPONENT_OF_PHASE = {"pool": "KV", "fill": "KV"} | {p: p for p in SIZED_PHASES}


@style.styled
def figure_phases(rows: pd.DataFrame, timeline: pd.DataFrame) -> Figure:
    """Draw memory at the end of each phase, stacked, of the trials that :func:`top_trials` picks.

    Parameters
    ----------
    rows, timeline : pandas.DataFrame
        Where a trial has no ledger events, its row gives one bar: the end.

    Returns
    -------
    matplotlib.figure.Figure
        One panel a strategy and model. What a failed phase asked for is hatched.
    """
    events = whole_ledgers(frame(rows), frame_timeline(timeline))
    chosen = top_trials(rows, events)
    figure = style.new_figure(0.6 + 1.45 * len(chosen), len(chosen), sharex=True, sharey=True)
    stacks = [stack_of(row, events) for _, row in chosen]
    seen = {p for stack in stacks for p in stack.index}
    seen |= {r["oom_phase"] for _, r in chosen if r["oom_phase"] and seen - {"end"}}
    names = [p for p in PHASES if p in seen] + sorted(seen - set(PHASES))
    for axes, (label, row), stack in zip(figure.axes, chosen, stacks, strict=True):
        _phase_bars(axes, label, row, stack, names)
    figure.axes[0].set_ylim(0, figure.axes[0].get_ylim()[1] * 1.12)
    used = {c for axes in figure.axes for c in axes.get_legend_handles_labels()[1]}
    handles = [
        Patch(color=c, label=phase_name(n)) for n, c in style.COMPONENTS.items() if n in used
    ]
    handles.append(
        Patch(facecolor="white", edgecolor="black", hatch="////", label="asked, refused")
    )
    style.legend(figure, handles, columns=3)
    own = pd.DataFrame([row for _, row in chosen])
    style.badge(figure, BARS_TEXT, SCALE_TEXT if is_scale_model(own) else "")
    return figure


def top_trials(rows: pd.DataFrame, timeline: pd.DataFrame) -> list[tuple[str, pd.Series]]:
    """Return each curve's trial of the largest context and fill, and the largest that ended well.

    Of trials that asked the same, one that ended well goes before one that did not, and one whose
    events are there before one without.
    """
    out = []
    have_events = set(timeline["trial_id"])
    for _, part in by_model(points(rows)):
        for one in series(part):
            order = one.rows.assign(
                _ok=one.rows["status"] == "ok", _events=one.rows["trial_id"].isin(have_events)
            ).sort_values(["context_tokens", "fill", "_ok", "_events"], kind="stable")
            ok = order[order["_ok"]]
            if not ok.empty and not order["_ok"].iloc[-1]:
                out.append((one.label, ok.iloc[-1]))
            out.append((one.label, order.iloc[-1]))
    several = len({row["model"] for _, row in out}) > 1
    named = [(f"{label}, {row['model']}" if several else label, row) for label, row in out]
    return sorted(named, key=lambda pair: (pair[1]["model"], rank_of(pair[1]["strategy"])))


def frame_timeline(timeline: pd.DataFrame) -> pd.DataFrame:
    """Return ledger events in their kinds."""
    return frame(timeline, TIMELINE_COLUMNS)


def whole_ledgers(rows: pd.DataFrame, timeline: pd.DataFrame) -> pd.DataFrame:
    """Return the events with each trial's start-up before them.

    A process that fills through several lengths writes a row at each, and its start-up's events
    under the first of them; to the later rows they belong as well.
    """
    started = set(timeline.loc[timeline["phase"] == "context", "trial_id"])
    by_trial = dict(list(timeline.groupby("trial_id", sort=False)))
    out: list[pd.DataFrame] = []
    for _, group in rows.groupby(list(PROCESS), dropna=False, sort=False):
        before: list[pd.DataFrame] = []
        for trial in dict.fromkeys(group.sort_values("fill", kind="stable")["trial_id"]):
            own = [by_trial[trial]] if trial in by_trial else []
            if trial in started:
                before = []
            out += [one.assign(trial_id=trial) for one in before] + own
            before = before + own
    return pd.concat(out) if out else timeline


def ledger_of(row: pd.Series, timeline: pd.DataFrame) -> pd.DataFrame:
    """Return the events of a row's trial, of its own rank where several wrote.

    Of a trial that failed, those up to its peak: what it gave back afterwards was held when it
    failed.
    """
    events = timeline[(timeline["trial_id"] == row["trial_id"]) & (row["trial_id"] != "")]
    if events["rank"].notna().any():
        events = events[events["rank"].fillna(0) == (row["rank"] if row["rank"] > 0 else 0)]
    if row["status"] != "ok" and not events.empty:
        held = events["event_bytes"].fillna(0).cumsum().to_numpy()
        events = events.iloc[: int(held.argmax()) + 1]
    return events


def stack_of(row: pd.Series, timeline: pd.DataFrame) -> pd.DataFrame:
    """Return a trial's bytes by phase (index, in order) and component (columns), own bytes.

    From its ledger events, each component the running sum of its events' bytes; without events
    one line, ``end``, from the row's columns.
    """
    events = ledger_of(row, timeline)
    if events.empty:
        end = {c: row[f"{c}_bytes"] for c in SIZED_PHASES} | {"KV": row["kv_committed_bytes"]}
        table = pd.DataFrame([end], index=["end"]).fillna(0)
        return table.loc[:, table.iloc[0] != 0]
    component = events["phase"].map(COMPONENT_OF_PHASE).fillna("other")
    order = list(dict.fromkeys(events["phase"]))
    sums = events["event_bytes"].fillna(0).groupby([events["phase"], component]).sum()
    table = sums.unstack(fill_value=0).reindex(order).fillna(0).cumsum()
    return table[[c for c in style.COMPONENTS if c in table and table[c].abs().max() > 0]]


def _phase_bars(
    axes: Axes, label: str, row: pd.Series, stack: pd.DataFrame, phases: list[str]
) -> None:
    factor = (row["scale"] if row["scale"] > 0 else 1) / GIB
    if row["status"] == "ok" and "end" not in phases:
        stack = stack.reindex(phases).ffill()  # a phase that allocates nothing keeps what is held
    names = list(stack.index)
    axes.bar(phases, [0] * len(phases))
    failed = row["oom_phase"] if row["status"] != "ok" and row["oom_requested_bytes"] > 0 else ""
    failed = "end" if failed and names == ["end"] else failed
    if failed and failed not in names:
        names.append(failed)
        stack = stack.reindex(names).ffill().fillna(0)
    bottom = pd.Series(0.0, index=names)
    for component in stack:
        height = stack[component] * factor
        axes.bar(
            names,
            height,
            0.75,
            bottom,
            color=style.COMPONENTS[component],
            label=component,
            zorder=2,
        )
        bottom = bottom + height
    if failed:
        asked = row["oom_requested_bytes"] * factor
        axes.bar(
            [failed],
            [asked],
            0.75,
            [bottom[failed]],
            facecolor="white",
            hatch="////",
            edgecolor="black",
            linewidth=0.6,
            zorder=2,
        )
        bottom[failed] += asked
    _bar_totals(axes, phases, bottom)
    if row["capacity_bytes"] > 0:
        style.capacity_line(axes, row["capacity_bytes"] * factor)
    fill = "" if pd.isna(row["fill"]) else f", fill {percent(row['fill'])}"
    end = (
        ""
        if row["status"] == "ok"
        else f": {style.ENDS.get(row['status'], ('', row['status']))[1]}"
    )
    title = f"{label}, {tokens(row['context_tokens'])}{fill}{end}"
    lines = style.broken(title, TITLE_POINTS, style.TEXT_SIZE)
    axes.set_title(style.plain("\n".join(lines)), loc="left")
    axes.set_ylabel("held, GiB")
    axes.grid(axis="x", visible=False)


def _bar_totals(axes: Axes, phases: list[str], tops: pd.Series) -> None:
    for name, top in tops.items():
        axes.annotate(
            f"{top:.3g}",
            (phases.index(str(name)), top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            fontsize=6,
            bbox=style.WHITE_BOX | {"pad": 0.1},
        )
    missing = [i for i, name in enumerate(phases) if name not in tops.index]
    if missing:
        axes.text(sum(missing) / len(missing), 4, "never reached", ha="center", fontsize=6.5)
    names = [phase_name(p) for p in phases]
    look: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(phases)), names, fontsize=6, **look)  # each ends at its bar
