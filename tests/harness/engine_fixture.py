"""Starts of engines as records, from figures of one H200: an input of tests, no result of a run.

SGLang 0.5.12.post1 and vLLM 0.23.0, each read once: pools, tables, what failed, and what NVML
showed at ready less the 0.60 GiB that it showed before. The emulations are the planner's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from harness import forecast
from harness.arms import settings_of_command
from harness.cell import Cell
from harness.engines.launch import flags_of
from harness.engines.protocol import READING, Start
from harness.engines.rows import row_of, samples_of, timeline_of
from harness.rows import identity

GIB = 1 << 30
# 8 query heads and one KV head of 128, 3.99 GiB: the model that was started at 12 KiB a token.
SMALL = ("model=qwen3_30b_a3b", "model.q_heads_total=64", "model.weights_per_rank=4283631616")
LARGE = ("model=report",)
# The figures were read with the defaults of vLLM's Python class, and without graphs.
CLASS = ("strategy.enforce_eager=true", "strategy.max_num_batched_tokens=16384")
SGLANG, VLLM = "strategy=sglang", "strategy=vllm"
FEW = "strategy.max_running_requests=16"
OFF = "strategy.disable_cuda_graph=true"
SEQS = "strategy.max_num_seqs=16"
UTIL_95 = "strategy.gpu_memory_utilization=0.95"
TABLE = 2049 * 10_000_004 * 4
BUFFER = 1_297_036_288
REFUSAL = (
    "To serve at least one request with the model's max seq len (10000000), (228.88 GiB KV cache "
    "is needed, which is larger than the available KV cache memory (124.83 GiB)."
)


@dataclass(frozen=True)
class Seen:
    """One start that was seen."""

    words: tuple[str, ...]
    context: int
    status: str = "ok"
    ready_gib: float = 0.0
    pool_tokens: int = 0
    kv_bytes: int = 0
    tensors: int = 96
    limit: int = 0
    longest: int = 0
    tables: dict[str, int] = field(default_factory=dict)


def _sglang(*words: str, context: int, ready: float, rows: int, graph: int, tokens: int) -> Seen:
    heads = 2 if LARGE[0] in words else 1
    kv = 96 * heads * 128 * (tokens + 1)
    tables = {
        "req_to_token": (rows + 1) * (context + 4) * 4,
        "page_table": graph * context * 4,
        "strided_indices": context * 8,
    }
    longest = min(context, tokens) - 1
    return Seen((SGLANG, *words), context, "ok", ready, tokens, kv, 96, rows, longest, tables)


SEEN = (
    Seen((SGLANG, *SMALL), 10_000_000, "oom", tables={"req_to_token": TABLE}),
    _sglang(*SMALL, FEW, context=10_000_000, ready=128.2, rows=16, graph=16, tokens=10_133_095),
    _sglang(*SMALL, context=131_072, ready=129.8, rows=4096, graph=256, tokens=10_133_095),
    Seen((SGLANG, *SMALL, OFF), 10_000_000, "oom", tables={"req_to_token": TABLE}),
    _sglang(*LARGE, FEW, context=10_000_000, ready=128.2, rows=16, graph=16, tokens=5_066_547),
    Seen(
        (VLLM, *SMALL, *CLASS, "strategy.gpu_memory_utilization=0.9"),
        131_072,
        "ok",
        125.6,
        643_679 * 16,
        643_679 * 16 * 12_288,
        48,
        1024,
        131_072,
    ),
    Seen(
        (VLLM, *SMALL, *CLASS, SEQS, UTIL_95),
        10_000_000,
        "ok",
        132.1,
        10_909_504,
        10_909_504 * 12_288,
        48,
        16,
        10_000_000,
        {"block_tables": 16 * 625_000 * 4, "input_block_tables": 16 * 625_000 * 4},
    ),
    Seen((VLLM, *LARGE, *CLASS, SEQS, UTIL_95), 10_000_000, "refused"),
)


def arm(seen: Seen) -> Any:
    """The settings of a start, planned for an H200."""
    words = ["experiment.start_engines=true", "experiment.name=real_engines", "hardware=h200"]
    words += ["sweep.brackets=false", "trial.timing=false", "fill=0"]
    words += [f"sweep.contexts=[{seen.context}]", *seen.words]
    (made,) = settings_of_command(words, False, planning=True)
    return replace(made, engine={"python": "/engine"})


def reading(used: int) -> dict[str, int]:
    """Every meter with so much in use."""
    out = dict.fromkeys(READING, used)
    return out | {"device_free_bytes": 150_109_880_320 - used}


def records(seen: Seen, cell: Cell) -> Start:
    """A start as an adapter records it."""
    engine = cell.settings.strategy
    model, context = cell.settings.model, round(1.68 * GIB)
    version = cell.settings.options["version"]
    items = [_item("weights", "weights", model.weights_bytes, how="parameters")]
    rope = 10_000_000 * 128 * (4 if engine == "sglang" else 2)
    items.append(_item("tables", "rope_cos_sin", rope))
    for name, nbytes in seen.tables.items():
        before = name in ("req_to_token", "block_tables", "input_block_tables")
        items.append(_item("tables" if before else "workspace", name, nbytes))
    made = Start(
        began={"type": "began", "version": version, "engine": engine, "nvml_used_bytes": 0},
        phases=[{"type": "phase", "phase": "context", "seconds": 9.0, **reading(context)}],
        items=items,
        ended={"type": "ended", "code": 0, "timed_out": False, "left": 0},
    )
    if seen.status == "ok":
        items.append(_item("pool", "kv_pool", seen.kv_bytes, count=seen.tensors))
        used = round(seen.ready_gib * GIB)
        made.ready = {
            "seconds": 42.0,
            "nvml_peak_bytes": used,
            "pool_tokens": seen.pool_tokens,
            "request_limit": seen.limit,
            "max_request_tokens": seen.longest,
            "settings": {},
            **reading(used),
        }
    elif seen.status == "oom":
        where = "srt/mem_cache/memory_pool.py:907 _create_buffers"
        made.held = [
            {"name": "req_to_token", "bytes": TABLE, "count": 1, "where": "memory_pool.py:149"},
        ]
        made.failed = {
            "seconds": 17.0,
            "how": "oom",
            "error_type": "OutOfMemoryError",
            "message": "CUDA out of memory. Tried to allocate 1.21 GiB.",
            "where": where,
            "allocation": "kv_pool",
            "asked_bytes": BUFFER,
            "whole_bytes": 96 * BUFFER,
            "free_bytes": round(1.15 * GIB),
            **reading(round(138.65 * GIB)),
            # The exception freed the 43 buffers that had fitted; torch keeps them.
            "torch_reserved_bytes": 148_155_400_192,
            "torch_allocated_bytes": 91_391_921_664,
        }
    else:
        made.failed = {"seconds": 20.0, "how": "refused", "error_type": "ValueError",
                       "message": REFUSAL, "where": "v1/core/kv_cache_utils.py:713 check",
                       **reading(round(8.1 * GIB))}  # fmt: skip
    return made


def _item(phase: str, name: str, nbytes: int, count: int = 1, how: str = "tensor") -> Any:
    return {"phase": phase, "name": name, "bytes": nbytes, "count": count, "shape": "", "how": how,
            "location": "device", "seconds": 20.0}  # fmt: skip


@dataclass
class Made:
    """Rows, ledger events and samples of starts and of what stands in for their emulations."""

    settings: list[Any]
    rows: list[dict[str, Any]]
    timeline: list[dict[str, Any]]
    samples: list[dict[str, Any]]


def made(seen: tuple[Seen, ...] = SEEN) -> Made:
    """Every start as a run would leave it."""
    out = Made([], [], [], [])
    for one in seen:
        settings = arm(one)
        cell = Cell(settings, one.context, 0.0, timing=False, real=True)
        assert flags_of(cell)
        start = records(one, cell)
        extra = {"experiment": "real_engines", "run_id": "20261124-000000-abcdef"}
        row = forecast.with_prediction(row_of(cell, extra, start, "", 50.0), cell)
        out.settings.append(settings)
        out.rows.append(row)
        out.timeline += timeline_of(cell, start)
        out.samples += samples_of(cell, start)
        out.rows.append(_emulated(replace(cell, real=False), extra, out.timeline))
    return out


def _emulated(cell: Cell, extra: dict[str, Any], timeline: list[dict[str, Any]]) -> dict[str, Any]:
    """A row and ledger events as the planner has them."""
    found = forecast.predict_cell(cell)
    row = identity(cell, extra) | {
        "status": found.outcome,
        "admitted": str(found.admits_context).lower(),
        "resident_tokens": 0,
        "tables_bytes": found.predicted_tables_bytes,
        "weights_bytes": cell.settings.model.weights_bytes,
        "kv_reserved_bytes": found.predicted_kv_bytes,
        "kv_committed_bytes": found.predicted_kv_bytes,
        "peak_device_bytes": found.predicted_peak_bytes,
    }
    if found.outcome != "ok":
        row |= {
            "oom_phase": found.phase,
            "oom_allocation": found.allocation,
            "oom_requested_bytes": found.requested_bytes,
            "oom_free_bytes": found.free_bytes,
        }
    timeline += [
        {"trial_id": cell.trial_id, "rank": 0, "seconds": 1.0, "phase": i.phase,
         "allocation": i.allocation, "event_bytes": i.nbytes}
        for i in found.items
        if i.location == "device" and not i.failed
    ]  # fmt: skip
    return row
