"""Prefill against float64: the portable kernel in the interpreter, every kernel on a GPU."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.prefill_scratch import prefill_scratch_bytes
from kernels.view import Geometry
from tests.kernels.cases import (
    empty_view,
    lse_error,
    lse_limit,
    random_case,
    random_q,
    relative_rms,
    store,
)

SM_COUNT = 3  # a small device, so that short chunks are cut as long ones are

# geometry, lengths, windows' starts, row, start of the chunk
CASES = {
    "gqa5": (Geometry(2, 1, 5, 128), (129, 700), (), 1, 640),
    "two heads, 4": (Geometry(1, 2, 8, 128), (515,), (), 0, 430),
    "from nothing": (Geometry(1, 1, 4, 128), (200,), (), 0, 0),
    "one token": (Geometry(1, 2, 2, 128), (257,), (), 0, 256),
    "gqa16, 3 heads": (Geometry(1, 3, 48, 128), (300,), (), 0, 290),
    "d64": (Geometry(2, 2, 8, 64), (300, 400), (), 0, 250),
    "d256": (Geometry(1, 1, 4, 256), (330,), (), 0, 300),
    "bf16 d128": (Geometry(1, 2, 6, 128, "bf16"), (300,), (), 0, 270),
    "bf16 d64": (Geometry(1, 1, 3, 64, "bf16"), (513,), (), 0, 480),
    "bf16 d256": (Geometry(1, 1, 3, 256, "bf16"), (130,), (), 0, 110),
    "window": (Geometry(1, 2, 10, 128), (900,), (384,), 0, 860),
    "window in a page": (Geometry(1, 1, 5, 128), (700,), (200,), 0, 660),
    "window in the chunk's page": (Geometry(1, 1, 5, 128), (700,), (660,), 0, 670),
    "page 16": (Geometry(2, 1, 5, 128, page_tokens=16), (1, 300), (), 1, 271),
    "page 16, two heads": (Geometry(1, 2, 8, 128, page_tokens=16), (360,), (), 0, 320),
    "page 32": (Geometry(1, 2, 4, 64, page_tokens=32), (290,), (), 0, 260),
    "page 64 window": (Geometry(1, 1, 2, 256, page_tokens=64), (400,), (70,), 0, 370),
    "page 16 bf16": (Geometry(1, 1, 2, 128, "bf16", page_tokens=16), (129,), (), 0, 100),
}


def expected(case, layer, row, start, q):
    """Float64 attention of the chunk, of values whose scales are applied."""
    window = case.view.starts[row]
    end = start + len(q)
    return reference.attention(
        q.double(),
        case.k[layer][row][window:end],
        case.v[layer][row][window:end],
        q.shape[2] ** -0.5,
        causal_from=start - window,
    )


def check_prefill(geometry, lengths, starts, row, start, device, sm_count=SM_COUNT, variant=None):
    """Every layer of a poisoned, shuffled batch; outputs and scratch start as NaN."""
    from kernels.prefill import plan_prefill, prefill

    case = random_case(geometry, lengths, starts=starts, device=device)
    tokens = lengths[row] - start
    q = random_q(geometry, tokens, device=device)
    count = sm_count or torch.cuda.get_device_properties(0).multi_processor_count
    nbytes = prefill_scratch_bytes(geometry, tokens, count)
    scratch = torch.empty(nbytes, dtype=torch.uint8, device=device)
    plan = plan_prefill(case.view, row, start, tokens, sm_count, scratch, variant)
    for layer in range(geometry.layers):
        out, lse = prefill(case.view, layer, q, plan, q_scale=0.5)
        want, want_lse = expected(case, layer, row, start, q.float() * 0.5)
        assert not out.isnan().any() and not lse.isnan().any()
        assert relative_rms(out, want) < (4e-2 if geometry.kv_dtype == "fp8_e4m3" else 8e-3)
        assert lse_error(lse, want_lse) < 2e-3
    return plan.variant


def check_needle(device, variant=None, tokens=520, needle=387):
    """One key that one query matches gives its value back."""
    from kernels.prefill import plan_prefill, prefill

    geometry = Geometry(1, 1, 4, 128)
    view = empty_view(geometry, [tokens], device=device, scales=[1.0])
    generator = torch.Generator().manual_seed(3)
    k = torch.randn((tokens, 1, 128), generator=generator).to(torch.float8_e4m3fn)
    v = torch.randn((tokens, 1, 128), generator=generator).to(torch.float8_e4m3fn)
    q = torch.randn((40, 4, 128), generator=generator).to(torch.float8_e4m3fn)
    k[needle, 0] = q[11, 2]
    store(view, 0, 0, k.to(device), v.to(device))
    plan = plan_prefill(view, 0, tokens - 40, 40, SM_COUNT, variant=variant)
    out, _ = prefill(view, 0, q.to(device), plan, sm_scale=1.0)
    value = reference.dequantise(v[needle, 0].to(device), view.v_scale[0])
    assert (out[11, 2].double() - value).abs().max() < 0.05 * value.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name, interpreter):
    interpreter(check_prefill, *CASES[name], "cpu")


def test_interpreted_needle(interpreter):
    interpreter(check_needle, "cpu")


def check_far_pages(device, variant=None, page_tokens=128):
    """Pages beyond 2^32 bytes and elements of the arena."""
    from kernels.prefill import plan_prefill, prefill

    geometry = Geometry(2, 2, 8, 128, page_tokens=page_tokens)
    far = 2**32 // geometry.page_bytes
    case = random_case(geometry, (200,), device=device, first_page=far)
    q = random_q(geometry, 30, device=device)
    plan = plan_prefill(case.view, 0, 170, 30, SM_COUNT, variant=variant)
    out, lse = prefill(case.view, 1, q, plan)
    want, want_lse = expected(case, 1, 0, 170, q)
    assert relative_rms(out, want) < 4e-2
    assert lse_error(lse, want_lse) < 2e-3


@pytest.mark.parametrize("page_tokens", [128, 16])
def test_interpreted_far_pages(interpreter, page_tokens):
    interpreter(check_far_pages, "cpu", None, page_tokens)


def both_kernels(geometry, window):
    """Names of the kernels that can run a shape: the Hopper one and the portable one."""
    from kernels.prefill_config import HOPPER, gluon_fits

    return [*((HOPPER.variant,) if gluon_fits(geometry, window) else ()), "triton"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_gpu(name):
    geometry, lengths, starts, row, start = CASES[name]
    for variant in both_kernels(geometry, starts[row] if starts else 0):
        for sm_count in (SM_COUNT, None):
            check_prefill(geometry, lengths, starts, row, start, "cuda", sm_count, variant)


# tokens, group, total, spread of K, mean of V
AGREE = [
    (300, 5, 3001, 1, 0),
    (256, 8, 256, 1.5, 0.3),
    (77, 8, 20000, 2, 0.6),
    (640, 16, 9000, 1, 0),
    (1, 1, 1, 1, 0),
    (130, 1, 130, 1, 0),
    (200, 4, 5000, 0.2, -3),
    (500, 8, 700, 0.01, 1),
]


@pytest.mark.gpu
@pytest.mark.parametrize("tokens, group, total, spread, mean", AGREE)
def test_on_gpu_kernels_agree(tokens, group, total, spread, mean):
    """Flat and sharp attention, V with a mean, and scores that are all negative."""
    from kernels.prefill import plan_prefill, prefill

    geometry = Geometry(2, 2, 2 * group, 128)
    case = random_case(geometry, (total,), device="cuda", v_mean=mean, spread=spread)
    q = random_q(geometry, tokens, device="cuda")
    want, want_lse = expected(case, 1, 0, total - tokens, q)
    for variant in both_kernels(geometry, 0):
        plan = plan_prefill(case.view, 0, total - tokens, tokens, variant=variant)
        out, lse = prefill(case.view, 1, q, plan)
        assert relative_rms(out, want) < 4e-2, variant
        assert lse_error(lse, want_lse) < 2e-3, variant


@pytest.mark.gpu
def test_on_gpu_scores_below_zero():
    """Maxima that stay negative from the first tile to the last, and some that turn positive."""
    from kernels.prefill import plan_prefill, prefill

    geometry, tokens, total = Geometry(1, 1, 4, 128), 100, 3000
    view = empty_view(geometry, [total], device="cuda", scales=[1.0])
    generator = torch.Generator().manual_seed(5)
    k = torch.randn((total, 1, 128), generator=generator) * 0.1 - 1
    k[1500:1600] += 1.5
    v = torch.randn((total, 1, 128), generator=generator)
    k, v = (reference.quantise(x, 1.0, "fp8_e4m3").cuda() for x in (k, v))
    store(view, 0, 0, k, v)
    q = (torch.rand((tokens, 4, 128), generator=generator) + 0.1).to(torch.float8_e4m3fn).cuda()
    q[50:] = (-q[50:].float()).to(q.dtype)
    dequantised = [reference.dequantise(x, s[0]) for x, s in ((k, view.k_scale), (v, view.v_scale))]
    want, want_lse = reference.attention(
        q.double(), *dequantised, sm_scale=0.3, causal_from=total - tokens
    )
    for variant in both_kernels(geometry, 0):
        plan = plan_prefill(view, 0, total - tokens, tokens, variant=variant)
        out, lse = prefill(view, 0, q, plan, sm_scale=0.3)
        assert relative_rms(out, want) < 4e-2, variant
        assert lse_error(lse, want_lse) < lse_limit(want_lse), variant


@pytest.mark.gpu
def test_on_gpu_needle_and_far_pages():
    for variant in both_kernels(Geometry(1, 1, 4, 128), 0):
        check_needle("cuda", variant)
        check_far_pages("cuda", variant)
    check_far_pages("cuda", "triton", page_tokens=16)
