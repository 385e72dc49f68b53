"""Merging partial attention against float64 attention over the whole."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from kernels import host, ops, reference
from tests.kernels.cases import lse_error, relative_rms


def parts(pieces, heads=3, width=96, device="cpu", dtype=torch.float32):
    """Partials of uneven pieces of one sequence, one of them empty, and the whole's attention."""
    generator = torch.Generator().manual_seed(pieces)
    tokens = 8 * pieces
    q = torch.randn((1, heads, width), generator=generator).double() * 3
    k, v = torch.randn((2, tokens, 1, width), generator=generator).double()
    cuts = torch.randperm(tokens - 1, generator=generator)[: pieces - 2].sort().values + 1
    bounds = [0, *cuts.tolist(), tokens]
    outs, lses = [], []
    for lo, hi in pairwise(bounds):
        out, lse = reference.attention(q, k[lo:hi], v[lo:hi], 0.2)
        outs.append(out[0])
        lses.append(lse[0])
    outs.insert(1, torch.full_like(outs[0], torch.nan))  # saw nothing, wrote nothing
    lses.insert(1, torch.full_like(lses[0], -torch.inf))
    whole = [x[0].to(device) for x in reference.attention(q, k, v, 0.2)]
    return torch.stack(outs).to(device, dtype), torch.stack(lses).float().to(device), *whole


def check_merge(pieces, device, dtype=torch.float32):
    from kernels.merge import merge

    outs, lses, want, want_lse = parts(pieces, device=device, dtype=dtype)
    out, lse = merge(outs, lses)
    assert out.dtype == dtype
    assert relative_rms(out, want) < (1e-6 if dtype == torch.float32 else 8e-3)
    assert lse_error(lse, want_lse) < 1e-5
    into = torch.empty_like(want, dtype=torch.float32)
    found, _ = merge(outs, lses, into)
    assert found is into and relative_rms(into, want) < 8e-3
    nothing, none = merge(outs, torch.full_like(lses, -torch.inf))
    assert (nothing == 0).all() and (none == -torch.inf).all()


@pytest.mark.parametrize("pieces", [2, 16, 40])
def test_interpreted(pieces, interpreter):
    interpreter(check_merge, pieces, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pieces", [2, 8, 16, 100, 250, 400, 700])
def test_on_gpu(pieces, dtype):
    check_merge(pieces, "cuda", dtype)


@pytest.mark.parametrize("pieces", [2, 3, 8, 100])
def test_on_the_host(pieces):
    outs, lses, want, want_lse = parts(pieces)
    out, lse = ops.merge(outs, lses)
    assert relative_rms(out, want) < 1e-6
    assert lse_error(lse, want_lse) < 1e-5
    nothing, none = host.merge(outs, torch.full_like(lses, -torch.inf))
    assert (nothing == 0).all() and (none == -torch.inf).all()


def test_bad_shapes_are_refused():
    from kernels.merge import merge

    with pytest.raises(ValueError, match="lses="):
        merge(torch.zeros(2, 3, 64), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="contiguous"):
        merge(torch.zeros(2, 64, 3).transpose(1, 2), torch.zeros(2, 3))
