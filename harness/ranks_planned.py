"""Rows of trials on more ranks than there are here: the planner's answers, marked as such."""

from __future__ import annotations

from harness.cell import Cell
from harness.folder import Outcome
from harness.forecast import predict_cell
from harness.launch import Job
from harness.lengths import filled_tokens
from harness.phases import SIZED_PHASES
from harness.ranks_group import sizes_of
from harness.rows import Row, identity


def planned_outcome(job: Job) -> Outcome:
    """A row for each cell: it stands for every rank, which the planner holds alike."""
    return Outcome([_row(cell, job.extra) for cell in job.cells], [], [])


def _row(cell: Cell, extra: Row) -> Row:
    made, settings = predict_cell(cell), cell.settings
    row = identity(cell, extra) | {"status": made.outcome}
    for phase in SIZED_PHASES:
        row[f"{phase}_bytes"] = sum(
            i.nbytes
            for i in made.items
            if i.phase == phase and i.location == "device" and not i.failed
        )
    if made.outcome != "ok":
        row |= {
            "oom_phase": made.phase,
            "oom_allocation": made.allocation,
            "oom_source": "planner",
            "oom_requested_bytes": made.requested_bytes,
            "oom_free_bytes": made.free_bytes,
        }
    whole = made.outcome == "ok" and cell.purpose != "bracket"
    held = filled_tokens(cell) if whole else settings.all_tokens(made.resident_tokens)
    if whole or made.outcome != "ok":
        row["resident_limited_by"] = "target" if whole else made.outcome
    return row | {
        "admitted": str(made.started and made.admits_context).lower(),
        "resident_tokens": made.resident_tokens,
        "resident_tokens_all_ranks": held,
        "kv_committed_bytes": made.predicted_kv_bytes,
        "collective_bytes": sizes_of(settings).step_bytes,
    }
