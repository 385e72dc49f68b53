"""Checks of a folder: is it whole, honest and traceable? Each is small and named."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from harness.columns import BASES, COLUMNS, PERFORMANCE, STATUSES
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS
from harness.rows import own_crash
from harness.runs import Run, dicts, lookup
from harness.sources import arms_of

UNCLEAN = ("oom_host", "invalid", "timeout", "crash")
MANIFEST_KEYS = [
    "run_id",
    "experiment",
    "started_utc",
    "finished_utc",
    "argv",
    "command",
    "config_hash",
    "git",
    "versions",
    "hardware",
    "gpus",
    "environment",
    "seeds",
    "attempts",
]
# NVML's clock event reasons that make timings doubtful: slowdowns by heat or by hardware. A power
# cap (0x4) is a GPU's normal state under load and is only named.
SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}
POWER_CAP = 0x4
GATE_LIMITS = {
    "gate_error": MAX_RELATIVE_RMS,
    "merged_gate_error": MAX_RELATIVE_RMS,  # only where several ranks merge their outputs
    "gate_lse_error": MAX_LSE_ERROR,
}


@dataclass(frozen=True)
class Result:
    """How a check ended: ``pass``, ``fail`` or ``n.a.``, and why."""

    outcome: str
    reason: str


Check = Callable[[Run], Result]


def passed(reason: str) -> Result:
    """Return a pass."""
    return Result("pass", reason)


def failed(reason: str) -> Result:
    """Return a failure."""
    return Result("fail", reason)


def not_applicable(reason: str) -> Result:
    """Return that a check says nothing about this run."""
    return Result("n.a.", reason)


def named(rows: pd.DataFrame, most: int = 3) -> str:
    """Return the trials of some rows by id, the first few of them."""
    ids = [i or "(no id)" for i in rows["trial_id"].head(most)]
    return ", ".join(ids) + (f" and {len(rows) - most} more" if len(rows) > most else "")


def schema(run: Run) -> Result:
    """Check that every column and key is there, and that ids and enumerations are sound."""
    faults = [n for n in run.notes if "column" in n or "absent" in n or "cut off" in n]
    missing = [k for k in MANIFEST_KEYS if k not in run.manifest]
    if run.manifest and missing:
        faults.append(f"manifest.json lacks {', '.join(missing)}")
    for column, allowed in (("status", STATUSES), ("basis", BASES)):
        odd = sorted(set(run.rows[column]) - set(allowed))
        if odd:
            faults.append(f"{column} {odd[0]!r} is unknown")
    ids = run.rows[["trial_id", "rank"]]
    if (run.rows["trial_id"] == "").any() or ids.duplicated().any():
        faults.append("a trial has no id of its own")
    absent = sorted(set(arms_of(run.rows)) - set(lookup(run.summary, "strategies", default={})))
    if absent and run.summary:
        faults.append(f"summary.json lacks {absent[0]}")
    if faults:
        return failed("; ".join(faults))
    return passed(f"{len(COLUMNS)} columns, {len(run.rows)} rows, summary and manifest complete")


def finished(run: Run) -> Result:
    """Check that the run came to its end."""
    if not run.manifest:
        return not_applicable("no manifest.json")
    ended = run.manifest.get("finished_utc")
    return passed(f"at {ended}") if ended else failed("the run was cut off; resume it")


def statuses(run: Run) -> Result:
    """Check that every trial ended in a result: ok, out of memory, refused, an engine's crash."""
    bad = run.rows[run.rows["status"].isin(UNCLEAN)]
    bad = bad[~bad.apply(own_crash, axis="columns")] if len(bad) else bad
    if not bad.empty:
        kinds = ", ".join(f"{n} {s}" for s, n in bad["status"].value_counts().items())
        return failed(f"{kinds}: {named(bad)}")
    return passed(", ".join(f"{n} {s}" for s, n in run.rows["status"].value_counts().items()))


def throttling(run: Run) -> Result:
    """Check that no GPU was slowed by heat or hardware when its clocks were read."""
    readings = [
        g
        for key in ("gpus", "gpus_before", "gpus_after")
        for g in dicts(run.manifest, key)
        if "throttle_reasons" in g
    ]
    if not readings:
        return not_applicable("no GPU in the manifest")
    found, capped = set(), False
    for reading in readings:
        try:
            bits = int(str(reading["throttle_reasons"]), 0)
        except ValueError:
            return failed(f"throttle reasons unreadable: {reading['throttle_reasons']!r:.60}")
        found |= {text for bit, text in SLOWDOWNS.items() if bits & bit}
        capped = capped or bool(bits & POWER_CAP)
    if found:
        return failed(", ".join(sorted(found)))
    note = "; the power cap was reached, as is usual under load" if capped else ""
    return passed(f"{len(readings)} readings without a slowdown{note}")


def speeds(run: Run) -> Result:
    """Check that only rows that are ok carry a speed."""
    columns = sorted(PERFORMANCE)
    bad = run.rows[(run.rows["status"] != "ok") & run.rows[columns].notna().any(axis=1)]
    if not bad.empty:
        return failed(f"{len(bad)} rows that are not ok carry a speed: {named(bad)}")
    return passed("none in a row that is not ok")


def gate(run: Run) -> Result:
    """Check that every timed row passed the correctness gate before it was timed."""
    times = ["attention_decode_step_ms", "attention_prefill_chunk_ms"]
    timed = run.rows[(run.rows["status"] == "ok") & run.rows[times].notna().any(axis=1)]
    if timed.empty:
        return not_applicable("no timed row")
    bad = timed[timed["gate_error"].isna() | timed["gate_lse_error"].isna()]
    if not bad.empty:
        return failed(f"{len(bad)} timed rows without a gate: {named(bad)}")
    for column, allowed in GATE_LIMITS.items():
        bad = timed[timed[column].notna() & ~(timed[column].abs() < allowed)]
        if not bad.empty:
            return failed(f"{column} at or beyond {allowed} in {len(bad)} rows: {named(bad)}")
    rms, lse = (timed[c].abs().max() for c in ("gate_error", "gate_lse_error"))
    return passed(f"{len(timed)} timed rows, largest relative RMS {rms:.3g}, largest LSE {lse:.3g}")
