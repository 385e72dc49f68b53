"""Decode against float64: in the interpreter on small shapes, and on a GPU.

The interpreter reads an FP8 NaN as 480, so there only the BF16 cases show that poison behind a
sequence's last token stays out; on a GPU all of them do.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kernels import reference
from kernels.view import Geometry
from tests.kernels.cases import lse_error, random_case, random_q, relative_rms

RAGGED = (1, 127, 128, 129, 700)
SM_COUNT = 3  # a small device, so that short sequences are cut as long ones are

CASES = {
    "gqa5": (Geometry(2, 1, 5, 128), RAGGED, ()),
    "two heads, 4": (Geometry(1, 2, 8, 128), (300, 1, 515), ()),
    "mha": (Geometry(1, 2, 2, 128), (257,), ()),
    "gqa16": (Geometry(1, 1, 16, 128), (640, 129), ()),
    "gqa20": (Geometry(1, 1, 20, 128), (300,), ()),
    "d64": (Geometry(2, 2, 8, 64), RAGGED, ()),
    "d256": (Geometry(1, 1, 4, 256), (1, 65, 400), ()),
    "bf16 d128": (Geometry(1, 2, 6, 128, "bf16"), (129, 260), ()),
    "bf16 d64": (Geometry(1, 1, 3, 64, "bf16"), (513,), ()),
    "bf16 d256": (Geometry(1, 1, 3, 256, "bf16"), (130,), ()),
    "window": (Geometry(1, 2, 10, 128), (700, 385, 129, 60), (128, 200, 128, 31)),
    "page 16": (Geometry(2, 1, 5, 128, page_tokens=16), (1, 15, 17, 300), ()),
    "page 32": (Geometry(1, 2, 4, 64, page_tokens=32), (33, 290), ()),
    "page 64 window": (Geometry(1, 1, 2, 256, page_tokens=64), (200, 129), (70, 64)),
    "page 16 bf16": (Geometry(1, 1, 2, 128, "bf16", page_tokens=16), (77, 129), ()),
}


def check_decode(geometry, lengths, starts, device, sm_count=SM_COUNT):
    """Every layer of a poisoned, shuffled batch; partials and outputs start as NaN."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    case = random_case(geometry, lengths, starts=starts, device=device)
    q = random_q(geometry, len(lengths), device=device)
    plan = plan_decode(case.view, sm_count)
    for layer in range(geometry.layers):
        out, lse = decode(case.view, layer, q, plan, q_scale=0.5)
        want, want_lse = case.expected_decode(layer, q, geometry.head_dim**-0.5, q_scale=0.5)
        assert not out.isnan().any() and not lse.isnan().any()
        assert relative_rms(out, want) < (4e-2 if geometry.kv_dtype == "fp8_e4m3" else 6e-3)
        assert lse_error(lse, want_lse) < 1e-3
    return len(plan.cut.merges)


def check_needle(device, tokens=520, needle=387):
    """One key that the query matches gives its value back, wherever it lies."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode
    from tests.kernels.cases import empty_view, store

    geometry = Geometry(1, 1, 4, 128)
    view = empty_view(geometry, [tokens], device=device, scales=[1.0])
    generator = torch.Generator().manual_seed(3)
    k = torch.randn((tokens, 1, 128), generator=generator).to(torch.float8_e4m3fn)
    v = torch.randn((tokens, 1, 128), generator=generator).to(torch.float8_e4m3fn)
    q = torch.randn((1, 4, 128), generator=generator).to(torch.float8_e4m3fn)
    k[needle, 0] = q[0, 2]
    store(view, 0, 0, k.to(device), v.to(device))
    q = q.to(device)
    out, _ = decode(view, 0, q, plan_decode(view, SM_COUNT), sm_scale=1.0)
    value = reference.dequantise(v[needle, 0].to(device), view.v_scale[0])
    assert (out[0, 2].double() - value).abs().max() < 0.05 * value.abs().max()


def check_empty(device):
    """A sequence without visible tokens gives 0 and -inf beside others that have some."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    geometry = Geometry(1, 2, 4, 128)
    case = random_case(geometry, (0, 300, 128), starts=(0, 0, 128), device=device)
    q = random_q(geometry, 3, device=device)
    out, lse = decode(case.view, 0, q, plan_decode(case.view, SM_COUNT))
    for row in (0, 2):
        assert (out[row] == 0).all()
        assert (lse[row] == -torch.inf).all()
    want, _ = case.expected_decode(0, q, 128**-0.5)
    assert relative_rms(out[1], want[1]) < 4e-2


def check_repeatable(device):
    """The same inputs give the same bits, into the caller's own scratch and outputs."""
    from kernels.config import decode_scratch_bytes
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    geometry = Geometry(1, 1, 5, 128)
    case = random_case(geometry, (700, 300), device=device)
    q = random_q(geometry, 2, device=device)
    scratch = torch.empty(
        decode_scratch_bytes(geometry, 2, SM_COUNT), dtype=torch.uint8, device=device
    )
    plan = plan_decode(case.view, SM_COUNT, scratch)
    assert plan.cut.merges
    out, lse = decode(case.view, 0, q, plan)
    again, again_lse = torch.empty_like(out), torch.empty_like(lse)
    found = decode(case.view, 0, q, plan_decode(case.view, SM_COUNT), again, again_lse)
    assert found[0] is again and found[1] is again_lse
    assert torch.equal(out, again) and torch.equal(lse, again_lse)


def check_promise(device):
    """Loads that start early bring the same bits, however many tokens are still to come."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    geometry = Geometry(1, 1, 5, 128)
    case = random_case(geometry, (1, 128, 700, 1285), starts=(0, 0, 130, 0), device=device)
    q = random_q(geometry, 4, device=device)
    want, want_lse = decode(case.view, 0, q, plan_decode(case.view, SM_COUNT))
    for tokens in (0, 1, 128, 600, 2000):
        plan = plan_decode(case.view, SM_COUNT, unsettled_tokens=tokens)
        out, lse = decode(case.view, 0, q, plan)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)


def newest_tokens_are_seen(geometry, first, steps):
    """Append and decode in one CUDA graph, a token a step, each layer after its append.

    Every decode is launched while its append may still run, with the promise that one token is
    unsettled; pages begin and end on the way.
    """
    from kernels.append import append
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    rows = len(first)
    case = random_case(geometry, [n + steps for n in first], device="cuda")
    view, kept = case.view, case.view.arena.clone()
    shape = (steps, geometry.layers, rows, geometry.kv_heads, geometry.head_dim)
    generator = torch.Generator("cuda").manual_seed(11)
    k, v = (torch.randn(shape, device="cuda", generator=generator).bfloat16() for _ in range(2))
    q = random_q(geometry, rows, device="cuda")
    at = torch.arange(rows, dtype=torch.int32, device="cuda")
    calls, found = [], []
    for step in range(steps):
        lengths = [n + step + 1 for n in first]
        seen = dataclasses.replace(view, lengths_host=tuple(lengths))
        plan = plan_decode(seen, unsettled_tokens=1)
        positions = torch.tensor(lengths, device="cuda") - 1
        for layer in range(geometry.layers):
            out = torch.full(q.shape, torch.nan, device="cuda")
            lse = torch.full(q.shape[:2], torch.nan, device="cuda")
            calls.append((seen, layer, step, positions, plan, out, lse))

    def run():
        for seen, layer, step, positions, plan, out, lse in calls:
            append(seen, layer, k[step, layer], v[step, layer], at, positions)
            decode(seen, layer, q, plan, out, lse)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    view.arena.copy_(kept)
    graph.replay()
    torch.cuda.synchronize()
    for seen, layer, _, _, _, out, lse in calls:
        want, want_lse = decode(seen, layer, q, plan_decode(seen))
        torch.cuda.synchronize()
        found.append(torch.equal(out, want) and torch.equal(lse, want_lse))
    assert all(found)


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreter):
    interpreter(check_decode, *CASES[name], "cpu")


def test_interpreted_needle(interpreter):
    interpreter(check_needle, "cpu")


def test_interpreted_empty_sequence(interpreter):
    interpreter(check_empty, "cpu")


def test_interpreted_is_repeatable(interpreter):
    interpreter(check_repeatable, "cpu")


def test_interpreted_promise(interpreter):
    interpreter(check_promise, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("sm_count", [SM_COUNT, None], ids=["few programs", "all"])
def test_on_gpu(name, sm_count):
    check_decode(*CASES[name], "cuda", sm_count)


@pytest.mark.gpu
def test_on_gpu_needle_empty_repeatable():
    check_needle("cuda")
    check_empty("cuda")
    check_repeatable("cuda")
    check_promise("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("geometry", [Geometry(3, 1, 5, 128), Geometry(2, 2, 8, 128, "bf16")],
                         ids=["fp8", "bf16"])  # fmt: skip
@pytest.mark.parametrize("first", [(120,), (1016, 380, 90), (130_680,)], ids=str)
def test_on_gpu_newest_tokens_are_seen(geometry, first):
    newest_tokens_are_seen(geometry, first, steps=12)


def test_bad_queries_are_refused():
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    geometry = Geometry(1, 1, 4, 128)
    case = random_case(geometry, (5,))
    plan = plan_decode(case.view, 1)
    q = random_q(geometry, 1)
    with pytest.raises(ValueError, match="q="):
        decode(case.view, 0, q[:, :3].contiguous(), plan)
    with pytest.raises(ValueError, match="fp8_e4m3 K/V takes"):
        decode(case.view, 0, q.to(torch.bfloat16), plan)
    with pytest.raises(ValueError, match="layer=1"):
        decode(case.view, 1, q, plan)
    other = dataclasses.replace(case.view, arena=case.view.arena.clone())
    with pytest.raises(ValueError, match="another arena"):
        decode(other, 0, q, plan)
