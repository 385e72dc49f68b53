"""Checks of a folder's numbers: do they repeat, follow from samples, agree with the planner."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.check_rules import Result, failed, named, not_applicable, passed
from harness.columns import COLUMNS
from harness.runs import Run, RunError, trials
from harness.series import is_scale_model
from harness.tabular import known
from harness.timing import Samples

TIMES = ("attention_decode_step_ms", "attention_prefill_chunk_ms")
# What was sampled: the columns of its median, of its interquartile range ("": none) and of the
# number of samples.
SAMPLED = {
    "decode": ("attention_decode_step_ms", "attention_decode_step_ms_iqr", "decode_samples"),
    "prefill": ("attention_prefill_chunk_ms", "", "prefill_samples"),
    "decode_all_ranks": (
        "parallel_decode_step_ms",
        "parallel_decode_step_ms_iqr",
        "parallel_decode_samples",
    ),
    "collectives": ("collective_ms", "collective_ms_iqr", "collective_samples"),
}
REPEATABILITY = 0.02
PLANNER_TOLERANCE = 0.01
SAMPLES_TOLERANCE = 1e-6
# What makes two trials repeats of one another: everything but these.
ALSO_OF_A_CELL = (
    "purpose",
    "strategy_options",
    "growth",
    "release",
    "hybrid",
    "read_weights",
    "fault",
    "parallel",
    "context_ranks",
    "trace_file",
)
NOT_OF_A_CELL = {"run_id", "trial_id", "pair_id", "repeat", "started_utc", "seed"}


def repeatability(run: Run) -> Result:
    """Check that repeats of a cell agree: speeds within 2 %, peak memory within one chunk."""
    rows = trials(run.rows)
    rows = rows[rows["status"] == "ok"]
    columns = (*COLUMNS[: COLUMNS.index("status")], *ALSO_OF_A_CELL)
    keys = [c for c in dict.fromkeys(columns) if c not in NOT_OF_A_CELL]
    faults, compared, timed, worst = [], 0, 0, 0.0
    for _, group in rows.groupby(keys, dropna=False):
        if len(group) < 2:
            continue
        compared += 1
        peaks = group["peak_device_bytes"]
        if peaks.max() - peaks.min() > grain_bytes(group).max():
            faults.append(f"peak memory differs by more than a chunk: {named(group)}")
        timed += (group[list(TIMES)].count() > 1).any()
        if is_scale_model(group):
            continue
        for column in TIMES:
            values = group[column].dropna()
            if len(values) > 1:
                spread = (values.max() - values.min()) / values.median()
                worst = max(worst, spread)
                if spread > REPEATABILITY:
                    faults.append(f"{column} spreads {100 * spread:.1f} %: {named(group)}")
    if faults:
        return failed("; ".join(faults[:3]))
    if not compared:
        return not_applicable("no cell ran twice and ok")
    memory = f"peak memory of {compared} cells that ran again is within a chunk"
    if not timed:
        return not_applicable(f"no timed cell ran twice; {memory}")
    if is_scale_model(rows):
        return passed(f"{memory}; speeds of a scale model are not judged")
    return passed(f"{timed} timed cells ran again, speeds within {100 * worst:.2f} %; {memory}")


def grain_bytes(rows: pd.DataFrame) -> pd.Series:
    """Return what memory and brackets may be off by: a chunk, without one the row's tolerance."""
    return rows["chunk_bytes"].fillna(rows["tolerance_bytes"]).fillna(0)


def samples(run: Run) -> Result:
    """Check that every time, and its spread, is that of its rank's raw samples, none left out."""
    ok = run.rows[run.rows["status"] == "ok"]
    timed = {what: ok[ok[column].notna()] for what, (column, *_) in SAMPLED.items()}
    if not any(map(len, timed.values())):
        return not_applicable("no timed row")
    if run.of_earlier_runs:
        return not_applicable("rows of earlier runs")
    try:
        found = run.samples()
    except RunError as error:
        return failed(str(error))
    if not found:
        return failed("samples.jsonl has no sample")
    sets: dict[tuple[str, str, float], list[Samples]] = {}
    for entry in found:
        ms = [float(v) for v in _list(entry.get("ms")) if known(v)]
        if ms:
            rank = _rank(entry.get("rank"))
            key = (str(entry.get("what")), str(entry.get("trial_id")), rank)
            sets.setdefault(key, []).append(Samples(tuple(ms), 0.0))
    for what, rows in timed.items():
        off = [
            not _follows(r, what, sets.get((what, r["trial_id"], _rank(r["rank"])), []))
            for _, r in rows.iterrows()
        ]
        if any(off):
            bad = rows[off]
            return failed(f"{len(bad)} {what} times do not follow from samples: {named(bad)}")
    counts = [f"{len(rows)} {what.replace('_', ' ')}" for what, rows in timed.items() if len(rows)]
    return passed(f"times are medians of their samples: {', '.join(counts)}")


def _rank(value: object) -> float:
    """The rank of a row or a sample: 0 where it says none."""
    return float(value) if isinstance(value, (int, float)) and known(value) else 0.0


def _follows(row: Any, what: str, sets: list[Samples]) -> bool:  # noqa: ANN401
    """Whether some samples have a row's median, and the spread and the count that it states."""
    median, spread, counted = SAMPLED[what]
    time_ms, count = row[median], row[counted]
    iqr_ms = row[spread] if spread else float("nan")
    return any(
        abs(own.median_ms / time_ms - 1) < SAMPLES_TOLERANCE
        and (count != count or len(own.ms) == count)
        and (iqr_ms != iqr_ms or abs(own.iqr_ms - iqr_ms) < SAMPLES_TOLERANCE * time_ms)
        for own in sets
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def planner(run: Run) -> Result:
    """Check the planner: the same end, and what was held then within 1 % or what is off named.

    What was held is compared wherever it was measured and the trial ended as foreseen: well, for
    want of memory, by a refusal, or an engine by a fault of its own.
    """
    rows = trials(run.rows)
    rows = rows[(rows["purpose"] != "bracket") & (rows["basis"] != "planned")]
    told = (rows["status"] == rows["predicted_status"]) | (rows["status"] == "ok")
    both = rows[told & rows["predicted_peak_bytes"].gt(0) & rows["peak_device_bytes"].notna()]
    off = (both["peak_device_bytes"] / both["predicted_peak_bytes"] - 1).abs()
    bad = both[(off > PLANNER_TOLERANCE) & (both["predicted_off_by"] == "")]
    wrong = rows[(rows["predicted_status"] != "") & (rows["predicted_status"] != rows["status"])]
    wrong = wrong[wrong["predicted_off_by"] == ""]
    if not bad.empty:
        return failed(f"peak off by more than 1 %, no item named: {named(bad)}")
    if not wrong.empty:
        return failed(f"another end than predicted: {named(wrong)}")
    if both.empty:
        return not_applicable("no prediction beside a measurement")
    ends = int((both["status"] != "ok").sum())
    note = f", {ends} of trials that failed as foreseen" if ends else ""
    if beyond := int((off > PLANNER_TOLERANCE).sum()):
        note += f", {beyond} beyond 1 % with the item named"
    return passed(f"{len(both)} peaks{note}, largest difference {100 * off.max():.2f} %")
