"""Every claim has a verdict that can turn, and asks for rows that are missing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import claims_planned
from harness.claims import CLAIMS, decide
from tests.harness.claim_rows import (
    GIB,
    GROWTH,
    NO_POOL,
    M,
    full,
    on_the_scale_model,
    row,
    sglang,
    verdict,
)
from tests.harness.test_claims_engines import CASES as ENGINE_CASES
from tests.harness.test_claims_pools import CASES as POOL_CASES

CASES = [*POOL_CASES, *ENGINE_CASES]


def test_every_claim_has_a_rule_and_its_verdict_can_turn():
    assert [c.id for c in CLAIMS] == [f"C{n}" for n in range(1, 21)]
    turned = {c: {e for own, _, e in CASES if own == c} for c in {c for c, _, _ in CASES}}
    planned = {"C8", "C19", "C20"}  # by formulas: below
    assert set(turned) | planned == {c.id for c in CLAIMS}
    assert all(len(verdicts - {"undecided"}) >= 2 for verdicts in turned.values())


def test_without_rows_only_arithmetic_decides():
    found = {c["id"]: c for c in decide([])}
    decided = {i for i, c in found.items() if c["verdict"] != "undecided"}
    assert decided == {"C8", "C15", "C19", "C20"}
    # 4 GiB at 24 KiB a token, less the two of 48 layers that are on their way, in whole chunks
    assert found["C15"]["measured"] == pytest.approx(174_763 * 46 / 48, rel=0.02)
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


def test_starting_is_not_admitting():
    short = verdict("C18", sglang(100 * GIB, few={"admitted": "false"}))
    assert short["verdict"] == "supported" and "not admitted at 24 KiB" in short["condition"]
    assert "not admitted" not in verdict("C18", sglang(100 * GIB))["condition"]
    paged = verdict("C2", [row("paged", admitted="false")])
    assert paged["verdict"] == "supported" and "not admitted at 24 KiB" in paged["condition"]


def test_measured_rows_decide_alone_where_they_are_enough():
    device = [full("paged", 5 * M), full("paged", 5 * M, 0.1), *GROWTH, *sglang(98 * GIB)]
    small = [on_the_scale_model(r) for r in device]
    for rows in (device + small, small + device):
        for claim in ("C4", "C9"):
            found = verdict(claim, rows)
            assert found == verdict(claim, device) and found["basis"] == "measured here"
    other = [r | {"kv_committed_bytes": 1} if r["fill"] == 0.1 else r for r in small]
    assert verdict("C4", device + other)["verdict"] == "supported"
    assert verdict("C4", other)["verdict"] == "refuted"
    # What was not measured is decided by both.
    split = [r for r in device if r["strategy"] == "paged"] + small
    assert verdict("C4", split)["basis"] == "measured here; scale model"


def test_bytes_of_a_scale_model_are_not_compared_with_those_of_a_device():
    pools = sglang(98 * GIB)
    mixed = [on_the_scale_model(pools[0]), *pools[1:]]
    assert verdict("C9", mixed)["verdict"] == "undecided"


def test_arithmetic_turns_when_its_formulas_do(monkeypatch):
    exact = claims_planned.FORMULA_MIB
    settings, listed = claims_planned._report(), claims_planned._listed
    per_rank = dict.fromkeys(claims_planned.LISTED_MODELS, settings.parallel.tp)

    def turned(claim, name, made):
        with monkeypatch.context() as patch:
            patch.setattr(claims_planned, name, made)
            return verdict(claim, [])["verdict"]

    def with_heads(heads):
        return lambda m: replace(listed(m), model=replace(listed(m).model, kv_heads_total=heads))

    assert turned("C8", "_reserved_mib", lambda v, chunk, bs: 1.5 * chunk + 2 * bs) == "supported"
    assert turned("C8", "_reserved_mib", lambda v, chunk, bs: 4 * exact) == "refuted"
    assert turned("C19", "_listed", with_heads(per_rank["llama4_scout"])) == "refuted"
    assert turned("C19", "_listed", with_heads(4)) == "supported"
    assert turned("C20", "_listed", lambda m: with_heads(16)("qwen3_30b_a3b")) == "supported"
