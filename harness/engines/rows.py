"""A start's records as a row, ledger events and samples: the same columns as any trial's."""

from __future__ import annotations

import re
import signal
from typing import Any

from harness.cell import Cell
from harness.engines.protocol import Record, Start
from harness.launch import ERROR_TEXT_CHARS, died
from harness.rows import Row, identity
from harness.sizes import GIB, printable
from harness.torch_segments import ROUND_BYTES

PHASES = ("context", "weights", "tables", "pool", "workspace")
# Where an engine's allocation belongs, when a start failed before it could be recorded.
PHASE_OF = {
    "weights": "weights",
    "rope_cos_sin": "tables",
    "profile": "workspace",
    "req_to_token": "tables",
    "kv_pool": "pool",
    "free_slots": "pool",
    "block_tables": "tables",
    "input_block_tables": "tables",
    "all_token_ids": "tables",
}
# v1/core/kv_cache_utils.py:713 and v1/worker/utils.py:405, vLLM 0.23.0.
_TOO_SMALL = re.compile(
    r"\(?(?P<needed>[\d.]+) GiB KV cache is needed.*?memory \((?P<free>[\d.]+) GiB\)", re.DOTALL
)
_OCCUPIED = re.compile(
    r"device \S+ \((?P<free>[\d.]+)/.*?utilization \([\d.]+, (?P<needed>[\d.]+) GiB\)", re.DOTALL
)
# What our layout, kernels and arena are: nothing of an engine's.
NOT_OURS = ("arena", "layout", "table_order", "chunk_bytes", "kv_scales", "emulated_version")


def row_of(cell: Cell, extra: Row, start: Start, log: str, seconds: float, fault: str = "") -> Row:
    """The row of a start.

    Parameters
    ----------
    extra : dict
        Columns that only the run knows.
    log : str
        What engine and keeper printed; its last line is the error of a start that says none.
    fault : str
        Why the records cannot be read.
    """
    row = identity(cell, extra) | dict.fromkeys(NOT_OURS)
    row |= {
        "basis": "measured",
        "engine_version": start.began["version"] if start.began else None,
        "wall_seconds": round(seconds, 3),
        "resident_tokens": 0,
    }
    if fault:
        return row | {"status": "crash", "error": printable(fault)}
    row |= _memory(start)
    if start.ready is not None:
        return row | _ready(cell, start, start.ready)
    if start.failed is not None:
        return row | _failed(start, start.failed)
    return row | _died(cell, start, log)


def _memory(start: Start) -> Row:
    """Bytes by phase: from items where there are some, else from the meters."""
    row: Row = {}
    context = start.phase("context")
    if context is not None:
        row["context_bytes"] = context["device_used_bytes"]
    row["weights_bytes"] = start.phase_bytes("weights") or None
    row["tables_bytes"] = start.phase_bytes("tables") or None
    row["workspace_bytes"] = start.phase_bytes("workspace") or None
    pinned = [i["bytes"] for i in start.items if i["location"] == "host_pinned"]
    row["pinned_host_bytes"] = sum(pinned) or None
    readings = [*start.phases, *(r for r in (start.ready, start.failed) if r is not None)]
    used = [r["device_used_bytes"] for r in readings if r.get("device_used_bytes") is not None]
    torch = [r.get("torch_peak_reserved_bytes") or 0 for r in readings]
    row["peak_device_bytes"] = max(used, default=None)
    row["peak_torch_bytes"] = max(torch, default=0) or None
    return row


def _ready(cell: Cell, start: Start, ready: Record) -> Row:
    pool = start.item("kv_pool")
    held = pool["bytes"] if pool else 0
    named = start.phase_bytes(*PHASES) + (
        (start.phase("context") or {}).get("device_used_bytes", 0)
    )
    tokens = cell.context_tokens
    admits = tokens <= ready["pool_tokens"] and tokens <= ready["max_request_tokens"]
    if cell.settings.strategy == "sglang":  # its longest request leaves a token for the answer
        admits = tokens <= ready["max_request_tokens"] + 1
    return {
        "status": "ok",
        "resident_limited_by": "target",
        "startup_seconds": ready["seconds"],
        "admitted": str(admits).lower(),
        "kv_reserved_bytes": held,
        "kv_committed_bytes": held,
        "kv_live_bytes": 0,
        "peak_ledger_bytes": named,
        "unexplained_bytes": ready["device_used_bytes"] - named,
        "unexplained_phase": "workspace",
    }


def _failed(start: Start, failed: Record) -> Row:
    said = f"{failed['error_type']}: {failed['message']}"
    if failed["where"]:
        said = f"{failed['where']}: {said}"
    row: Row = {"status": failed["how"], "error": printable(said)[:ERROR_TEXT_CHARS]}
    if failed["how"] == "crash":
        last = start.phases[-1]["phase"] if start.phases else "context"
        return row | {"oom_phase": last}
    row["oom_source"] = "torch" if failed["how"] == "oom" else (start.began or {}).get("engine")
    row["resident_limited_by"] = failed["how"]
    if failed["how"] == "refused":
        return row | _refused(failed["message"])
    name = failed.get("allocation") or "unknown"
    held = sum(line["bytes"] for line in start.held if line.get("name") == name)
    asked, free = failed.get("asked_bytes"), failed.get("free_bytes")
    whole = failed.get("whole_bytes") or (None if asked is None else asked + held)
    if failed.get("whole_bytes") and asked:
        held = _fitted_bytes(failed, asked, held)
    return row | {
        "oom_phase": PHASE_OF.get(name, "workspace"),
        "oom_allocation": name,
        "oom_requested_bytes": whole,
        "oom_free_bytes": None if free is None else free + held,
    }


def _fitted_bytes(failed: Record, piece_bytes: int, held_bytes: int) -> int:
    """Driver's bytes of the buffers that fitted before one of ``piece_bytes`` did not.

    They are held still, or the exception has freed them and torch keeps them; what else it keeps
    is less than one of them.
    """
    kept = (failed.get("torch_reserved_bytes") or 0) - (failed.get("torch_allocated_bytes") or 0)
    rounded = -(-piece_bytes // ROUND_BYTES) * ROUND_BYTES
    return (kept + held_bytes) // rounded * rounded


def _refused(message: str) -> Row:
    """What an engine's own words say that it needed and had, with their two decimals."""
    row: Row = {"oom_phase": "pool", "oom_allocation": "kv_pool"}
    occupied = _OCCUPIED.search(message)
    if occupied:
        row = {"oom_phase": "context", "oom_allocation": "gpu_memory_utilization"}
    said = occupied or _TOO_SMALL.search(message)
    if said is None:
        return row
    needed, free = (round(float(said[key]) * GIB) for key in ("needed", "free"))
    return row | {"oom_requested_bytes": needed, "oom_free_bytes": free}


def _died(cell: Cell, start: Start, log: str) -> Row:
    ended = start.ended or {"code": -signal.SIGKILL, "timed_out": False}
    last = start.phases[-1]["phase"] if start.phases else "context"
    if ended["timed_out"]:
        limit = cell.settings.trial.timeout_seconds
        return {"status": "timeout", "error": f"killed after {limit:g} s", "oom_phase": last}
    before, after = ended.get("oom_kills_before"), ended.get("oom_kills_after")
    row = died(ended["code"], (after or 0) > (before or 0), "", log) | {"oom_phase": last}
    row["error"] = row["error"] or f"the engine ended with code {ended['code']}, without a word"
    return row


def timeline_of(cell: Cell, start: Start) -> list[Row]:
    """A ledger event for what was there before the weights, for each item, and for the end."""
    events: list[Row] = []
    held = 0

    def event(phase: str, name: str, nbytes: int, reading: dict[str, Any], seconds: float) -> None:
        nonlocal held
        held += nbytes
        events.append(
            {
                "trial_id": cell.trial_id,
                "rank": 0,
                "seconds": seconds,
                "phase": phase,
                "allocation": name,
                "event_bytes": nbytes,
                "ledger_bytes": held,
                "torch_reserved_bytes": reading.get("torch_reserved_bytes"),
                "torch_allocated_bytes": reading.get("torch_allocated_bytes"),
                "nvml_used_bytes": reading.get("nvml_used_bytes"),
                "device_used_bytes": reading.get("device_used_bytes"),
                "device_free_bytes": reading.get("device_free_bytes"),
                "resident_tokens": 0,
            }
        )

    context = start.phase("context")
    if context is not None:
        event(
            "context", "engine_context", context["device_used_bytes"], context, context["seconds"]
        )
    for phase in PHASES:
        after = start.phase("pool" if phase == "tables" else phase) or {}
        for item in start.items:
            if item["phase"] == phase and item["location"] == "device":
                event(phase, item["name"], item["bytes"], after, item["seconds"])
    last = start.ready or start.failed
    if last is not None:
        event("workspace", "ready" if start.ready else "failed", 0, last, last["seconds"])
    return events


def samples_of(cell: Cell, start: Start) -> list[Row]:
    """Everything that was recorded, as one raw sample of the trial."""
    data = {
        "began": start.began,
        "phases": start.phases,
        "items": start.items,
        "held": start.held,
        "ready": start.ready,
        "failed": start.failed,
        "ended": start.ended,
    }
    return [{"trial_id": cell.trial_id, "what": "engine_start", **data}]
