"""The decode kernel: one query token of each sequence against its whole history.

The operands are swapped: S^T = K q^T and O^T = V^T P^T, so that a block of tokens is the M side of
wgmma and the few query heads that share a KV head, padded to 16, are N. K is stored a token a row
and V transposed, hence both are K-major as FP8 wgmma wants, and TMA brings a tile in one box.

* The softmax is online in base 2; the running sum is kept per token slot and reduced once.
* FP8 P is scaled by 256 before it is rounded, and each block's P V starts from zero and is added to
  the float32 accumulator: two levels, since the tensor cores accumulate FP8 in 14 bits or so.
* Launches overlap: a program of which only the newest tokens may still be on their way starts its
  first loads before the kernel in front has ended, and waits for it before it loads the query.
* Blocks that hold a sequence's first or last visible token are masked apart from the main loop:
  P by the score, and V too, because 0 x NaN is NaN and behind the last token may lie anything.
"""

# A kernel's arguments carry no Python types.
# ruff: noqa: ANN001, ANN201, E741, SIM102
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def tile_origin(
    arena: tl.int64,
    table,
    page_shift,
    page_elements: tl.int64,
    t,
    first,
    end,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Of each token of block t: pointer to its page, and its place in the page.

    16 tokens, the smallest page, are neighbours whatever the page size. Tokens outside [first,
    end) take their page from the nearest token inside, so that no entry of the table is read that
    may name a page without memory.
    """
    n = tl.arange(0, BLOCK)
    position = tl.minimum(tl.maximum(t * BLOCK + n, first), end - 1)
    page = tl.max_constancy(tl.load(table + (position >> page_shift)), 16).to(tl.int64)
    base = tl.multiple_of(arena.to(tl.pointer_type(DTYPE)), 16)
    sixteens = (t * (BLOCK // 16) + n // 16) & ((1 << (page_shift - 4)) - 1)
    inner = tl.max_constancy(sixteens, 16) * 16 + n % 16
    return base + page * page_elements, inner


@triton.jit
def blank_tokens(v, visible, FP8: tl.constexpr, INTERPRETED: tl.constexpr):
    """V^T ``[D, BLOCK]`` with zeros where a token is not visible, whatever the codes there."""
    if INTERPRETED:  # the interpreter knows no assembly
        return tl.where(visible[None, :], v, 0.0).to(v.dtype)
    # Whole words at a time: the compiler's own select takes every byte to a register of its own.
    if FP8:
        keep = tl.where(visible, -1, 0).to(tl.int8)
        codes = v.to(tl.int8, bitcast=True)
        codes, keep = tl.broadcast(codes, keep[None, :])
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [codes, keep], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        keep = tl.where(visible, -1, 0).to(tl.int16)
        codes = v.to(tl.int16, bitcast=True)
        codes, keep = tl.broadcast(codes, keep[None, :])
        codes = tl.inline_asm_elementwise(
            "and.b32 $0, $1, $2;", "=r,r,r", [codes, keep], dtype=tl.int16, is_pure=True, pack=2
        )
    return codes.to(v.dtype, bitcast=True)


@triton.jit
def soften(q, k, m, l, scale, visible, MASK: tl.constexpr):
    """Scores ``[BLOCK, N]`` of a block and their online softmax: P, and what rescales the past."""
    s = tl.dot(k, q)
    if MASK:
        s = tl.where(visible[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 0) * scale)
    p = tl.exp2(s * scale - m_new[None, :])
    rescale = tl.exp2(m - m_new)
    return p, rescale, m_new, l * rescale[None, :] + p


@triton.jit
def accumulate(acc, rescale, p, v, FP8: tl.constexpr, WIDE: tl.constexpr):
    """Add one block's ``V^T P`` to an accumulator ``[D, N]``, which is rescaled first."""
    acc = acc * rescale[None, :]
    if FP8:
        acc += tl.dot(v, (p * 256.0).to(tl.float8e4nv))
    elif WIDE:
        acc += tl.dot(v.to(tl.float32), p.to(tl.bfloat16).to(tl.float32))
    else:
        acc += tl.dot(v, p.to(tl.bfloat16))
    return acc


@triton.jit
def segment_at(record):
    """A record's unit, first and end block, first and end token, and slot."""
    return (
        tl.load(record),
        tl.load(record + 1),
        tl.load(record + 2),
        tl.load(record + 3),
        tl.load(record + 4),
        tl.load(record + 5),
    )


@triton.jit
def load_query(q_tile, heads):
    """The query heads that share a KV head ``[D, N]``, zeros where N is padded."""
    return tl.load(q_tile, mask=heads[None, :], other=0.0).to(tl.bfloat16)


@triton.jit
def touch_pages(table, first, last):
    """Bring a run's first page numbers to the L1 cache while the query is on its way.

    The main loop's own loads of them begin only once the query lies in shared memory.
    """
    at = table + tl.minimum(first + tl.arange(0, 32), tl.maximum(last, first))
    tl.inline_asm_elementwise(
        "ld.global.ca.b32 $0, [$1];", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(
    do_not_specialize=["layer", "unsettled_tokens", "table_stride", "page_shift"],
    do_not_specialize_on_alignment=["page_table", "lse", "partial_lse", "k_scale", "v_scale"],
)
def decode_kernel(
    q,
    arena: tl.int64,
    k_box,
    v_box,
    page_table,
    table_stride,
    page_tokens,
    page_shift,
    page_elements: tl.int64,
    records,
    out,
    lse,
    partial_out,
    partial_lse,
    k_scale,
    v_scale,
    scale,
    layer,
    unsettled_tokens,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    DTYPE: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
    WIDE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """A program's share of segments; see :func:`kernels.decode_plan.records` for their numbers."""
    FP8: tl.constexpr = tl.float8e4nv == DTYPE
    PER_PAGE: tl.constexpr = 128 // BLOCK
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    program = tl.program_id(0)
    # Records are older than any launch: they need not wait for the kernel before.
    own = records + program * 8
    count = tl.load(own + 6)
    rest = tl.load(own + 7)
    if TMA:
        unit, t0, t1, first, end, slot = segment_at(own)
    if PDL:
        gdc_launch_dependents()
        if EARLY == 0:
            gdc_wait()
    for i in tl.range(0, count, disable_licm=True):
        if TMA:
            if i > 0:
                unit, t0, t1, first, end, slot = segment_at(records + (rest + i - 1) * 8)
        else:  # pointers leave no registers to carry a record
            unit, t0, t1, first, end, slot = segment_at(
                records + tl.where(i == 0, program, rest + i - 1) * 8
            )
        row = unit // KV_HEADS
        head = unit % KV_HEADS
        q_at = unit * G
        table = page_table + row.to(tl.int64) * table_stride
        full = t0 + (first > t0 * BLOCK).to(tl.int32)
        full_end = tl.maximum(t1 - (end < t1 * BLOCK).to(tl.int32), full)
        q_tile = q + (q_at + n)[None, :] * D + d[:, None]
        if EARLY > 0:
            loaded_first = tl.minimum(full_end, full + EARLY)
            early = (i == 0) & (full < full_end) & (loaded_first * BLOCK <= end - unsettled_tokens)
            # As bf16, which holds every code: a loop takes FP8 along byte by byte.
            qt = tl.zeros([D, N], tl.bfloat16)
            if early == 0:
                if PDL:
                    gdc_wait()
                if not INTERPRETED and t1 > t0:
                    touch_pages(table, t0 // PER_PAGE, (t1 - 1) // PER_PAGE)
                qt = load_query(q_tile, n < G)
        else:
            if TMA and not INTERPRETED and t1 > t0:
                touch_pages(table, t0 // PER_PAGE, (t1 - 1) // PER_PAGE)
            qt = load_query(q_tile, n < G)
        score_scale = scale * tl.load(k_scale + head)
        if TMA:
            unscale = tl.load(v_scale + head)
        # rows of the K box's and the V box's view of a page, and elements of a page
        k_row = (layer * 2 * KV_HEADS + head) * page_tokens
        v_row = (layer * 2 * KV_HEADS + KV_HEADS + head) * D
        k_at = k_row.to(tl.int64) * D + d[None, :]
        v_at = (v_row + d)[:, None].to(tl.int64) * page_tokens

        m = tl.full([N], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK, N], tl.float32)
        acc = tl.zeros([D, N], tl.float32)
        for t in tl.range(full, full_end, num_stages=STAGES, disable_licm=EARLY > 0):
            if TMA:
                page = tl.load(table + t // PER_PAGE)
                part = t % PER_PAGE * BLOCK
                k = tl.reshape(k_box.load([page, k_row + part, 0]), [BLOCK, D])
            else:
                origin, inner = tile_origin(
                    arena, table, page_shift, page_elements, t,
                    t * BLOCK, (t + 1) * BLOCK, BLOCK, DTYPE,
                )  # fmt: skip
                k = tl.load((origin + inner * D)[:, None] + k_at)
            if WIDE:
                k = k.to(tl.float32)
            if EARLY > 0:
                if early & (t == full):  # this block and the next are on their way
                    if PDL:
                        gdc_wait()
                    qt = load_query(q_tile, n < G)
            p, rescale, m, l = soften(qt.to(k.dtype), k, m, l, score_scale, None, False)
            if TMA:
                v = tl.reshape(v_box.load([page, v_row, part]), [D, BLOCK])
            else:
                v = tl.load((origin + inner)[None, :] + v_at)
            acc = accumulate(acc, rescale, p, v, FP8, WIDE)
        for edge in tl.range(0, full - t0 + t1 - full_end, num_stages=1, disable_licm=True):
            t = tl.where(edge < full - t0, t0, t1 - 1)
            page = tl.load(table + t // PER_PAGE)
            part = t % PER_PAGE * BLOCK
            if TMA:
                k = tl.reshape(k_box.load([page, k_row + part, 0]), [BLOCK, D])
            else:
                origin, inner = tile_origin(
                    arena, table, page_shift, page_elements, t, first, end, BLOCK, DTYPE
                )
                k = tl.load((origin + inner * D)[:, None] + k_at)
            if WIDE:
                k = k.to(tl.float32)
            position = t * BLOCK + tl.arange(0, BLOCK)
            visible = (position >= first) & (position < end)
            p, rescale, m, l = soften(qt.to(k.dtype), k, m, l, score_scale, visible, True)
            if TMA:
                v = tl.reshape(v_box.load([page, v_row, part]), [D, BLOCK])
            else:
                v = tl.load((origin + inner)[None, :] + v_at)
            v = blank_tokens(v, visible, FP8, INTERPRETED)
            acc = accumulate(acc, rescale, p, v, FP8, WIDE)

        total = tl.sum(l, 0)
        if not TMA:
            unscale = tl.load(v_scale + head)
        if FP8:
            unscale = unscale * (1.0 / 256.0)
        unscale = tl.where(total > 0, unscale / total, 0.0)[None, :]
        log_sum = m + tl.log2(total)
        if slot < 0:  # a whole (sequence, KV head): no merge follows
            to, to_lse, to_row = out, lse, q_at
        else:
            to, to_lse, to_row = partial_out, partial_lse, slot * G
        inside = n < G
        at = to + to_row.to(tl.int64) * D + n[None, :] * D + d[:, None]
        tl.store(at, acc * unscale, mask=inside[None, :])
        tl.store(to_lse + to_row + n, log_sum, mask=inside)
