"""Rows of several ranks as one answer: largest peak, smallest OOM, slowest rank."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.columns import OF_ALL_RANKS, PERFORMANCE
from harness.rows import Row

ORDERLY = ("oom", "refused")  # ends by a limit of memory: rows of them are figures as well
_TRIAL_IS_LARGEST = (
    "peak_device_bytes peak_ledger_bytes peak_torch_bytes nccl_bytes startup_seconds fill_seconds "
    "gate_error gate_lse_error merged_gate_error wall_seconds"
).split()


def by_trial(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each trial, in order of rank."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        out.setdefault(str(row["trial_id"]), []).append(row)
    return {k: sorted(v, key=lambda r: int(r.get("rank") or 0)) for k, v in out.items()}


def complete(rows: Iterable[Row]) -> list[Row]:
    """Rows of trials of which no rank's row is missing: a kill may cut a trial's rows off."""
    kept = []
    for own in by_trial(rows).values():
        expected = 1 if own[0]["basis"] == "planned" else int(own[0].get("world_size") or 1)
        if len(own) >= expected:
            kept += own
    return kept


def per_trial(rows: Iterable[Row]) -> list[Row]:
    """One row a trial: of the rank that ended it, or of the one with the largest peak.

    Peaks are the largest, resident tokens the smallest, and a request is admitted when every rank
    admits it. Speeds are those of the rank whose attention is slowest, times of collectives and of
    the step with them those of the slowest in these.
    """
    return [_one(own) if len(own) > 1 else own[0] for own in by_trial(rows).values()]


def failed_of(own: list[Row]) -> Row | None:
    """The row of the rank that ended a trial; None when no rank is named."""
    return next((r for r in own if r["rank"] == r.get("failed_rank")), None)


def _one(own: list[Row]) -> Row:
    row = dict(failed_of(own) or max(own, key=lambda r: r.get("peak_device_bytes") or 0))
    for column in _TRIAL_IS_LARGEST:
        row[column] = _extreme(max, own, column)
    row["resident_tokens"] = _extreme(min, own, "resident_tokens")
    row["admitted"] = _all_admit(own)
    if row["status"] == "ok":
        row |= _slowest(own, "attention_decode_step_ms", *PERFORMANCE)
        for time, told in OF_ALL_RANKS.items():
            row |= _slowest(own, time, time, *told)
    return row


def _slowest(own: list[Row], time: str, *columns: str) -> Row:
    """Columns of the row in which a time is longest."""
    slowest = max(own, key=lambda r: r.get(time) or 0)
    return {c: slowest.get(c) for c in columns}


def _extreme(choose: Any, own: list[Row], column: str) -> Any:  # noqa: ANN401
    return choose((r[column] for r in own if r.get(column) is not None), default=None)


def _all_admit(own: list[Row]) -> str | None:
    said = {r.get("admitted") for r in own}
    return "false" if "false" in said else None if None in said else "true"


def on_rank(row: Mapping[str, Any]) -> str:
    """`` on rank 3``, which ended a trial of several ranks; ``""`` where none is named."""
    rank, world_size = row.get("failed_rank"), row.get("world_size")
    if rank is None or rank != rank or not (world_size or 1) > 1:
        return ""
    return f" on rank {int(rank)}"


def held_tokens(row: Row) -> int:
    """Tokens of the sequences that a trial holds over all ranks."""
    all_ranks = row.get("resident_tokens_all_ranks")
    return int(row["resident_tokens"] if all_ranks is None else all_ranks)
