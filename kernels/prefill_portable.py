"""Prefill in plain Triton: every head size, FP8 and BF16, pages of 16 to 128 tokens, other chips.

The query rows of one KV head, position-major over its group, are the M side; a program works
through its share of the cut (:mod:`kernels.prefill_plan`). Pages of 128 tokens come by TMA, smaller
ones by pointers. Two levels of accumulation, P scaled by 256 before it becomes FP8, as in decode.
"""

# A kernel's arguments carry no Python types.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from kernels.decode_kernel import blank_tokens, tile_origin
from kernels.reference import DTYPES
from kernels.view import PAGE_TOKENS, Geometry

INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def soften(q, k, m, l, scale, visible, MASK: tl.constexpr):
    """Scores of one block for all rows and their online softmax in base 2: P, and the rescale."""
    s = tl.dot(q, tl.trans(k))
    if MASK:
        s = tl.where(visible, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - m_new[:, None])
    rescale = tl.exp2(m - m_new)
    return p, rescale, m_new, l * rescale + tl.sum(p, 1)


@triton.jit
def accumulate(acc, rescale, p, v, FP8: tl.constexpr):
    """Add one block's P V to the rescaled accumulator; FP8 products start from zero."""
    acc = acc * rescale[:, None]
    if FP8:
        acc += tl.dot((p * 256.0).to(tl.float8e4nv), tl.trans(v))
    else:
        acc += tl.dot(p.to(tl.bfloat16).to(v.dtype), tl.trans(v))
    return acc


@triton.jit(
    do_not_specialize=["layer", "start", "window", "end", "rows"],
    do_not_specialize_on_alignment=["table", "segments", "shares", "lse", "part_lse"],
)
def prefill_portable_kernel(
    q,
    arena: tl.int64,
    k_box,
    v_box,
    table,
    page_tokens,
    page_shift,
    page_elements: tl.int64,
    segments,
    shares,
    out,
    lse,
    part,
    part_lse,
    k_scale,
    v_scale,
    scale,
    layer,
    start,
    window,
    end,
    rows,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program's share of segments; see :mod:`kernels.prefill_plan` for their numbers."""
    FP8: tl.constexpr = DTYPE == tl.float8e4nv
    PER_PAGE: tl.constexpr = 128 // BLOCK
    HALF: tl.constexpr = D if D <= 128 else D // 2  # of V and the accumulator: registers
    d = tl.arange(0, D)
    e = tl.arange(0, HALF)
    begin = tl.load(shares + tl.program_id(0))
    stop = tl.load(shares + tl.program_id(0) + 1)
    for i in tl.range(begin, stop, num_stages=1, disable_licm=True):
        segment = segments + i * 8
        head = tl.load(segment + 1)
        lo = tl.load(segment + 2)
        hi = tl.load(segment + 3)
        clear_lo = tl.load(segment + 4)
        clear_hi = tl.load(segment + 5)
        row = tl.load(segment) + tl.arange(0, ROWS)
        at = (row // G).to(tl.int64) * (KV_HEADS * G) + head * G + row % G
        qr = tl.load(q + at[:, None] * D + d[None, :], mask=row[:, None] < rows, other=0.0)
        if WIDE:
            qr = qr.to(tl.float32)
        limit = start + row // G
        score_scale = scale * tl.load(k_scale + head)
        # rows of the K box's and the V box's view of a page, and elements of a page
        k_row = (layer * 2 * KV_HEADS + head) * page_tokens
        v_row = (layer * 2 * KV_HEADS + KV_HEADS + head) * D
        k_at = k_row.to(tl.int64) * D + d[None, :]
        v_at = v_row.to(tl.int64) * page_tokens + e[:, None] * page_tokens
        m = tl.full([ROWS], -1.0e30, tl.float32)
        l = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, HALF], tl.float32)
        acc2 = acc
        for t in tl.range(clear_lo, clear_hi, num_stages=STAGES):
            if TMA:
                page = tl.load(table + t // PER_PAGE)
                shift = t % PER_PAGE * BLOCK
                k = tl.reshape(k_box.load([page, k_row + shift, 0]), [BLOCK, D])
                v = tl.reshape(v_box.load([page, v_row, shift]), [HALF, BLOCK])
                if HALF < D:
                    v2 = tl.reshape(v_box.load([page, v_row + HALF, shift]), [HALF, BLOCK])
            else:
                origin, inner = tile_origin(
                    arena, table, page_shift, page_elements, t,
                    t * BLOCK, (t + 1) * BLOCK, BLOCK, DTYPE,
                )  # fmt: skip
                k = tl.load((origin + inner * D)[:, None] + k_at)
                v = tl.load((origin + inner)[None, :] + v_at)
                if HALF < D:
                    v2 = tl.load((origin + inner)[None, :] + v_at + HALF * page_tokens)
            if WIDE:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            p, rescale, m, l = soften(qr, k, m, l, score_scale, None, False)
            acc = accumulate(acc, rescale, p, v, FP8)
            if HALF < D:
                acc2 = accumulate(acc2, rescale, p, v2.to(v.dtype), FP8)
        lead = clear_lo - lo
        for edge in tl.range(0, lead + hi - clear_hi, num_stages=1):
            t = tl.where(edge < lead, lo + edge, clear_hi + edge - lead)
            if TMA:
                page = tl.load(table + t // PER_PAGE)
                shift = t % PER_PAGE * BLOCK
                k = tl.reshape(k_box.load([page, k_row + shift, 0]), [BLOCK, D])
            else:
                origin, inner = tile_origin(
                    arena, table, page_shift, page_elements, t, window, end, BLOCK, DTYPE
                )
                k = tl.load((origin + inner * D)[:, None] + k_at)
            if WIDE:
                k = k.to(tl.float32)
            position = t * BLOCK + tl.arange(0, BLOCK)
            visible = (position[None, :] <= limit[:, None]) & (position >= window)[None, :]
            p, rescale, m, l = soften(qr, k, m, l, score_scale, visible, True)
            stored = (position >= window) & (position < end)
            if TMA:
                v = tl.reshape(v_box.load([page, v_row, shift]), [HALF, BLOCK])
            else:
                v = tl.load((origin + inner)[None, :] + v_at)
            v = blank_tokens(v, stored, FP8, INTERPRETED)
            if WIDE:
                v = v.to(tl.float32)
            acc = accumulate(acc, rescale, p, v, FP8)
            if HALF < D:
                if TMA:
                    v = tl.reshape(v_box.load([page, v_row + HALF, shift]), [HALF, BLOCK])
                else:
                    v = tl.load((origin + inner)[None, :] + v_at + HALF * page_tokens)
                v = blank_tokens(v, stored, FP8, INTERPRETED)
                if WIDE:
                    v = v.to(tl.float32)
                acc2 = accumulate(acc2, rescale, p, v, FP8)

        unscale = tl.load(v_scale + head)
        if FP8:
            unscale = unscale * (1.0 / 256.0)
        weight = tl.where(l > 0, unscale / l, 0.0)
        log_sum = tl.where(l > 0, m + tl.log2(l), float("-inf"))
        slot = tl.load(segment + 6)
        if slot < 0:  # a whole row tile: no merge follows
            row = tl.load(segment) + tl.arange(0, ROWS)  # anew: no register holds it meanwhile
            at = (row // G).to(tl.int64) * (KV_HEADS * G) + head * G + row % G
            inside = row < rows
            first = out + at[:, None] * D + e[None, :]
            tl.store(first, (acc * weight[:, None]).to(tl.bfloat16), mask=inside[:, None])
            if HALF < D:
                second = (acc2 * weight[:, None]).to(tl.bfloat16)
                tl.store(first + HALF, second, mask=inside[:, None])
            tl.store(lse + at, log_sum, mask=inside)
        else:
            to = slot.to(tl.int64) * ROWS + tl.arange(0, ROWS)
            piece = part + to[:, None] * D + e[None, :]
            tl.store(piece, acc * weight[:, None])
            if HALF < D:
                tl.store(piece + HALF, acc2 * weight[:, None])
            tl.store(part_lse + to, log_sum)


def tma_boxes(geometry: Geometry, arena: torch.Tensor, block_tokens: int) -> tuple[Any, Any]:
    """Descriptors ``[pages, rows of a page, row]`` over the whole arena, for K and for V tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    g = geometry
    pages = arena.numel() // g.page_bytes
    codes = arena[: pages * g.page_bytes].view(DTYPES[g.kv_dtype])
    page = g.page_bytes // g.itemsize

    def box(row: int, block: list[int]) -> Any:
        return TensorDescriptor(codes, [pages, page // row, row], [page, row, 1], block)

    k = box(g.head_dim, [1, block_tokens, g.head_dim])
    return k, box(g.page_tokens, [1, min(g.head_dim, 128), block_tokens])


def launch(plan: Any, view: Any, layer: int, q: torch.Tensor, out: torch.Tensor,
           lse: torch.Tensor, scale: float) -> None:  # fmt: skip
    """Run the kernel for a :class:`kernels.prefill.PrefillPlan`; arguments have been checked."""
    g, config = plan.geometry, plan.config
    fp8 = g.kv_dtype == "fp8_e4m3"
    tma = g.page_tokens == PAGE_TOKENS
    k_box, v_box = plan.boxes if tma else (None, None)
    prefill_portable_kernel[(plan.programs,)](
        q,
        view.arena.data_ptr(),
        k_box,
        v_box,
        view.page_table[plan.row],
        g.page_tokens,
        g.page_tokens.bit_length() - 1,
        g.page_bytes // g.itemsize,
        plan.segments,
        plan.shares,
        out,
        lse,
        plan.part,
        plan.part_lse,
        view.k_scale,
        view.v_scale,
        scale,
        layer,
        plan.start,
        plan.window,
        plan.start + plan.tokens,
        plan.tokens * g.group,
        KV_HEADS=g.kv_heads,
        G=g.group,
        D=g.head_dim,
        ROWS=config.rows,
        BLOCK=config.block_tokens,
        DTYPE=tl.float8e4nv if fp8 else tl.bfloat16,
        TMA=tma,
        STAGES=config.num_stages,
        WIDE=INTERPRETED and not fp8,
        INTERPRETED=INTERPRETED,
        num_warps=config.num_warps,
    )
