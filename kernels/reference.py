"""Attention in float64 on any device: what every kernel is held to.

Nothing here is fast and nothing is shared with the kernels but the layout: codes are converted by
torch's own casts, the softmax is the textbook one in base 2, and keys and values are streamed in
blocks so that a context of any length fits beside a nearly full device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from kernels.view import View

LOG2E = math.log2(math.e)
FP8_MAX = 448.0
DTYPES = {"fp8_e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}


def quantise(x: torch.Tensor, scale: float | torch.Tensor, dtype: str) -> torch.Tensor:
    """Round ``x / scale`` to the nearest code, ties to even, as the append kernels store it.

    Parameters
    ----------
    x : torch.Tensor
        Values of any shape.
    scale : float or torch.Tensor
        float32, broadcast against ``x``; a code times its scale is the value.
    dtype : str
        ``fp8_e4m3`` (clamped to +-448, since E4M3 has no infinity) or ``bf16``.
    """
    inverse = 1.0 / torch.as_tensor(scale, dtype=torch.float32, device=x.device)
    scaled = x.float() * inverse
    if dtype == "fp8_e4m3":
        scaled = scaled.clamp(-FP8_MAX, FP8_MAX)
    return scaled.to(DTYPES[dtype])


def dequantise(codes: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    """Values of codes in float64; ``scale`` is broadcast against them."""
    factor = torch.as_tensor(scale, dtype=torch.float64, device=codes.device)
    return codes.float().double() * factor


def gather(
    view: View, layer: int, head: int, row: int, lo: int, hi: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V of tokens [lo, hi) of one sequence and KV head, read through the page table.

    Parameters
    ----------
    view : View
    layer, head, row : int
        Layer of the group, KV head, and row of the batch.
    lo, hi : int
        Token positions; ``lo < hi``.

    Returns
    -------
    k, v : torch.Tensor
        float64 ``[hi - lo, head_dim]``, scales applied.
    """
    g = view.geometry
    first, last = lo // g.page_tokens, -(-hi // g.page_tokens)
    pages = view.page_table[row, first:last].long()
    backed = view.arena[: view.arena.numel() // g.page_bytes * g.page_bytes]
    by_page = backed.view(-1, g.page_bytes)
    cut = slice(lo - first * g.page_tokens, hi - first * g.page_tokens)
    found = []
    for kv, scale in ((0, view.k_scale), (1, view.v_scale)):
        offset = g.tile_offset(0, layer, kv, head)
        tiles = by_page[:, offset : offset + g.tile_bytes][pages].view(DTYPES[g.kv_dtype])
        if kv == 0:
            tokens = tiles.view(-1, g.head_dim)
        else:
            by_token = tiles.view(-1, g.head_dim, g.page_tokens).transpose(1, 2)
            tokens = by_token.reshape(-1, g.head_dim)
        found.append(dequantise(tokens[cut], scale[head]))
    return found[0], found[1]


def _stream(
    q: torch.Tensor,
    blocks: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
    sm_scale: float,
    last_visible: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Online softmax of rows ``q [R, D]`` over blocks (position, k, v); out and base-2 LSE."""
    rows, width = q.shape
    q = q.double() * (sm_scale * LOG2E)
    top = torch.full((rows,), -math.inf, dtype=torch.float64, device=q.device)
    total = torch.zeros_like(top)
    acc = torch.zeros((rows, width), dtype=torch.float64, device=q.device)
    for lo, k, v in blocks:
        s = q @ k.double().T
        if last_visible is not None:
            position = torch.arange(lo, lo + len(k), device=q.device)
            s.masked_fill_(position[None, :] > last_visible[:, None], -math.inf)
        new_top = torch.maximum(top, s.amax(1))
        shift = torch.where(new_top.isinf(), 0.0, new_top)
        p = torch.exp2(s - shift[:, None])
        keep = torch.exp2(top - shift)
        total = total * keep + p.sum(1)
        acc = acc * keep[:, None] + p @ v.double()
        top = new_top
    out = acc / torch.where(total > 0, total, 1.0)[:, None]
    return out, top + torch.log2(total)


def _last_visible(
    tokens: int, group: int, causal_from: int | None, device: torch.device
) -> torch.Tensor | None:
    if causal_from is None:
        return None
    return causal_from + torch.arange(tokens * group, device=device) // group


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sm_scale: float,
    causal_from: int | None = None,
    block_tokens: int = 1 << 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Grouped-query attention in float64: ``softmax(q k^T sm_scale) v``.

    Parameters
    ----------
    q : torch.Tensor
        ``[T, q_heads, D]``, true values (scales applied).
    k, v : torch.Tensor
        ``[N, kv_heads, D]``; query head h reads KV head ``h // (q_heads // kv_heads)``.
    sm_scale : float
        Usually ``D ** -0.5``.
    causal_from : int, optional
        Position of query 0: query t sees tokens up to ``causal_from + t``. None: it sees all.
    block_tokens : int
        Tokens held in float64 at a time.

    Returns
    -------
    out : torch.Tensor
        float64 ``[T, q_heads, D]``.
    lse : torch.Tensor
        float64 ``[T, q_heads]``, log-sum-exp in base 2; -inf (and out 0) where nothing is visible.
    """
    tokens, q_heads, width = q.shape
    group = q_heads // k.shape[1]
    limit = _last_visible(tokens, group, causal_from, q.device)
    out = torch.zeros((tokens, q_heads, width), dtype=torch.float64, device=q.device)
    lse = torch.zeros((tokens, q_heads), dtype=torch.float64, device=q.device)
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        blocks = (
            (lo, k[lo : lo + block_tokens, head], v[lo : lo + block_tokens, head])
            for lo in range(0, len(k), block_tokens)
        )
        o, s = _stream(q[:, mine].reshape(-1, width), blocks, sm_scale, limit)
        out[:, mine] = o.view(tokens, group, width)
        lse[:, mine] = s.view(tokens, group)
    return out, lse


def attend(
    view: View,
    layer: int,
    head: int,
    row: int,
    q: torch.Tensor,
    sm_scale: float,
    causal_from: int | None = None,
    block_tokens: int = 1 << 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some query heads of one KV head over one stored sequence, in float64.

    Parameters
    ----------
    view : View
    layer, head, row : int
        Layer of the group, KV head, and row of the batch.
    q : torch.Tensor
        ``[T, heads, D]`` true values of any query heads that read this KV head.
    sm_scale, causal_from, block_tokens
        As in :func:`attention`; tokens before the view's start are not visible.

    Returns
    -------
    out, lse : torch.Tensor
        float64 ``[T, heads, D]`` and ``[T, heads]`` (base 2).
    """
    tokens, heads, width = q.shape
    first, end = view.starts[row], view.lengths_host[row]

    def blocks() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for lo in range(first, end, block_tokens):
            yield lo, *gather(view, layer, head, row, lo, min(lo + block_tokens, end))

    limit = _last_visible(tokens, heads, causal_from, q.device)
    out, lse = _stream(q.reshape(-1, width), blocks(), sm_scale, limit)
    return out.view(tokens, heads, width), lse.view(tokens, heads)
