"""Append: new tokens' K and V are quantised and stored in their pages, V transposed.

Whole tiles are one program each: V turns around in registers, so that every store is 16 bytes of
neighbours. Tokens that fill no tile (a decode step, the ends of a run) are stored byte by byte.
"""

import torch
import triton
import triton.language as tl

from kernels.reference import FP8_MAX
from kernels.view import View

TILE_WARPS = 4
TOKEN_WARPS = 1


@triton.jit
def to_code(x, inverse, DTYPE: tl.constexpr, LIMIT: tl.constexpr):
    """The code of ``x / scale``: clamped, since E4M3 has no infinity, and rounded to nearest."""
    y = x.to(tl.float32) * inverse
    if DTYPE == tl.float8e4nv:
        # Comparisons, not min and max, so that NaN stays NaN.
        y = tl.where(y > LIMIT, LIMIT, y)
        y = tl.where(y < -LIMIT, -LIMIT, y)
    return y.to(DTYPE)


@triton.jit(
    do_not_specialize=["layer", "first_page"],
    do_not_specialize_on_alignment=["table", "k_scale", "v_scale"],
)
def append_tiles_kernel(
    k,
    v,
    k_token: tl.int64,
    v_token: tl.int64,
    arena: tl.int64,
    table,
    page_elements: tl.int64,
    k_scale,
    v_scale,
    layer,
    first_page,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Tile ``program 0`` of the run, KV head ``program 1``: ``[PAGE, D]`` of K and of V."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.arange(0, PAGE)
    d = tl.arange(0, D)
    page = tl.load(table + first_page + tile).to(tl.int64)
    base = tl.multiple_of(arena.to(tl.pointer_type(DTYPE)), 16)
    tile_elements: tl.constexpr = PAGE * D
    at = page * page_elements + (layer.to(tl.int64) * 2 * KV_HEADS + head) * tile_elements
    at = tl.multiple_of(at, 16)
    token = (tile.to(tl.int64) * PAGE + n)[:, None]
    x = tl.load(k + token * k_token + head * D + d[None, :])
    code = to_code(x, 1.0 / tl.load(k_scale + head), DTYPE, LIMIT)
    tl.store(base + at + n[:, None] * D + d[None, :], code)
    x = tl.load(v + token * v_token + head * D + d[None, :])
    code = to_code(x, 1.0 / tl.load(v_scale + head), DTYPE, LIMIT)
    at += KV_HEADS * tile_elements
    tl.store(base + at + d[:, None] * PAGE + n[None, :], tl.trans(code))


@triton.jit(
    do_not_specialize=["layer", "table_stride", "first_position", "row"],
    do_not_specialize_on_alignment=["page_table", "k_scale", "v_scale", "rows", "positions"],
)
def append_tokens_kernel(
    k,
    v,
    k_token: tl.int64,
    v_token: tl.int64,
    arena: tl.int64,
    page_table,
    table_stride,
    page_elements: tl.int64,
    k_scale,
    v_scale,
    layer,
    rows,
    positions,
    row,
    first_position: tl.int64,
    RUN: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Token ``program 0``, KV head ``program 1``; a run's tokens follow one another in one row."""
    t = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, D)
    if RUN:
        position = first_position + t
        table_row = row.to(tl.int64)
    else:
        position = tl.load(positions + t)
        table_row = tl.load(rows + t).to(tl.int64)
    page = tl.load(page_table + table_row * table_stride + position // PAGE).to(tl.int64)
    inner = position % PAGE
    base = arena.to(tl.pointer_type(DTYPE))
    tile_elements: tl.constexpr = PAGE * D
    at = page * page_elements + (layer.to(tl.int64) * 2 * KV_HEADS + head) * tile_elements
    source = t.to(tl.int64)
    x = tl.load(k + source * k_token + head * D + d)
    code = to_code(x, 1.0 / tl.load(k_scale + head), DTYPE, LIMIT)
    tl.store(base + at + inner * D + d, code)
    x = tl.load(v + source * v_token + head * D + d)
    code = to_code(x, 1.0 / tl.load(v_scale + head), DTYPE, LIMIT)
    at += KV_HEADS * tile_elements
    tl.store(base + at + d * PAGE + inner, code)


def append(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Store single tokens, each at its own row and position.

    Parameters
    ----------
    view : View
        Its page table has a page for every position.
    layer : int
    k, v : torch.Tensor
        bf16 or float32 ``[T, kv_heads, D]``, contiguous within a token.
    rows : torch.Tensor
        int32 ``[T]``, rows of the batch.
    positions : torch.Tensor
        int64 ``[T]``.

    Raises
    ------
    ValueError
        For another shape, or a layer that the group does not have.
    """
    _check(view, layer, k, v)
    if rows.shape != (len(k),) or positions.shape != (len(k),):
        raise ValueError(
            f"rows={tuple(rows.shape)}, positions={tuple(positions.shape)}: must be ({len(k)},)"
        )
    _tokens(view, layer, k, v, rows, positions, 0, 0)


def append_run(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, start: int
) -> None:
    """Store consecutive tokens of one sequence: whole tiles fast, the ends token by token.

    Parameters
    ----------
    view : View
        Its page table has a page for every position.
    layer : int
    k, v : torch.Tensor
        bf16 or float32 ``[T, kv_heads, D]``, contiguous within a token: tokens ``start`` and on.
    row : int
        Row of the batch.
    start : int
        Position of the first token.

    Raises
    ------
    ValueError
        For another shape, or a layer that the group does not have.
    """
    _check(view, layer, k, v)
    page = view.geometry.page_tokens
    end = start + len(k)
    lo = min(end, -(-start // page) * page)
    hi = max(lo, end // page * page)
    if lo > start:
        _tokens(view, layer, k[: lo - start], v[: lo - start], None, None, row, start)
    if hi > lo:
        _tiles(view, layer, k[lo - start : hi - start], v[lo - start : hi - start], row, lo // page)
    if end > hi:
        _tokens(view, layer, k[hi - start :], v[hi - start :], None, None, row, hi)


def _check(view: View, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
    g = view.geometry
    for name, x in (("k", k), ("v", v)):
        if x.shape[1:] != (g.kv_heads, g.head_dim) or x.shape != k.shape:
            raise ValueError(f"{name}={tuple(x.shape)}: must be (T, {g.kv_heads}, {g.head_dim})")
        if x.stride(2) != 1 or x.stride(1) != g.head_dim:
            raise ValueError(f"{name}: the values of a token must be neighbours, not {x.stride()}")
    if not 0 <= layer < g.layers:
        raise ValueError(f"layer={layer}: the group has layers 0 to {g.layers - 1}")


def _dtype(view: View) -> tl.dtype:
    return tl.float8e4nv if view.geometry.kv_dtype == "fp8_e4m3" else tl.bfloat16


def _tiles(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, first_page: int
) -> None:
    g = view.geometry
    append_tiles_kernel[(len(k) // g.page_tokens, g.kv_heads)](
        k,
        v,
        k.stride(0),
        v.stride(0),
        view.arena.data_ptr(),
        view.page_table[row],
        g.page_bytes // g.itemsize,
        view.k_scale,
        view.v_scale,
        layer,
        first_page,
        KV_HEADS=g.kv_heads,
        D=g.head_dim,
        PAGE=g.page_tokens,
        DTYPE=_dtype(view),
        LIMIT=FP8_MAX,
        num_warps=TILE_WARPS,
    )


def _tokens(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor | None,
    positions: torch.Tensor | None,
    row: int,
    start: int,
) -> None:
    g = view.geometry
    if not len(k):
        return
    append_tokens_kernel[(len(k), g.kv_heads)](
        k,
        v,
        k.stride(0),
        v.stride(0),
        view.arena.data_ptr(),
        view.page_table,
        view.page_table.stride(0),
        g.page_bytes // g.itemsize,
        view.k_scale,
        view.v_scale,
        layer,
        rows,
        positions,
        row,
        start,
        RUN=rows is None,
        KV_HEADS=g.kv_heads,
        D=g.head_dim,
        PAGE=g.page_tokens,
        DTYPE=_dtype(view),
        LIMIT=FP8_MAX,
        num_warps=TOKEN_WARPS,
    )
