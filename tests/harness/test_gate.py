"""The gate lets no figure through that wrong kernels made: each fault ends a trial as invalid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.cell import Cell
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS, GateResult, stored_values
from harness.synthetic import NEEDLE_AMPLITUDE
from harness.trial import Trial
from harness.workspace import BANK_TOKENS
from kernels import ops
from tests.harness.composed import made

TOKENS = 200_000
PLAIN = {"decode": ops.decode, "prefill": ops.prefill, "append_codes_run": ops.append_codes_run}


def gated(monkeypatch, **faults):
    """The row of a trial whose kernels are replaced."""
    for name, kernel in faults.items():
        monkeypatch.setattr(ops, name, kernel)
    settings = made("strategy=paged", "hardware=scale_model", f"context={TOKENS}")
    records = []
    trial = Trial([Cell(settings, TOKENS)], records.append, {})
    try:
        trial.run()
    finally:
        trial.device.close()
    (row,) = [r["row"] for r in records if r["type"] == "row"]
    return row


def with_table(name, change):
    """The kernel, reading pages through a table that ``change`` spoils."""

    def wrong(view, *rest):
        table = view.page_table.clone()
        change(table[0, : -(-view.lengths_host[0] // 128)])
        return PLAIN[name](replace(view, page_table=table), *rest)

    return wrong


def neighbours(pages):
    """Every other page is read as the one before it."""
    pages[1::2] = pages[0 : len(pages) - 1 : 2][: len(pages[1::2])]


def a_percent(pages):
    pages[50::100] = pages[49::100][: len(pages[50::100])]


def with_output(name, out_by=1.0, lse_by=0.0):
    """The kernel, its answers changed."""

    def wrong(view, layer, q, plan, out=None, lse=None):
        found = PLAIN[name](view, layer, q, plan, out, lse)
        found[0].mul_(out_by)
        found[1].add_(lse_by)
        return found

    return wrong


def another_head(view, layer, k, v, row, start):
    return PLAIN["append_codes_run"](view, layer, k, v.roll(1, -1), row, start)


FAULTS = {
    "decode reads every other page twice": {"decode": with_table("decode", neighbours)},
    "decode reads one page in 100 wrongly": {"decode": with_table("decode", a_percent)},
    "prefill reads every other page twice": {"prefill": with_table("prefill", neighbours)},
    "decode is normalised wrongly": {"decode": with_output("decode", out_by=1.06)},
    "decode's LSE is off": {"decode": with_output("decode", lse_by=0.01)},
    "prefill's LSE is off": {"prefill": with_output("prefill", lse_by=-0.01)},
    "prefill returns nothing": {"prefill": with_output("prefill", out_by=0.0)},
    "decode returns NaN": {"decode": with_output("decode", out_by=float("nan"))},
    "append stores V in other columns": {"append_codes_run": another_head},
}


def test_right_kernels_pass(monkeypatch):
    row = gated(monkeypatch)
    assert row["status"] == "ok"
    assert 0 < row["gate_error"] < MAX_RELATIVE_RMS / 2


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "bf16"])
def test_what_rounding_loses_is_told_beside_the_kernels_error(monkeypatch, dtype):
    """Against an attention of its own over the bank, before and after the dtype rounded it."""
    seen = {}

    def watched(view, layer, q, plan, out=None, lse=None):
        found = PLAIN["decode"](view, layer, q, plan, out, lse)
        seen.setdefault("decode", (q[0].double(), out[0].double().clone()))
        return found

    monkeypatch.setattr(ops, "decode", watched)
    words = ("hardware=scale_model", f"context={BANK_TOKENS}", f"model.kv_dtype={dtype}")
    settings = made("strategy=paged", "trial.prefill_histories=0", *words)
    records = []
    trial = Trial([Cell(settings, BANK_TOKENS)], records.append, {})
    try:
        trial.run()
        (content,) = trial.contents
    finally:
        trial.device.close()
    (row,) = [r["row"] for r in records if r["type"] == "row"]
    q, out = seen["decode"]
    (piece, *_) = pieces = list(content.pieces(0, 0, 0, BANK_TOKENS))

    def right(k_bank, v_bank):
        rows = torch.cat([torch.arange(p.lo, p.hi) for p in pieces])
        k = k_bank[rows, piece.k_shift : piece.k_shift + 64].double()
        v = v_bank[rows, piece.v_shift : piece.v_shift + 64].double()
        for n in content.needles[(0, 0)].values():
            k[n.position], v[n.position] = n.signs * NEEDLE_AMPLITUDE, n.value.double()
        return torch.softmax(q @ k.T / 8, 1) @ v

    stored = [stored_values(bank, dtype) for bank in (content.k_bank, content.v_bank)]
    for banks, name in ((stored, "decode_gate_error"), (content.values, "unrounded_decode_error")):
        want = right(*banks)
        error = ((out - want).norm() / want.norm()).item()
        assert row[name] == pytest.approx(error, rel=1e-3, abs=1e-9)
    lost = row["unrounded_decode_error"] / row["decode_gate_error"]
    assert lost > 1000 if dtype == "fp8_e4m3" else lost == 1
    assert row["gate_error"] >= row["decode_gate_error"] > 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_kernel_makes_the_row_invalid(monkeypatch, fault):
    row = gated(monkeypatch, **FAULTS[fault])
    assert row["status"] == "invalid", (row["gate_error"], row["gate_lse_error"])
    assert "attention_decode_step_ms" not in row
    assert "gate" in row["error"]


@pytest.mark.parametrize(
    ("rms", "lse", "passed"),
    [
        (MAX_RELATIVE_RMS * 0.99, MAX_LSE_ERROR * 0.99, True),
        (MAX_RELATIVE_RMS, 0.0, False),
        (0.0, MAX_LSE_ERROR, False),
        (float("nan"), 0.0, False),
        (0.0, float("nan"), False),
    ],
)
def test_the_limits(rms, lse, passed):
    assert GateResult(rms, lse, "", "").passed is passed


def test_the_reference_itself_sees_a_page_swapped_for_another():
    """What the gate claims of its sensitivity: the root of twice the share that is wrong."""
    generator = torch.Generator().manual_seed(1)
    k, v = (torch.randn(100_000, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    q = torch.randn(64, generator=generator, dtype=torch.float64)
    right = torch.softmax(k @ q / 8, 0) @ v
    for share in (0.5, 0.1, 0.01):
        wrong = k.clone(), v.clone()
        count = int(share * len(k))
        for x in wrong:
            x[:count] = x[-count:]
        got = torch.softmax(wrong[0] @ q / 8, 0) @ wrong[1]
        error = ((got - right).norm() / right.norm()).item()
        assert 0.5 * (2 * share) ** 0.5 < error < 2 * (2 * share) ** 0.5
