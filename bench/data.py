"""Arenas of random K/V behind a page table, and queries, on the device or tiny on the host."""

from __future__ import annotations

import dataclasses

import torch

from kernels.reference import DTYPES
from kernels.view import Geometry, View

BANK_BYTES = 1 << 28


def device() -> str:
    """The GPU, or the host when there is none."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def random_bytes(nbytes: int, dtype: str) -> torch.Tensor:
    """uint8 tensor of random normal codes; past 256 MiB a bank of them is repeated, shifted."""
    out = torch.empty(nbytes, dtype=torch.uint8, device=device())
    bank = torch.empty(min(BANK_BYTES, nbytes), dtype=torch.uint8, device=device())
    width = 1 if dtype == "fp8_e4m3" else 2
    for part in bank.split(1 << 26):
        values = torch.randn(part.numel() // width, device=device(), dtype=torch.float32)
        part.copy_(values.to(DTYPES[dtype]).view(torch.uint8))
    for index, part in enumerate(out.split(bank.numel())):
        part.copy_(bank.roll(index * 4096)[: part.numel()])
    return out


def make_view(lengths: list[int], geometry: Geometry, shuffled: bool = True) -> View:
    """A batch of sequences whose pages are dealt in a shuffled order, or in order."""
    counts = [-(-length // geometry.page_tokens) for length in lengths]
    total = sum(counts)
    arena = random_bytes(total * geometry.page_bytes, geometry.kv_dtype)
    one = torch.ones(geometry.kv_heads, device=device())
    view = View(
        arena=arena,
        page_table=torch.empty(0),
        lengths=torch.tensor(lengths, dtype=torch.int64, device=device()),
        lengths_host=tuple(lengths),
        geometry=geometry,
        k_scale=one,
        v_scale=one,
    )
    return with_table(view, shuffled)


def with_table(view: View, shuffled: bool) -> View:
    """The same memory behind a new page table."""
    size = view.geometry.page_tokens
    counts = [-(-length // size) for length in view.lengths_host]
    total = sum(counts)
    order = torch.randperm(total) if shuffled else torch.arange(total)
    table = torch.full((len(counts), max(counts)), int(order[0]), dtype=torch.int32)
    at = 0
    for row, count in enumerate(counts):
        table[row, :count] = order[at : at + count]
        at += count
    return dataclasses.replace(view, page_table=table.to(view.arena.device))


def queries(geometry: Geometry, tokens: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``[tokens, q_heads, D]`` random normal queries in the dtype that the K/V's kernels take."""
    x = torch.randn(tokens, geometry.q_heads, geometry.head_dim, device=device())
    return x.to(dtype or DTYPES[geometry.kv_dtype])


def peer_layout(view: View, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of a layer as peers want them: ``[pages, page_tokens, kv_heads, D]``, a copy."""
    g = view.geometry
    pages = view.arena.view(DTYPES[g.kv_dtype]).view(-1, g.layers, 2, g.kv_heads, g.tile_bytes)
    k = pages[:, layer, 0].view(torch.uint8).view(-1, g.kv_heads, g.page_tokens, g.head_dim)
    v = pages[:, layer, 1].view(torch.uint8).view(-1, g.kv_heads, g.head_dim, g.page_tokens)
    dtype = DTYPES[g.kv_dtype]
    k_tokens = k.permute(0, 2, 1, 3).contiguous().view(dtype)
    return k_tokens, v.permute(0, 3, 1, 2).contiguous().view(dtype)
