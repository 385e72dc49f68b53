"""The tables of a run: its trials, its OOM points, its verdicts, the planner beside the meters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pandas as pd

from harness.phases import place_name
from harness.ranks_summary import on_rank
from harness.runs import clean, dicts, frame, lookup, trials
from harness.series import is_scale_model, points, scale, series
from harness.sources import Sources, first_of
from harness.tabular import (
    EMPTY,
    Table,
    figure_of,
    gib,
    known,
    percent,
    scaled_bytes,
    tokens,
)

SCALE_NOTE = (
    "Scale model: MiB are its own bytes, GiB those of the modelled device (x {scale}). "
    "OOM points transfer to the modelled device, speeds do not."
)
SPEED_NOTE = "Throughput is attention only: all layers' decode or prefill kernels of one rank."
ENDINGS = {
    "oom": "out of memory",
    "refused": "refused by the strategy's own rule",
    "crash": "a crash of the engine itself",
    "sweep_end": "end of the sweep, no failure",
    "": "unknown, since a trial died",
}


def sweep_table(rows: pd.DataFrame) -> str:
    """Return the trials of a sweep for a terminal: context, fill, end, tokens, bytes, speed."""
    return untitled(sweep(rows)).text({"where": 26})


def oom_points_table(summary: dict[str, Any]) -> str:
    """Return the three OOM brackets of every strategy for a terminal."""
    return untitled(oom_points(summary)).text()


def verdict_table(summary: dict[str, Any]) -> str:
    """Return the verdict on every claim for a terminal."""
    widths = {"condition": 48, "claim": 30, "measured": 18, "reported": 12, "basis": 20}
    return untitled(verdicts(summary)).text(widths)


def sweep(rows: pd.DataFrame, *, each: bool = False) -> Table:
    """Return the trials, without those that only close a bracket (counted in a note).

    Parameters
    ----------
    rows : pandas.DataFrame
    each : bool
        A line a trial with its id; else a line a cell, with the median over its repeats.
    """
    every = trials(rows)
    own = points(every)
    lines, anchors = [], []
    for one in series(own, leave=("model",)):
        label = one.sized_label
        keys = ["model", "context_tokens", "fill", "status", "oom_phase", "oom_allocation"]
        keys.append("failed_rank")
        if each:
            keys.append("repeat")
        for _, group in one.rows.groupby(keys, dropna=False, sort=True):
            for row in [r for _, r in group.iterrows()] if each else [_median(group)]:
                lines.append(_sweep_cells(label, row, row["trial_id"] if each else len(group)))
                anchors.append(row["trial_id"] if each else "")
    columns = (
        "trial" if each else ">trials",
        "strategy",
        "model",
        ">context",
        ">fill",
        "status",
        "where",
        ">failed rank",
        ">resident tokens",
        *(f">{name}" for name in ("KV committed", "peak")),
        ">decode tok/s",
        ">prefill tok/s",
    )
    if not each and all(row[0] == "1" for row in lines):
        columns, lines = columns[1:], [row[1:] for row in lines]
    notes = _sweep_notes(own, len(every) - len(own), any(r[-1] + r[-2] != 2 * EMPTY for r in lines))
    table = Table("Trials", columns, tuple(lines), notes, tuple(anchors))
    return without_empty(table, keep=("strategy", ">context", "status", ">resident tokens"))


def _median(group: pd.DataFrame) -> pd.Series:
    row = group.iloc[0].copy()
    numbers = group.select_dtypes("number").median()
    row[numbers.index] = numbers
    return row


def _sweep_notes(own: pd.DataFrame, left_out: int, timed: bool) -> tuple[str, ...]:
    notes = _failures(own)
    if timed:
        notes.append(SPEED_NOTE)
    if is_scale_model(own):
        notes.append(SCALE_NOTE.format(scale=" or ".join(f"{s:g}" for s in scale(own).unique())))
    if left_out:
        notes.append(f"{left_out} further trials close the brackets of the OOM points.")
    return tuple(notes)


def _failures(own: pd.DataFrame) -> list[str]:
    """Return a sentence a failed cell: what was asked for, and what was free.

    Of a trial of several ranks that no limit of memory ended, what did.
    """
    out: dict[str, None] = {}
    for one in series(own):
        for _, row in one.rows[one.rows["status"] != "ok"].iterrows():
            where = place_name(row["oom_phase"], row["oom_allocation"])
            if known(row["oom_requested_bytes"]):
                said = (
                    f"asked {scaled_bytes(row['oom_requested_bytes'], row['scale'])}, free "
                    f"{scaled_bytes(row['oom_free_bytes'], row['scale'])}, "
                    f"{count(row['resident_tokens'])} tokens resident."
                )
            elif row["world_size"] > 1 and row["error"]:
                said = f"{row['error']}."
            else:
                continue
            text = (
                f"{one.sized_label} at {tokens(row['context_tokens'])}, "
                f"fill {percent(row['fill'])}: "
                f"{row['status']}{on_rank(row)} in {where or 'no phase that is known'}: {said}"
            )
            out[text] = None
    return list(out)


def _sweep_cells(label: str, row: pd.Series, first: object) -> tuple[str, ...]:
    factor = row["scale"]
    where = place_name(row["oom_phase"], row["oom_allocation"]) or EMPTY
    return (
        str(first),
        label,
        row["model"] or EMPTY,
        tokens(row["context_tokens"]),
        percent(row["fill"]),
        row["status"] + (f" {row['signal']}" if row["signal"] else ""),
        where,
        on_rank(row).removeprefix(" on rank ") or EMPTY,
        f"{row['resident_tokens']:,.0f}" if known(row["resident_tokens"]) else EMPTY,
        scaled_bytes(row["kv_committed_bytes"], factor),
        scaled_bytes(row["peak_device_bytes"], factor),
        figure_of(row["attention_decode_tokens_per_second"]),
        figure_of(row["attention_prefill_tokens_per_second"]),
    )


def untitled(table: Table) -> Table:
    """Return the table without its title, for a terminal that prints its own."""
    return replace(table, title="")


def without_empty(table: Table, keep: tuple[str, ...] = ()) -> Table:
    """Return the table without columns that say nothing: all empty, or one model all along."""
    wanted = [
        i
        for i, name in enumerate(table.columns)
        if name in keep
        or (
            any(row[i] not in (EMPTY, "") for row in table.rows)
            and (name != "model" or len({row[i] for row in table.rows}) > 1)
        )
    ]
    return replace(
        table,
        columns=tuple(table.columns[i] for i in wanted),
        rows=tuple(tuple(row[i] for i in wanted) for row in table.rows),
    )


def oom_points(summary: dict[str, Any], rows: pd.DataFrame | None = None) -> Table:
    """Return a line a strategy and OOM point: [largest ok, smallest not ok], how it ended.

    With rows a column names the trials of both ends.
    """
    sources = None if rows is None else Sources(rows)
    meaning = {
        "startup": "start-up (reaches ready)",
        "admit": "admit (full context accepted)",
        "resident": "resident (filled until refusal)",
    }
    lines = []
    for name, one in strategies(summary):
        for key, text in meaning.items():
            bracket = lookup(one, key)
            if not bracket or (lookup(bracket, "ok") is None and not lookup(bracket, "not_ok")):
                continue
            ended = clean(lookup(bracket, "limited_by", default=""))
            ok, not_ok = lookup(bracket, "ok"), lookup(bracket, "not_ok")
            line = [name, text, count(ok), count(not_ok), ENDINGS.get(ended, ended or EMPTY)]
            if sources is not None:
                ends = [sources.end(name, key, ok, True), sources.end(name, key, not_ok, False)]
                shown = dict.fromkeys(first_of(found, 2) for found in ends if found)
                line.append("; ".join(shown) or EMPTY)
            lines.append(tuple(line))
    columns = ["strategy", "point", ">largest ok", ">smallest not ok", "ended by"]
    columns += [] if sources is None else ["trials"]
    notes = ("Tokens of one sequence's context (start-up, admit) or stored in it (resident).",)
    return Table("OOM points, tokens", tuple(columns), tuple(lines), notes)


def verdicts(summary: dict[str, Any]) -> Table:
    """Return a line a claim: verdict, condition, basis, measured beside reported figure."""
    lines = tuple(
        (
            clean(lookup(c, "id", default="")),
            clean(lookup(c, "claim", default="") or lookup(c, "text", default="")) or EMPTY,
            clean(lookup(c, "verdict", default="")) or EMPTY,
            with_unit(c),
            value(lookup(c, "reported")),
            clean(lookup(c, "basis", default="")) or EMPTY,
            clean(lookup(c, "condition", default="")) or EMPTY,
        )
        for c in dicts(summary, "claims")
    )
    columns = ("id", "claim", "verdict", "measured", "reported", "basis", "condition")
    return without_empty(
        Table("Verdicts on the report's claims", columns, lines), keep=("id", "verdict")
    )


def verdict_sources(summary: dict[str, Any]) -> Table:
    """Return a line a claim that rests on rows: their trials, all of them."""
    lines = tuple(
        (clean(lookup(c, "id", default="")), str(len(found)), " ".join(found))
        for c in dicts(summary, "claims")
        if (found := claim_trials(c))
    )
    notes = (
        "A claim that is not listed rests on arithmetic, on the planner or on a source alone.",
    )
    return Table("Trials behind the verdicts", ("id", ">trials", "trial"), lines, notes)


def claim_trials(claim: dict[str, Any]) -> list[str]:
    """Return the ids of the trials that carry a verdict."""
    found = lookup(claim, "trials", default=[])
    return [clean(t) for t in found] if isinstance(found, list) else []


def with_unit(claim: dict[str, Any], key: str = "measured") -> str:
    """Return what was measured, or reported, for a claim, with its unit."""
    text, unit = value(lookup(claim, key)), clean(lookup(claim, "unit", default=""))
    if text == EMPTY or not unit:
        return text
    return f"{text} ({unit})" if " " in unit else f"{text} {unit}"


def planner(rows: pd.DataFrame, *, each: bool = False) -> Table:
    """Return the planner's prediction beside the measurement for every trial that has both.

    With ``each`` a column names the trial: the first of those that give the same line.
    """
    own = points(rows)
    lines, anchors = [], []
    for _, row in own[own["predicted_peak_bytes"].notna()].iterrows():
        measured, expected = row["peak_device_bytes"], row["predicted_peak_bytes"]
        if row["status"] != "ok" or not known(measured):
            continue
        lines.append(
            (
                row["strategy"],
                tokens(row["context_tokens"]),
                percent(row["fill"]),
                gib(expected * (row["scale"] if known(row["scale"]) else 1)),
                gib(measured * (row["scale"] if known(row["scale"]) else 1)),
                _difference(measured, expected),
                row["predicted_off_by"] or EMPTY,
            )
        )
        anchors.append(row["trial_id"])
    columns = (
        "strategy",
        ">context",
        ">fill",
        ">predicted peak",
        ">measured peak",
        ">difference",
        "largest difference in",
    )
    note = ("Bytes of the modelled device.",) if is_scale_model(frame(rows)) else ()
    first = dict(reversed(list(zip(lines, anchors, strict=True))))
    kept = tuple(dict.fromkeys(lines))
    ids = tuple(first[k] for k in kept)
    table = Table("Planner beside measurement", columns, kept, note, ids)
    table = without_empty(table, keep=columns[:6])
    if not each:
        return table
    named = tuple((trial, *line) for trial, line in zip(ids, table.rows, strict=True))
    return replace(table, columns=("trial", *table.columns), rows=named)


def count(value: object) -> str:
    """Tokens with all their digits."""
    return f"{value:,.0f}" if isinstance(value, (int, float)) and known(value) else EMPTY


def value(item: object) -> str:
    """Return a claim's figure as text; a mapping as ``key: value`` pairs."""
    if isinstance(item, dict):
        return "; ".join(f"{clean(k)}: {value(v)}" for k, v in item.items())
    if isinstance(item, (list, tuple)):
        return "; ".join(value(v) for v in item)
    if isinstance(item, bool) or item is None:
        return EMPTY if item is None else ("yes" if item else "no")
    if isinstance(item, (int, float)):
        return count(item) if float(item).is_integer() or abs(item) >= 1e4 else f"{item:.4g}"
    return clean(item) or EMPTY


def strategies(summary: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the strategies of a summary by name, whatever a stranger wrote there."""
    found = lookup(summary, "strategies", default={})
    if not isinstance(found, dict):
        return []
    return [(clean(k), v) for k, v in found.items() if isinstance(v, dict)]


def _difference(measured: float, expected: float) -> str:
    """Return how far a measurement lies from what was expected, ``+0.12 %``."""
    if not expected:
        return EMPTY
    text = f"{100 * (measured / expected - 1):+.2f} %"
    return text if float(text.removesuffix(" %")) else "0.00 %"
