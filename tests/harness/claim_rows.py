"""Rows of an H200 as the claims' rules read them, made up one by one."""

from __future__ import annotations

import hashlib
import json

from harness.claims import decide
from harness.columns import ordered

M = 1_000_000
GIB = 1 << 30
KIB = {"report": 24, "qwen3_30b_a3b": 12, "llama4_scout": 12}


def row(strategy, context=10 * M, model="report", **given):
    """One row of an H200; ``options`` are the strategy's keys."""
    options = given.pop("options", {})
    token = KIB[model] * 1024
    made = {
        "strategy": strategy,
        "model": model,
        "context_tokens": context,
        "kv_bytes_per_token": token,
        "strategy_options": json.dumps(options),
        "mem_fraction": options.get("mem_fraction", 1.0 if strategy == "static" else None),
        "slot_policy": "max" if strategy == "static" else None,
        "capacity_bytes": 149_557_477_376,
        "device_name": "NVIDIA H200",
        "workload": "single",
        "kv_dtype": "fp8_e4m3",
        "basis": "measured",
        "emulated_ranks": 8,
        "world_size": 1,
        "rank": 0,
        "scale": 1,
        "sequences": 1,
        "repeat": 0,
        "fill": 0.0,
        "purpose": "point",
        "status": "ok",
        "admitted": "true",
        "resident_tokens": 0,
        "weights_bytes": 4 * GIB,
        "tables_bytes": 0,
        "kv_committed_bytes": 0,
        "kv_reserved_bytes": context * token,
        "peak_device_bytes": 5 * GIB,
    }
    made |= given
    content = json.dumps(made, sort_keys=True).encode()
    made["trial_id"] = hashlib.sha256(content).hexdigest()[:12]
    return ordered(made)


def on_the_scale_model(made):
    """The same row as 1:192 of the device has it."""
    scaled = {"scale": 192, "basis": "scale_model", "trial_id": made["trial_id"] + "s"}
    sizes = (c for c in made if c.endswith("_bytes") and made[c] is not None)
    scaled |= {c: made[c] // 192 for c in sizes}
    return made | scaled | {"kv_bytes_per_token": made["kv_bytes_per_token"] // 192}


def oom(phase, **given):
    asked = {"oom_requested_bytes": 200 * GIB, "oom_free_bytes": 130 * GIB}
    name = {"pool": "kv_pool", "fill": "kv_pages", "tables": "req_to_token"}[phase]
    return {"status": "oom", "oom_phase": phase, "oom_allocation": name, **asked, **given}


def verdict(claim, rows):
    (found,) = [c for c in decide(rows) if c["id"] == claim]
    return found


def decided(claim, rows, expected):
    """The claim's verdict is the expected one, and says what carries it or what is missing."""
    found = verdict(claim, rows)
    assert found["verdict"] == expected, found["condition"]
    if expected == "undecided":
        assert found["condition"].startswith("run: ") and found["trials"] == []
        assert found["basis"] == ""
    else:
        assert found["basis"] and found["condition"]
        assert set(found["trials"]) <= {r["trial_id"] for r in rows}
        assert found["trials"]


NO_POOL = oom("pool", oom_requested_bytes=245_760_000_000)
SMALL = {"model": "qwen3_30b_a3b"}
FRACTIONS = {"mem_fraction_of": "context"}
OF_DEVICE = {"mem_fraction_of": "device"}
FEW = {"max_running_requests": 16}
SHORT = 131_072


def fractions(good, device):
    """Static at 10M at four fractions of the context, and at two of the device."""
    rows = [
        row(
            "static",
            options={**FRACTIONS, "mem_fraction": f},
            **({} if f in good else NO_POOL),
        )
        for f in (0.5, 0.58, 0.65, 0.8)
    ]
    return rows + [
        row("static", options={**OF_DEVICE, "mem_fraction": f}, **({} if device else NO_POOL))
        for f in (0.65, 0.8)
    ]


def sglang(pool_at_10m, few=None, default=None):
    """SGLang short and long by default flags, and long with few requests.

    Unless told otherwise the long one fails with its pool, and few requests start.
    """
    fails = oom("pool", oom_requested_bytes=pool_at_10m)
    tables = {"kv_reserved_bytes": 100 * GIB, "tables_bytes": GIB}
    long = {"kv_reserved_bytes": pool_at_10m, "tables_bytes": 76 * GIB}
    return [
        row("sglang", SHORT, **tables),
        row("sglang", **long, **(fails if default is None else default)),
        row("sglang", options=FEW, **tables, **(few or {})),
    ]


def graphs(saved_gib, requests=128):
    """SGLang with and without CUDA graphs."""
    peaks = {"peak_device_bytes": 130 * GIB}
    less = {"peak_device_bytes": int((130 - saved_gib) * GIB)}
    on = {"max_running_requests": requests}
    off = {**on, "disable_cuda_graph": True}
    return [row("sglang", options=on, **peaks), row("sglang", options=off, **less)]


def vllm(flat=None, small=None, held=120):
    """vLLM at ready at 24 and at 12 KiB a token; ``None`` starts."""
    pool = {"kv_committed_bytes": (held - 10) * GIB, "peak_device_bytes": held * GIB}
    return [
        row("vllm", SHORT, **pool),
        row("vllm", **(flat if flat is not None else pool)),
        row("vllm", **SMALL, **(small if small is not None else pool)),
    ]


REFUSED = {"status": "refused", "oom_phase": "pool", "oom_allocation": "kv_cache"}


def full(strategy, tokens, fill=1.0, **given):
    """A filled row; committed bytes are those of its tokens unless given."""
    made = {
        "kv_committed_bytes": int(tokens * fill) * 24_576,
        "resident_tokens": int(tokens * fill),
    }
    return row(strategy, tokens, fill=fill, **(made | given))


def waste(strategy, live, **given):
    own = {"workload": "trace", "capacity_bytes": 24 * GIB, "live_share": live}
    return row(strategy, **(own | given))


STATIC_EMPTY = row("static", 5 * M, kv_committed_bytes=5 * M * 24_576)
ENDS = oom("fill", resident_tokens=5_843_200)
REFUSED_FILL = row("paged", fill=1.0, **ENDS)
GROWTH = [full("static", 5 * M), full("static", 5 * M, 0.1, kv_committed_bytes=5 * M * 24_576)]
