"""Long contexts on a GPU: error, needles, CUDA graphs, and that nothing compiles once warm."""

from __future__ import annotations

import pytest
import torch

from kernels import ops, reference
from kernels.view import Geometry, View
from tests.kernels.cases import POISON, lse_error, lse_limit, random_q, relative_rms

pytestmark = pytest.mark.gpu

MI = 1 << 20


def long_view(geometry, lengths, v_mean=0.5):
    """Random codes in every page behind a shuffled table; what follows a sequence is poison."""
    counts = [-(-n // geometry.page_tokens) for n in lengths]
    total = sum(counts)
    generator = torch.Generator("cuda").manual_seed(0)
    arena = torch.empty(total * geometry.page_bytes, dtype=torch.uint8, device="cuda")
    by_tile = arena.view(total, geometry.layers, 2, geometry.kv_heads, geometry.tile_bytes)
    dtype = reference.DTYPES[geometry.kv_dtype]
    for kv, mean in ((0, 0.0), (1, v_mean)):
        for pages in by_tile[:, :, kv].split(4096):
            shape = (*pages.shape[:-1], pages.shape[-1] // geometry.itemsize)
            x = torch.randn(shape, device="cuda", generator=generator) + mean
            pages.copy_(x.to(dtype).view(torch.uint8).view(pages.shape))
    order = torch.randperm(total, device="cuda", generator=generator).to(torch.int32)
    table = order[:1].repeat(len(lengths), max(counts))
    used = 0
    for row, (tokens, count) in enumerate(zip(lengths, counts, strict=True)):
        table[row, :count] = order[used : used + count]
        used += count
        if tail := tokens % geometry.page_tokens:
            last = by_tile[int(table[row, count - 1])]
            k = last[:, 0].unflatten(-1, (geometry.page_tokens, -1))
            v = last[:, 1].unflatten(-1, (geometry.head_dim, geometry.page_tokens, -1))
            k[..., tail:, :] = POISON
            v[..., tail:, :] = POISON
    one = torch.ones(geometry.kv_heads, device="cuda")
    return View(
        arena, table, torch.tensor(lengths, device="cuda"), tuple(lengths), geometry, one, one * 0.5
    )


def expected(view, layer, q):
    """Float64 attention of every sequence and head, streamed."""
    g = view.geometry
    out = torch.empty(q.shape, dtype=torch.float64, device="cuda")
    lse = torch.empty(q.shape[:2], dtype=torch.float64, device="cuda")
    for row in range(view.sequences):
        for head in range(g.kv_heads):
            mine = slice(head * g.group, (head + 1) * g.group)
            scale = g.head_dim**-0.5
            o, s = reference.attend(view, layer, head, row, q[row : row + 1, mine].double(), scale)
            out[row, mine], lse[row, mine] = o[0], s[0]
    return out, lse


@pytest.mark.parametrize(
    ("geometry", "lengths"),
    [
        (Geometry(1, 1, 5, 128), [MI]),
        (Geometry(1, 2, 8, 128), [MI - 37, 5000]),
        (Geometry(1, 1, 4, 64), [MI + 1]),
        (Geometry(1, 1, 4, 256), [MI // 2 + 77]),
        (Geometry(1, 1, 5, 128, "bf16"), [MI // 2]),
        (Geometry(1, 1, 5, 128, page_tokens=16), [MI // 2 + 3]),
        (Geometry(1, 1, 5, 128), [1024 + 4099 * i for i in range(48)]),
    ],
    ids=str,
)
def test_error_of_long_contexts(geometry, lengths):
    view = long_view(geometry, lengths)
    q = random_q(geometry, len(lengths), device="cuda")
    out, lse = ops.decode(view, 0, q, ops.plan_decode(view))
    want, want_lse = expected(view, 0, q)
    assert relative_rms(out, want) < (3e-2 if geometry.kv_dtype == "fp8_e4m3" else 4e-3)
    assert lse_error(lse, want_lse) < 1e-3


@pytest.mark.parametrize("tokens", [MI, 10 * MI])
def test_needles_are_found(tokens):
    geometry = Geometry(1, 1, 4, 128)
    view = long_view(geometry, [tokens])
    generator = torch.Generator("cuda").manual_seed(1)
    positions = [0, 130, tokens // 3, tokens - 1]
    signs = torch.randint(0, 2, (4, 1, 128), device="cuda", generator=generator) * 2.0 - 1
    values = torch.randn((4, 1, 128), device="cuda", generator=generator)
    ops.append(
        view, 0, (signs * 8).bfloat16(), values.bfloat16(),
        torch.zeros(4, dtype=torch.int32, device="cuda"), torch.tensor(positions, device="cuda"),
    )  # fmt: skip
    q = signs.view(1, 4, 128).to(torch.float8_e4m3fn)
    out, _ = ops.decode(view, 0, q, ops.plan_decode(view))
    for head, position in enumerate(positions):
        _, v = reference.gather(view, 0, 0, 0, position, position + 1)
        assert (out[0, head].double() - v[0]).abs().max() < 0.05 * v.abs().max()


@pytest.mark.parametrize("tokens", [3000, 1 << 17])
def test_a_graph_of_layers_gives_the_bits_of_single_steps(tokens):
    geometry = Geometry(8, 2, 10, 128)
    view = long_view(geometry, [tokens, tokens // 3])
    q = random_q(geometry, 2, device="cuda")
    plan = ops.plan_decode(view)
    want = []
    for layer in range(8):
        want.append(ops.decode(view, layer, q, plan))
        torch.cuda.synchronize()
    outs = [torch.empty_like(out) for out, _ in want]
    lses = [torch.empty_like(lse) for _, lse in want]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(8):
            ops.decode(view, layer, q, plan, outs[layer], lses[layer])
    for _ in range(20):
        graph.replay()
    torch.cuda.synchronize()
    for layer in range(8):
        assert torch.equal(outs[layer], want[layer][0])
        assert torch.equal(lses[layer], want[layer][1])


def test_decode_sees_what_the_kernel_before_appended():
    geometry = Geometry(1, 1, 4, 128)
    view = long_view(geometry, [1 << 17])
    plan = ops.plan_decode(view)
    q = random_q(geometry, 1, device="cuda")
    generator = torch.Generator("cuda").manual_seed(2)
    for _ in range(5):
        x = torch.randn((2, 256, 1, 128), device="cuda", generator=generator).bfloat16() * 4
        ops.append_run(view, 0, x[0], x[1], 0, (1 << 17) - 256)
        out, lse = ops.decode(view, 0, q, plan)
        want, want_lse = expected(view, 0, q)
        assert relative_rms(out, want) < 3e-2
        assert lse_error(lse, want_lse) < lse_limit(want_lse)


def loaded_kernels():
    """How many compiled forms of the kernels this process holds."""
    from kernels.append import append_tiles_kernel, append_tokens_kernel
    from kernels.decode_kernel import decode_kernel
    from kernels.merge import merge_kernel

    kernels = (append_tiles_kernel, append_tokens_kernel, decode_kernel, merge_kernel)
    return [len(kernel.device_caches[0][0]) for kernel in kernels]


@pytest.mark.parametrize("geometry", [Geometry(2, 2, 8, 128), Geometry(2, 1, 4, 64)], ids=str)
def test_a_warm_geometry_compiles_nothing_more(geometry):
    from kernels.warm import warm_up

    warm_up(geometry, "cuda:0")
    before = loaded_kernels()
    for lengths in ([1], [700, 129, 5], [1 << 17, 300], [MI]):
        view = long_view(geometry, lengths)
        q = random_q(geometry, len(lengths), device="cuda")
        ops.decode(view, 1, q, ops.plan_decode(view))
        x = torch.zeros((1, geometry.kv_heads, geometry.head_dim), device="cuda").bfloat16()
        where = torch.zeros(1, dtype=torch.int32, device="cuda")
        ops.append(view, 1, x, x, where, where.long())
        run = x.expand(lengths[0], -1, -1).contiguous()
        ops.append_run(view, 0, run, run, 0, 0)
    assert loaded_kernels() == before
