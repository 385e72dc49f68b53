"""No time of several ranks without what they should have given together: each fault is found."""

from __future__ import annotations

import math

import pytest

from harness import ranks_step
from harness.cell import Cell
from harness.columns import PERFORMANCE
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS
from harness.ranks_exchange import Exchange
from harness.ranks_gate import MAX_MERGE_ERROR, MAX_REDUCED_ERROR, MergedGate, StepGate
from harness.trial import Trial
from kernels import ops
from tests.harness.composed import made
from tests.harness.ranks_fixture import ranks, rows_of

TOKENS = 4096
MERGE, TIME_STEP = ops.merge, ranks_step.time_step
# The only rank of several that a model is shaped for, talking to itself.
ONE_OF_TWO = (
    "strategy=paged",
    "parallel.ranks=2",
    "parallel.processes=1",
    "parallel.backend=gloo",
    "model.weights_per_rank=1GiB",
    "trial.prefill_histories=0",
    "trial.max_samples=2",
    f"context={TOKENS}",
)
PAGES = ("parallel=context", "parallel.context_ranks=2")
HEADS = ("parallel=tp",)


def timed_row(*words):
    """The row of such a trial, run in this process."""
    records = []
    trial = Trial([Cell(made(*ONE_OF_TWO, *words), TOKENS)], records.append, {})
    try:
        trial.run()
    finally:
        trial.device.close()
    (row,) = [r["row"] for r in records if r["type"] == "row"]
    return row


@pytest.fixture(autouse=True)
def _loopback(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


@pytest.mark.parametrize("words", [PAGES, HEADS])
def test_a_whole_step_is_timed(words):
    row = timed_row(*words)
    assert row["status"] == "ok", row.get("error")
    assert row["parallel_decode_step_ms"] > 0 and row["collective_ms"] > 0
    assert row["collective_bytes"] > 0


def skipped(*names):
    """The exchange of a timed step without some of its parts."""

    def call(self, out, lse):
        if "merge" not in names:
            self.merge(out, lse)
        if "reduce" not in names and self.sizes.tensor_ranks > 1:
            self.reduce()

    return call


@pytest.mark.parametrize(
    ("words", "names"), [(PAGES, ("merge", "reduce")), (PAGES, ("merge",)), (HEADS, ("reduce",))]
)
def test_a_timed_step_without_its_collectives_is_invalid(words, names, monkeypatch):
    monkeypatch.setattr(Exchange, "__call__", skipped(*names))
    row = timed_row(*words)
    assert row["status"] == "invalid"
    assert "gate of the timed step" in row["error"] and " 0 bytes moved" in row["error"]


def test_a_timed_step_without_attention_is_invalid(monkeypatch):
    def hollow(*given):
        monkeypatch.setattr(ops, "decode", lambda view, layer, q, plan, out, lse: (out, lse))
        return TIME_STEP(*given)

    monkeypatch.setattr(ranks_step, "time_step", hollow)
    row = timed_row(*PAGES)
    assert row["status"] == "invalid"
    assert "gate of the timed step: merged relative RMS nan" in row["error"]


@pytest.mark.parametrize(("out_by", "lse_by"), [(1.06, 0.0), (1.0, 0.01), (math.nan, 0.0)])
def test_a_wrong_merge_is_invalid(out_by, lse_by, monkeypatch):
    def wrong(*given):
        out, lse = MERGE(*given)
        return out.mul_(out_by), lse.add_(lse_by)

    monkeypatch.setattr(ops, "merge", wrong)
    row = timed_row(*PAGES)
    assert row["status"] == "invalid"
    assert row["error"].startswith("gate of merged ranks: ")
    assert "parallel_decode_step_ms" not in row


def test_a_rank_that_holds_other_values_makes_every_row_invalid(tmp_path):
    fault = ("fault.kind=flipped_signs", "fault.phase=decode", "fault.rank=1")
    words = ("parallel=context", "context=4K", "trial.prefill_histories=0")
    rows = rows_of(ranks(2, *words, *fault, timing=True, fill=1.0), tmp_path)
    assert [r["status"] for r in rows] == ["invalid", "invalid"]
    for row in rows:
        assert row["gate_error"] < MAX_RELATIVE_RMS < row["merged_gate_error"]
        assert row["error"].startswith("gate of merged ranks: ")
        assert not any(row.get(c) is not None for c in PERFORMANCE)


@pytest.mark.parametrize(
    ("errors", "passed"),
    [
        ((MAX_RELATIVE_RMS * 0.99, MAX_LSE_ERROR * 0.99, MAX_REDUCED_ERROR * 0.99), True),
        ((MAX_RELATIVE_RMS, 0.0, 0.0), False),
        ((0.0, MAX_LSE_ERROR, 0.0), False),
        ((0.0, 0.0, MAX_REDUCED_ERROR), False),
        ((math.nan, 0.0, 0.0), False),
        ((0.0, math.nan, 0.0), False),
        ((0.0, 0.0, math.nan), False),
        ((0.0, 0.0, 0.0, False), False),
    ],
)
def test_the_limits_of_merged_outputs(errors, passed):
    assert MergedGate(*errors).passed is passed


@pytest.mark.parametrize(
    ("left", "passed"),
    [
        ((MAX_MERGE_ERROR * 0.99, MAX_LSE_ERROR * 0.99, True, 8, 8), True),
        ((MAX_MERGE_ERROR, 0.0, True, 8, 8), False),
        ((math.nan, 0.0, True, 8, 8), False),
        ((0.0, MAX_LSE_ERROR, True, 8, 8), False),
        ((0.0, math.nan, True, 8, 8), False),
        ((0.0, 0.0, False, 8, 8), False),
        ((0.0, 0.0, True, 4, 8), False),
    ],
)
def test_the_limits_of_a_timed_step(left, passed):
    assert StepGate(*left).passed is passed
