"""Batches of random K/V in a poisoned arena behind a shuffled page table."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass

import torch

from kernels import reference
from kernels.view import View

POISON = 0xFF  # NaN in E4M3, and NaN in BF16 when doubled


@dataclass
class Case:
    """A view and the very K/V (float64 values, ``[layers][row] -> [N, kv_heads, D]``) it holds."""

    view: View
    k: list[list[torch.Tensor]]
    v: list[list[torch.Tensor]]

    def expected_decode(self, layer, q, sm_scale, q_scale=1.0):
        """Float64 attention of one query a sequence over the tokens that its window shows."""
        outs, lses = [], []
        for row, start in enumerate(self.view.starts):
            out, lse = reference.attention(
                q[row : row + 1].double() * q_scale,
                self.k[layer][row][start:],
                self.v[layer][row][start:],
                sm_scale,
            )
            outs.append(out[0])
            lses.append(lse[0])
        return torch.stack(outs), torch.stack(lses)


def _arena(nbytes, device, sparse):
    if not sparse or device != "cpu":
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return torch.frombuffer(mmap.mmap(-1, nbytes, flags=flags), dtype=torch.uint8)


def empty_view(
    geometry, lengths, *, device="cpu", starts=(), seed=0, spare_pages=3, scales=None, first_page=0
):
    """A view whose pages, from ``first_page`` on, are NaN codes and dealt in a shuffled order.

    With a ``first_page`` the arena before it is address space that nothing touches.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-n // geometry.page_tokens) for n in lengths]
    total = sum(counts) + spare_pages
    order = torch.randperm(total, generator=generator).to(torch.int32)
    table = torch.full((len(lengths), max(1, *counts)), int(order[-1]), dtype=torch.int32)
    used = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[used : used + count]
        used += count
    arena = _arena((first_page + total) * geometry.page_bytes, device, first_page)
    arena[first_page * geometry.page_bytes :] = POISON
    table += first_page
    if scales is None:
        scales = [1.0 / 4 + head / 8 for head in range(geometry.kv_heads)]
    scale = torch.tensor(scales, dtype=torch.float32, device=device)
    return View(
        arena=arena,
        page_table=table.to(device),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        lengths_host=tuple(lengths),
        geometry=geometry,
        k_scale=scale,
        v_scale=scale * 1.5,
        starts_host=tuple(starts),
    )


def store(view, layer, row, k_codes, v_codes):
    """Lay codes ``[N, kv_heads, D]`` out by the definition of the layout, token by token's page."""
    g = view.geometry
    for index in range(-(-len(k_codes) // g.page_tokens)):
        page = int(view.page_table[row, index])
        k_page = k_codes[index * g.page_tokens : (index + 1) * g.page_tokens]
        v_page = v_codes[index * g.page_tokens : (index + 1) * g.page_tokens]
        for head in range(g.kv_heads):
            tiles = []
            for kv in (0, 1):
                at = g.tile_offset(page, layer, kv, head)
                tiles.append(view.arena[at : at + g.tile_bytes].view(k_codes.dtype))
            tiles[0].view(g.page_tokens, g.head_dim)[: len(k_page)] = k_page[:, head]
            tiles[1].view(g.head_dim, g.page_tokens)[:, : len(v_page)] = v_page[:, head].T


def random_case(
    geometry, lengths, *, device="cpu", starts=(), seed=0, v_mean=0.5, spread=1.0, first_page=0
):
    """Random K/V in every layer of a poisoned arena; V has a mean."""
    view = empty_view(
        geometry, lengths, device=device, starts=starts, seed=seed, first_page=first_page
    )
    generator = torch.Generator().manual_seed(seed + 1)
    all_k, all_v = [], []
    for layer in range(geometry.layers):
        ks, vs = [], []
        for row, tokens in enumerate(lengths):
            shape = (tokens, geometry.kv_heads, geometry.head_dim)
            k = torch.randn(shape, generator=generator).to(device) * spread
            v = (torch.randn(shape, generator=generator) + v_mean).to(device)
            k = reference.quantise(k, view.k_scale[:, None], geometry.kv_dtype)
            v = reference.quantise(v, view.v_scale[:, None], geometry.kv_dtype)
            store(view, layer, row, k, v)
            ks.append(reference.dequantise(k, view.k_scale[:, None]))
            vs.append(reference.dequantise(v, view.v_scale[:, None]))
        all_k.append(ks)
        all_v.append(vs)
    return Case(view, all_k, all_v)


def random_q(geometry, tokens, *, device="cpu", seed=7, dtype=None):
    """Queries ``[tokens, q_heads, D]`` in the dtype that the K/V's kernels take."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn((tokens, geometry.q_heads, geometry.head_dim), generator=generator)
    return q.to(device).to(dtype or reference.DTYPES[geometry.kv_dtype])


def relative_rms(found, expected):
    """Root-mean-square error over root-mean-square of the expected values."""
    error = (found.double() - expected).square().sum().item()
    return math.sqrt(error / expected.square().sum().item())


def lse_error(found, expected):
    """Largest absolute error of a log-sum-exp; equal infinities count as none."""
    difference = (found.double() - expected).abs()
    return torch.where(found.double() == expected, 0.0, difference).max().item()


def lse_limit(expected):
    """What an FP8 kernel's LSE may be off by where scores are large.

    The tensor cores sum a score of D = 128 in four steps and cut each sum off at 14 bits, so that
    it may lack 4 x 2^-13 of itself; LSE is at least the largest score.
    """
    return max(2e-3, 2.0**-11 * expected.abs().max().item())
