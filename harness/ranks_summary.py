"""Rows of several ranks as one answer: largest peak, smallest OOM, slowest rank, and the spread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from harness.columns import PERFORMANCE
from harness.rows import Row

# Figures whose spread between the ranks of one trial is told, and which end is the trial's.
SPREAD = {
    "peak_device_bytes": max,
    "nccl_bytes": max,
    "resident_tokens": min,
    "attention_decode_step_ms": max,
    "startup_seconds": max,
}
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

    Peaks are the largest, resident tokens the smallest, speeds those of the slowest rank, and a
    request is admitted when every rank admits it.
    """
    return [_one(own) if len(own) > 1 else own[0] for own in by_trial(rows).values()]


def _one(own: list[Row]) -> Row:
    failed = next((r for r in own if r["rank"] == r.get("failed_rank")), None)
    row = dict(failed or max(own, key=lambda r: r.get("peak_device_bytes") or 0))
    for column in _TRIAL_IS_LARGEST:
        row[column] = _extreme(max, own, column)
    row["resident_tokens"] = _extreme(min, own, "resident_tokens")
    row["admitted"] = _all_admit(own)
    if row["status"] == "ok":
        slowest = max(own, key=lambda r: r.get("attention_decode_step_ms") or 0)
        row |= {c: slowest.get(c) for c in PERFORMANCE}
    return row


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


def rank_spread(rows: Iterable[Row]) -> dict[str, Any]:
    """How far ranks of one trial lie apart: for each figure, the trial in which they do most.

    Returns
    -------
    dict
        Empty for single ranks; else ``world_size``, ``failed_ranks`` (who ended trials) and a
        figure each: ``of_trial`` (the value that stands for the trial), ``smallest``, ``largest``.
    """
    trials = [own for own in by_trial(rows).values() if len(own) > 1]
    if not trials:
        return {}
    out: dict[str, Any] = {
        "world_size": max(len(own) for own in trials),
        "failed_ranks": sorted(
            {
                int(r["failed_rank"])
                for own in trials
                for r in own
                if r.get("failed_rank") is not None
            }
        ),
    }
    for column, choose in SPREAD.items():
        values = [[r[column] for r in own if r.get(column) is not None] for own in trials]
        widest = max((v for v in values if v), key=lambda v: max(v) - min(v), default=None)
        if widest:
            out[column] = {
                "of_trial": choose(widest),
                "smallest": min(widest),
                "largest": max(widest),
            }
    return out
