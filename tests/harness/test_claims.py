"""Every claim's verdict turns when the rows under it do, and asks for rows that are missing."""

from __future__ import annotations

import hashlib
import json

import pytest

from harness.claims import CLAIMS, decide
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


def oom(phase, **given):
    asked = {"oom_requested_bytes": 200 * GIB, "oom_free_bytes": 130 * GIB}
    name = {"pool": "kv_pool", "fill": "kv_pages", "tables": "req_to_token"}[phase]
    return {"status": "oom", "oom_phase": phase, "oom_allocation": name, **asked, **given}


def verdict(claim, rows):
    (found,) = [c for c in decide(rows) if c["id"] == claim]
    return found


NO_POOL = oom("pool", oom_requested_bytes=245_760_000_000)
SMALL = {"model": "qwen3_30b_a3b"}
FRACTIONS = {"mem_fraction_of": "context"}
OF_DEVICE = {"mem_fraction_of": "device"}
FEW = {"max_running_requests": 16}
OFF = {"max_running_requests": 16, "disable_cuda_graph": True}
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


def graphs(saved_gib):
    """SGLang with and without CUDA graphs."""
    peaks = {"peak_device_bytes": 130 * GIB}
    less = {"peak_device_bytes": int((130 - saved_gib) * GIB)}
    return [row("sglang", options=FEW, **peaks), row("sglang", options=OFF, **less)]


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

CASES = [
    # C1: 10M static, by the cost of a token
    ("C1", [row("static", **NO_POOL), row("static", **SMALL)], "conditional"),
    ("C1", [row("static", **NO_POOL), row("static", **SMALL, **NO_POOL)], "supported"),
    ("C1", [row("static"), row("static", **SMALL)], "refuted"),
    ("C1", [row("static", **NO_POOL)], "undecided"),
    (
        "C1",
        [row("static", **NO_POOL), row("static", repeat=1), row("static", **SMALL, **NO_POOL)],
        "conditional",
    ),
    (
        "C1",
        [row("static", **NO_POOL), row("static", **SMALL), row("static", **SMALL, **NO_POOL)],
        "conditional",
    ),
    # C2: 10M paged
    ("C2", [row("paged")], "supported"),
    ("C2", [row("paged", **oom("tables"))], "refuted"),
    ("C2", [row("paged"), row("paged", repeat=1, **oom("tables"))], "conditional"),
    ("C2", [row("paged", 5 * M)], "undecided"),
    # C3: what is held at ready
    ("C3", [row("paged"), STATIC_EMPTY], "supported"),
    ("C3", [row("paged", kv_committed_bytes=GIB), STATIC_EMPTY], "refuted"),
    ("C3", [row("paged"), row("static", 5 * M)], "refuted"),
    ("C3", [row("paged", peak_device_bytes=60 * GIB), STATIC_EMPTY], "refuted"),
    ("C3", [row("paged")], "undecided"),
    # C4: growth with length
    ("C4", [full("paged", 5 * M), full("paged", 5 * M, 0.1), *GROWTH], "supported"),
    (
        "C4",
        [full("paged", 5 * M), full("paged", 5 * M, 0.1, kv_committed_bytes=100 * GIB), *GROWTH],
        "refuted",
    ),
    (
        "C4",
        [
            full("paged", 5 * M),
            full("paged", 5 * M, 0.1),
            full("static", 5 * M),
            full("static", 5 * M, 0.1),
        ],
        "refuted",
    ),
    ("C4", [full("paged", 5 * M), full("paged", 5 * M, 0.1)], "undecided"),
    # C5: bytes of 10M tokens
    ("C5", [row("static", **NO_POOL)], "conditional"),
    ("C5", [row("static", **oom("pool", oom_requested_bytes=182_000_000_000))], "supported"),
    ("C5", [row("static", **oom("pool", oom_requested_bytes=20_000_000_000))], "refuted"),
    ("C5", [row("static", **SMALL)], "undecided"),
    # C6: where a full sequence ends
    ("C6", [REFUSED_FILL, full("static", 5_842_000)], "conditional"),
    ("C6", [REFUSED_FILL, full("static", 4 * M), row("static", 4_003_000, **NO_POOL)], "supported"),
    ("C6", [REFUSED_FILL, full("static", 5 * M)], "conditional"),
    ("C6", [REFUSED_FILL, full("static", 8 * M)], "refuted"),
    (
        "C6",  # the pool starts with 5.84M, but a sequence in it ends at 1M
        [
            REFUSED_FILL,
            full("static", 5_842_000, resident_tokens=M),
            row("static", M + 1000, **NO_POOL),
        ],
        "supported",
    ),
    ("C6", [REFUSED_FILL, row("static", 5_842_000)], "undecided"),
    ("C6", [row("paged", fill=1.0), full("static", 5 * M)], "undecided"),
    # C7: lower fractions
    ("C7", fractions((0.5, 0.58), True), "conditional"),
    ("C7", fractions((0.5, 0.58, 0.65), True), "refuted"),
    ("C7", fractions((), False), "supported"),
    ("C7", fractions((0.5,), True)[:-1], "undecided"),
    ("C7", fractions((0.5,), True)[:-2], "undecided"),
    # C9: SGLang's pool by context
    ("C9", sglang(100 * GIB), "refuted"),
    ("C9", sglang(100 * GIB * 10 * M // SHORT), "supported"),
    ("C9", sglang(110 * GIB), "conditional"),
    ("C9", [*sglang(100 * GIB), *sglang(7600 * GIB)], "conditional"),
    ("C9", sglang(100 * GIB)[:1], "undecided"),
    # C10: vLLM at ready
    ("C10", vllm(), "refuted"),
    ("C10", [*vllm(held=5), row("vllm", peak_device_bytes=5 * GIB)], "supported"),
    ("C10", [*vllm(), row("vllm", repeat=1)], "conditional"),
    ("C10", [row("vllm", **REFUSED)], "undecided"),
    # C11: vLLM at 10M
    ("C11", vllm(flat=REFUSED), "conditional"),
    ("C11", vllm(), "supported"),
    ("C11", vllm(flat=REFUSED, small=REFUSED), "refuted"),
    ("C11", vllm()[:2], "undecided"),
    # C12: live share under a trace
    ("C12", [waste("static", 0.1), waste("paged", 0.9)], "conditional"),
    ("C12", [waste("static", 0.5, external_share=0.4), waste("paged", 0.9)], "supported"),
    ("C12", [waste("static", 0.9), waste("paged", 0.8)], "refuted"),
    ("C12", [waste("paged", 0.8)], "undecided"),
    # C13: CUDA graphs
    ("C13", graphs(6), "supported"),
    ("C13", graphs(1), "refuted"),
    (
        "C13",
        graphs(6) + [r | {"context_tokens": SHORT} for r in graphs(1)],
        "conditional",
    ),
    ("C13", graphs(6)[:1], "undecided"),
    # C14: on demand
    ("C14", [row("paged"), row("static", **NO_POOL)], "supported"),
    ("C14", [row("paged"), row("static")], "refuted"),
    ("C14", [row("paged", **oom("tables")), row("static", **NO_POOL)], "refuted"),
    ("C14", [row("paged")], "undecided"),
    # C16: 5 - 6M tokens
    ("C16", [row("static", 5_800_000), row("static", 6 * M, **NO_POOL)], "supported"),
    ("C16", [row("static", 3 * M), row("static", 4 * M, **NO_POOL)], "refuted"),
    ("C16", [row("static", 5_800_000), row("static", **NO_POOL)], "supported"),
    ("C16", [row("static", 3 * M), row("static", **NO_POOL)], "undecided"),
    ("C16", [row("static", 3 * M)], "undecided"),
    # C17: the conclusion, from C9, C10, C11 and C18
    ("C17", sglang(100 * GIB) + vllm(flat=REFUSED), "conditional"),
    (
        "C17",
        sglang(100 * GIB * 10 * M // SHORT)
        + vllm(held=5)
        + [row("vllm", peak_device_bytes=5 * GIB)],
        "supported",
    ),
    ("C17", sglang(100 * GIB) + vllm(flat=REFUSED, small=REFUSED), "refuted"),
    ("C17", sglang(100 * GIB), "undecided"),
    # C18: few running requests
    ("C18", sglang(100 * GIB), "supported"),
    ("C18", sglang(100 * GIB, few=oom("tables")), "refuted"),
    ("C18", sglang(100 * GIB, default={}), "refuted"),
    ("C18", sglang(100 * GIB)[:2], "undecided"),
]


@pytest.mark.parametrize(("claim", "rows", "expected"), CASES)
def test_the_rows_decide(claim, rows, expected):
    found = verdict(claim, rows)
    assert found["verdict"] == expected, found["condition"]
    if expected == "undecided":
        assert found["condition"].startswith("run: ") and found["trials"] == []
        assert found["basis"] == ""
    else:
        assert found["basis"] and found["condition"]
        assert set(found["trials"]) <= {r["trial_id"] for r in rows}
        assert found["trials"]


def test_every_claim_has_a_rule_and_its_verdict_can_turn():
    assert [c.id for c in CLAIMS] == [f"C{n}" for n in range(1, 21)]
    turned = {c: {e for own, _, e in CASES if own == c} for c in {c for c, _, _ in CASES}}
    planned = {"C8", "C15", "C19", "C20"}
    assert set(turned) | planned == {c.id for c in CLAIMS}
    assert all(len(verdicts - {"undecided"}) >= 2 for verdicts in turned.values())


def test_without_rows_only_arithmetic_decides():
    found = {c["id"]: c for c in decide([])}
    decided = {i for i, c in found.items() if c["verdict"] != "undecided"}
    assert decided == {"C8", "C15", "C19", "C20"}
    assert found["C15"]["measured"] == pytest.approx(174_763, rel=0.02)  # 4 GiB at 24 KiB a token
    assert found["C19"]["verdict"] == "conditional" and found["C19"]["measured"] == 4.0
    assert found["C20"]["verdict"] == "refuted" and found["C20"]["measured"] == 12.0
    assert all(found[i]["trials"] == [] for i in decided)


@pytest.mark.parametrize(
    "other",
    [
        {"capacity_bytes": 80 * GIB},
        {"kv_dtype": "bf16"},
        {"emulated_ranks": 1},
        {"context_ranks": 8},
        {"workload": "trace"},
        {"fault": "hang in pool"},
        {"status": "crash"},
        {"status": "timeout"},
    ],
)
def test_rows_that_ask_something_else_decide_nothing(other):
    assert verdict("C2", [row("paged", **other)])["verdict"] == "undecided"
    assert verdict("C2", [row("paged"), row("paged", **other)])["trials"] == [
        row("paged")["trial_id"]
    ]


def test_the_scale_model_s_rows_count_in_the_modelled_device_s_bytes():
    scaled = {"scale": 192, "basis": "scale_model", "kv_bytes_per_token": 128}
    small = scaled | {"capacity_bytes": 149_557_477_376 // 192}
    asked = {"oom_requested_bytes": 1_280_311_296}
    found = verdict("C5", [row("static", **small, **(NO_POOL | asked))])
    assert found["measured"] == pytest.approx(245.8, rel=1e-3)
    assert found["basis"].startswith("scale model")


def test_what_offloaded_weights_cost_is_told_where_it_was_measured():
    timed = {"read_weights": "offload", "attention_decode_step_ms": 123.4}
    told = verdict("C15", [row("paged", **timed)])
    assert "123.4 ms" in told["condition"] and len(told["trials"]) == 1
    assert "123.4" not in verdict("C15", [row("paged", **timed, basis="scale_model")])["condition"]


def test_starting_is_not_admitting():
    short = verdict("C18", sglang(100 * GIB, few={"admitted": "false"}))
    assert short["verdict"] == "supported" and "not admitted at 24 KiB" in short["condition"]
    assert "not admitted" not in verdict("C18", sglang(100 * GIB))["condition"]
    paged = verdict("C2", [row("paged", admitted="false")])
    assert paged["verdict"] == "supported" and "not admitted at 24 KiB" in paged["condition"]


def test_rows_of_a_real_engine_count_before_emulated_ones():
    emulated = vllm(flat=REFUSED)
    real = [r | {"engine_version": "0.23.0", "capacity_bytes": None} for r in vllm()]
    found = verdict("C11", emulated + real)
    assert found["verdict"] == "supported" and "measured on the engine" in found["basis"]


def test_what_c17_says_of_vllm_follows_from_its_rows():
    eager = verdict("C17", sglang(100 * GIB) + vllm(flat=REFUSED))
    lazy = [*vllm(flat=REFUSED, held=5), row("vllm", peak_device_bytes=5 * GIB)]
    other = verdict("C17", sglang(100 * GIB) + lazy)
    assert "allocates its whole pool" in eager["condition"]
    assert "allocates its whole pool" not in other["condition"]


def test_c14_says_what_fits_only_where_it_was_filled():
    started = [row("paged"), row("static", **NO_POOL)]
    assert verdict("C14", started)["condition"] == "for start-up"
    filled = [*started, REFUSED_FILL, full("static", 5_842_000)]
    assert "5,843,200 tokens" in verdict("C14", filled)["condition"]


def test_c13_names_what_lies_in_the_reported_range():
    rows = graphs(6) + [r | {"context_tokens": SHORT} for r in graphs(1)]
    found = verdict("C13", rows)
    assert found["measured"] == 6.0
    assert "1.00 to 6.00 GiB" in found["condition"] and "10,000,000 tokens" in found["condition"]


def test_bytes_of_a_scale_model_are_not_compared_with_those_of_a_device():
    device = [full("paged", 5 * M), full("paged", 5 * M, 0.1), *GROWTH]
    small = [
        r
        | {
            "scale": 192,
            "basis": "scale_model",
            "trial_id": r["trial_id"] + "s",
            "kv_bytes_per_token": 128,
            "capacity_bytes": 149_557_477_376 // 192,
            "kv_committed_bytes": r["kv_committed_bytes"] // 192,
            "kv_reserved_bytes": r["kv_reserved_bytes"] // 192,
            "oom_requested_bytes": (r["oom_requested_bytes"] or 0) // 192,
        }
        for r in [*device, *sglang(98 * GIB)]
    ]
    for rows in (device + small, small + device):
        assert verdict("C4", rows)["verdict"] == "supported"
    both = [*sglang(100 * GIB), *small]
    assert verdict("C9", [*sglang(100 * GIB)])["verdict"] == "refuted"
    assert verdict("C9", both)["measured"] < 1.03
