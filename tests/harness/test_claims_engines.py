"""Verdicts on the engines' code turn when the rows under them do."""

from __future__ import annotations

import pytest

from tests.harness.claim_rows import (
    GIB,
    REFUSED,
    SHORT,
    M,
    decided,
    graphs,
    on_the_scale_model,
    oom,
    row,
    sglang,
    verdict,
    vllm,
)

CASES = [
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
    # C13: CUDA graphs
    ("C13", graphs(6), "supported"),
    ("C13", graphs(1), "refuted"),
    ("C13", graphs(1, requests=16), "undecided"),
    ("C13", graphs(6, requests=16) + graphs(1), "conditional"),
    (
        "C13",
        graphs(6) + [r | {"context_tokens": SHORT} for r in graphs(1)],
        "conditional",
    ),
    ("C13", graphs(6)[:1], "undecided"),
    ("C13", [r | {"context_tokens": SHORT} for r in graphs(1)], "undecided"),
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
    decided(claim, rows, expected)


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


def test_c13_names_what_lies_in_the_reported_range():
    rows = graphs(5) + [r | {"context_tokens": SHORT} for r in graphs(1)]
    found = verdict("C13", rows)
    assert found["measured"] == 5.37  # GB
    assert "1.07 to 5.37 GB" in found["condition"] and "10,000,000 tokens" in found["condition"]
    assert "counted by a formula" not in found["condition"]
    emulated = [r | {"emulated_version": "0.5.12.post1"} for r in rows]
    assert "counted by a formula" in verdict("C13", emulated)["condition"]
    # What the engine itself saves with few requests is said beside it.
    real = [r | {"engine_version": "0.5.12.post1"} for r in graphs(0.25, requests=16)]
    told = verdict("C13", [*real, *emulated])["condition"]
    assert "on SGLang itself 0.27 GB (report, 10,000,000 tokens, max_running_requests 16)" in told
    more = [r | {"engine_version": "0.5.12.post1"} for r in graphs(0.5, requests=32)]
    told = verdict("C13", [*real, *more, *emulated])["condition"]
    assert "on SGLang itself 0.27 to 0.54 GB (" in told and "requests 32)" in told


def test_c13_waits_for_many_requests_and_says_what_few_save():
    few = graphs(1, requests=16)
    told = verdict("C13", few)["condition"]
    assert "with 128 requests" in told and told.endswith("save 1.07 GB")
    # Starts of the engine itself with few requests do not hide emulated ones with many.
    real = [r | {"engine_version": "0.5.12.post1"} for r in few]
    assert verdict("C13", real + graphs(6))["verdict"] == "supported"


def test_c13_says_what_failing_starts_do_without_graphs_only_where_they_were_tried():
    fails = [row("sglang", **oom("pool"))]
    without = row("sglang", options={"disable_cuda_graph": True}, **oom("pool"))
    rescued = row("sglang", options={"disable_cuda_graph": True})
    assert "where 10M fails" not in verdict("C13", graphs(6) + fails)["condition"]
    for last, word in ((without, "does not make it start"), (rescued, "makes it start")):
        found = verdict("C13", [*graphs(6), *fails, last])
        assert word in found["condition"] and last["trial_id"] in found["trials"]


def test_a_measured_start_without_graphs_counts_before_the_scale_model_s():
    small = [on_the_scale_model(r) for r in graphs(1)]
    for rows in (graphs(6) + small, small + graphs(6)):
        found = verdict("C13", rows)
        assert (found["measured"], found["basis"]) == (6.44, "measured here")
    assert verdict("C13", small)["basis"] == "scale model"


@pytest.mark.parametrize("claim", ["C9", "C18"])
def test_starts_of_two_versions_are_not_compared(claim):
    def of(version, rows):
        return [r | {"emulated_version": version} for r in rows]

    old, new = of("0.5.9", sglang(100 * GIB)), of("0.5.12.post1", sglang(130 * GIB))
    mixed = [old[0], *new[1:]]
    assert verdict("C9", mixed)["verdict"] == "undecided"
    assert verdict(claim, old)["verdict"] != "undecided"


def test_c9_names_a_pool_by_the_cost_of_a_token():
    found = verdict("C9", sglang(100 * GIB))["condition"]
    assert "are the same (4,369,066 tokens at 24 KiB a token)" in found
    assert "1.00 GiB, then 76.00, beside which kv_pool no longer fits" in found


def test_pools_are_counted_as_the_engine_counts_them():
    """SGLang's ``max_total_num_tokens``: its buffers have a page more, for padding."""
    token, size = 24 * 1024, 5_066_547
    short, long, few = sglang((size + 1) * token, few={"admitted": "false"})
    for made in (short, few):
        made["kv_reserved_bytes"] = (size + 1) * token
    found = verdict("C9", [short, long])["condition"]
    assert f"are the same ({size:,} tokens at 24 KiB a token)" in found
    assert f"(room for {size:,})" in verdict("C18", [long, few])["condition"]
    long["oom_requested_bytes"] += token
    found = verdict("C9", [short, long])["condition"]
    assert f"are alike ({size:,} and {size + 1:,} tokens at 24 KiB a token)" in found


def test_c11_names_the_models_of_which_only_the_emulation_was_started():
    real = [r | {"engine_version": "0.23.0", "capacity_bytes": None} for r in vllm(flat=REFUSED)]
    alone = row("vllm") | {"model": "another"}
    found = verdict("C11", [*real, *vllm(), alone])
    told, _, beside = found["condition"].partition("Emulated only: ")
    assert "another" not in told and beside.startswith("starts: another (")
    assert "Does not: " in told and found["trials"][-1] == alone["trial_id"]


def test_c11_says_what_does_not_fit():
    refused = REFUSED | {"oom_requested_bytes": 228 * GIB, "oom_free_bytes": 125 * GIB}
    found = verdict("C11", vllm(flat=refused))["condition"]
    assert "its K/V needs 228.0 GiB, has 125.0" in found
