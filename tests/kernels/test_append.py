"""Append: codes and their places against the definition, in the interpreter and on a GPU.

The interpreter rounds some float32 values to the wrong FP8 code, so there every value is a code
times a power of two; on a GPU any value must become the very code that the reference gives it.
"""

from __future__ import annotations

import pytest
import torch

from kernels import host, reference
from kernels.view import Geometry
from tests.kernels.cases import empty_view

GEOMETRIES = {
    "d128": Geometry(2, 2, 8, 128),
    "d64": Geometry(1, 3, 3, 64),
    "d256": Geometry(1, 1, 4, 256),
    "bf16": Geometry(1, 2, 2, 128, "bf16"),
    "page 16": Geometry(2, 1, 4, 128, page_tokens=16),
}
RUNS = ((0, 130), (130, 1), (250, 140), (507, 12), (512, 128))  # start, tokens


def values(geometry, tokens, device, exact, dtype):
    """K and V with a few that overflow; ``exact`` ones need no rounding with scales 1/2 and 1/4."""
    generator = torch.Generator().manual_seed(5)
    shape = (2, tokens, geometry.kv_heads, geometry.head_dim)
    x = torch.randn(shape, generator=generator) * 3
    x[:, ::7, :, ::5] *= 400
    if exact:
        x = x.clamp(-100, 100).to(torch.float8_e4m3fn).float()
    return x.to(device, dtype)


def expected_arena(view, layer, k, v, runs):
    """The arena as the host path, held to the layout by its own tests, leaves it."""
    dtype = view.geometry.kv_dtype
    arena = view.arena.cpu().clone()
    there = type(view)(
        arena, view.page_table.cpu(), view.lengths.cpu(), view.lengths_host, view.geometry,
        view.k_scale.cpu(), view.v_scale.cpu(),
    )  # fmt: skip
    codes = [
        reference.quantise(x.cpu(), scale.cpu()[:, None], dtype)
        for x, scale in ((k, view.k_scale), (v, view.v_scale))
    ]
    for start, tokens in runs:
        host.append_codes_run(there, layer, *(c[start : start + tokens] for c in codes), 0, start)
    return arena


def check_append(geometry, device, dtype, exact):
    """Runs with ragged ends, then single tokens of two rows: every byte of the arena."""
    from kernels.append import append, append_run

    view = empty_view(geometry, [640, 640], device=device, scales=[0.5] * geometry.kv_heads)
    view.v_scale.fill_(0.25 if exact else 0.3)
    layer = geometry.layers - 1
    x = values(geometry, 640, device, exact, dtype)
    want = expected_arena(view, layer, *x, RUNS)
    for start, tokens in RUNS:
        append_run(view, layer, *x[:, start : start + tokens], 0, start)
    assert torch.equal(view.arena.cpu(), want)

    view.arena.fill_(0xFF)
    order = torch.randperm(640, generator=torch.Generator().manual_seed(1))[:10]
    rows = (torch.arange(10) % 2).to(torch.int32)
    append(view, layer, *x[:, order.to(device)], rows.to(device), order.to(device))
    for index, (row, position) in enumerate(zip(rows.tolist(), order.tolist(), strict=True)):
        for head in range(geometry.kv_heads):
            k, v = reference.gather(view, layer, head, row, position, position + 1)
            for found, values_of, scale in ((k, x[0], view.k_scale), (v, x[1], view.v_scale)):
                value = values_of[order[index], head]
                code = reference.quantise(value, scale[head], geometry.kv_dtype)
                assert torch.equal(found[0], reference.dequantise(code, scale[head]))
    written = 10 * 2 * geometry.kv_heads * geometry.head_dim * geometry.itemsize
    assert (view.arena != 0xFF).sum() <= written


def check_strided(device):
    """K and V that are cut from one wider tensor are read with its strides."""
    from kernels.append import append_run

    geometry = Geometry(1, 2, 4, 128)
    view = empty_view(geometry, [300], device=device, scales=[0.5, 0.5])
    view.v_scale.fill_(0.25)
    wide = values(Geometry(1, 6, 6, 128), 300, device, True, torch.bfloat16)[0]
    k, v = wide[:, 1:3], wide[:, 4:6]
    want = expected_arena(view, 0, k, v, [(0, 260)])
    append_run(view, 0, k[:260], v[:260], 0, 0)
    assert torch.equal(view.arena.cpu(), want)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_interpreted(name, interpreter):
    interpreter(check_append, GEOMETRIES[name], "cpu", torch.float32, True)


def test_interpreted_strided(interpreter):
    interpreter(check_strided, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_on_gpu(name, dtype):
    check_append(GEOMETRIES[name], "cuda", dtype, False)


@pytest.mark.gpu
def test_on_gpu_strided():
    check_strided("cuda")


def test_bad_values_are_refused():
    from kernels.append import append, append_run

    geometry = Geometry(1, 2, 4, 128)
    view = empty_view(geometry, [10])
    x = torch.zeros(3, 2, 128)
    with pytest.raises(ValueError, match="k="):
        append_run(view, 0, x[:, :1], x[:, :1], 0, 0)
    with pytest.raises(ValueError, match="neighbours"):
        append_run(view, 0, x.transpose(1, 2).contiguous().transpose(1, 2), x, 0, 0)
    with pytest.raises(ValueError, match="layer=1"):
        append_run(view, 1, x, x, 0, 0)
    where = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows="):
        append(view, 0, x, x, where, where.long())
