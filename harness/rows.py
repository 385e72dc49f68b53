"""One row of trials.csv: the columns that a cell's configuration alone decides."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from harness.cell import Cell
from harness.planner_engines import ENGINES

Row = dict[str, Any]
# Of our arena, layout and kernels: no engine has them, nor does its emulation use them.
NOT_OF_ENGINES = ("page_tokens", "chunk_bytes", "arena", "layout", "table_order", "kv_scales")


def identity(cell: Cell, extra: Row) -> Row:
    """Identity and configuration columns of a cell.

    Parameters
    ----------
    extra : dict
        What only the run knows: ``run_id``, ``experiment``, the prediction's columns.
    """
    s = cell.settings
    model = s.kv_model()
    options = s.options
    row = {
        "trial_id": cell.trial_id,
        "pair_id": cell.pair_id,
        "strategy": s.strategy,
        "model": s.model.name,
        "hardware": s.hardware.option,
        "device_name": s.hardware.device_name,
        "scale": s.scale,
        "workload": s.workload["name"],
        "repeat": cell.repeat,
        "seed": s.seed,
        "rank": 0,
        "world_size": s.parallel.processes,
        "emulated_ranks": s.parallel.ranks,
        "parallel": s.parallel.kind,
        "context_ranks": s.parallel.context_ranks,
        "basis": s.basis,
        "emulated_version": options.get("version"),
        "context_tokens": cell.context_tokens,
        "fill": cell.fill,
        "sequences": s.sequences,
        "kv_dtype": s.model.kv_dtype,
        "page_tokens": s.trial.page_tokens,
        "block_tokens": None,
        "chunk_bytes": max(g.chunk_bytes for g in model.groups),
        "arena": ("mmap" if s.on_host else "mapped") if s.trial.arena == "auto" else s.trial.arena,
        "layout": "page_major",
        "table_order": s.trial.table_order,
        "mem_fraction": options.get("mem_fraction"),
        "slot_policy": options.get("slot_policy"),
        "kv_bytes_per_token": model.token_bytes,
        "capacity_bytes": s.device_bytes,
        "purpose": cell.purpose,
        "hybrid": int(s.model.hybrid),
        "read_weights": s.trial.read_weights,
        "strategy_options": json.dumps(options, sort_keys=True),
        "growth": options.get("growth"),
        "release": options.get("release"),
        "kv_scales": "static 1.0 per KV head",
        "arm": s.arm or None,
        "fault": None if s.fault["kind"] == "none" else "{kind} in {phase}".format_map(s.fault),
        "started_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        # A rank's own GPU is known only to itself.
        "gpu_uuid": s.hardware.uuid or None if s.parallel.processes == 1 else None,
    }
    if s.strategy in ENGINES:
        row |= dict.fromkeys(NOT_OF_ENGINES)
        row["block_tokens"] = s.grain_tokens
    return row | extra


def own_crash(row: Row) -> bool:
    """Whether an engine crashed as its planner foresaw: a result, and no fault of the harness.

    An engine that was started may also abort by itself, after a fault of its kernels.
    """
    foreseen = row["status"] == "crash" and row.get("predicted_status") == "crash"
    aborted = row.get("signal") == "SIGABRT" and bool(row.get("engine_version"))
    return foreseen and (aborted or not row.get("signal"))
