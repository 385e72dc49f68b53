"""The Hopper prefill kernel in Gluon: FP8, D = 128, pages of 128 tokens; one program per SM.

A producer warp brings K and V tiles by TMA; three warpgroups of 64 query rows each share every tile
(192 rows a tile), and the hardware interleaves them: while one waits for the tensor cores, the
others do their softmax.

* K's 128 token rows are permuted on their way in by a five-dimensional TMA box, so that P leaves
  the first product in the very registers from which the second reads it; the stored layout is
  plain.
* P is scaled by 2^8 before it becomes E4M3, by adding 8 to the exponent.
* Two levels of accumulation: every tile's P V starts from zero in the tensor cores (14 bits) and is
  added to the float32 accumulator with its rescale.
* Tiles that need a mask (the diagonal) come first, the clear ones after them.
* V of the chunk's last tile is read through a descriptor that ends at the last token, so that TMA
  writes zeros for the unwritten tail: 0 x NaN never happens, at no cost to the loop.
"""

# A kernel's arguments carry no Python types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from kernels.prefill_asm import exp2, less_lane_columns, to_e4m3

SEGMENT = gl.constexpr(8)  # int32 of one segment of the work cut

TILE = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
TILE_3D = gl.constexpr(gl.NVMMASharedLayout(128, 8, 3))
TILE_5D = gl.constexpr(gl.NVMMASharedLayout(128, 8, 5))
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32]))
OPERAND = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 4))
ROW = gl.constexpr(gl.SliceLayout(1, MMA.value))
COLUMN = gl.constexpr(gl.SliceLayout(0, MMA.value))
Q_LOAD = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
# A thread's four partial row sums of two rows, when they are summed in registers.
PARTIAL = gl.constexpr(
    gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )
)


@aggregate
class Buffers:
    """Shared memory of one program: tiles, and the barriers that say who may touch them."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    arguments: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, q, k, v, k_full, v_full, empty, arguments):
        self.q = q
        self.k = k
        self.v = v
        self.k_full = k_full
        self.v_full = v_full
        self.empty = empty
        self.arguments = arguments


# Arguments of a program wait in shared memory: as captures of a worker warpgroup they would hold
# registers through the main loop, which has none to spare.
A_Q, A_OUT, A_LSE, A_PART, A_PART_LSE, A_K_SCALE, A_V_SCALE, A_SEGMENTS = map(
    gl.constexpr, range(8)
)
A_START, A_ROWS, A_KV_HEADS, A_GROUP, A_QK_SCALE, A_LAST = map(gl.constexpr, range(8, 14))
ONE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
ONE_REGISTER = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def put(b, AT: gl.constexpr, value):
    """Store an argument."""
    b.index(AT).store(gl.full([1], value, gl.int64, layout=ONE_REGISTER))


@gluon.jit
def get(b, AT: gl.constexpr):
    """Load an argument: int64."""
    return gl.sum(b.arguments.index(AT).load(ONE_REGISTER), 0)


@gluon.jit
def get_pointer(b, AT: gl.constexpr, dtype: gl.constexpr):
    """Load a pointer, 16-byte aligned."""
    return gl.multiple_of(get(b, AT).to(gl.pointer_type(dtype), bitcast=True), 16)


@gluon.jit
def to_operand(x):
    """Scores in token order, as the FP8 operand: a renaming of registers.

    Column 16a + 8b + 2t + j of the first product is token 16a + 4t + 2b + j (the permuted K box).
    """
    x = gl.permute(gl.reshape(x, [64, 8, 2, 4, 2]), (0, 1, 3, 2, 4))
    return gl.convert_layout(gl.reshape(x, [64, 128]), OPERAND, assert_trivial=True)


@gluon.jit
def masked(s, tile, limit):
    """Scores with every token past ``limit``, the row's own, at -inf."""
    n = gl.arange(0, 128, layout=COLUMN)
    n = (n // 16) * 16 + ((n // 8) % 2) * 2 + n % 2  # the lane's 4t is on the other side
    limit = less_lane_columns(limit - tile * 128)
    return gl.where(n[None, :] <= limit[:, None], s, float("-inf"))


@gluon.jit
def step(b, w, it, tile, limit, scale, m, l, acc, MASK: gl.constexpr, STAGES: gl.constexpr):
    """One K/V tile: scores, online softmax, P V. ``l`` are each thread's own partial row sums."""
    stage = it % STAGES
    phase = (it // STAGES) & 1
    zero = gl.zeros([64, 128], gl.float32, layout=MMA)
    mbarrier.wait(b.k_full.index(stage), phase)
    k = b.k.index(stage)._reinterpret(gl.float8e4nv, [128, 128], TILE)
    s = warpgroup_mma(b.q.index(w), k.permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    if MASK:
        s = masked(s, tile, limit)
    m_new = gl.maximum(m, gl.max(s, 1))
    alpha = exp2((m - m_new) * scale)
    p = exp2(s * scale - (m_new * scale - 8.0)[:, None])
    own = gl.sum(gl.sum(gl.reshape(p, [64, 16, 4, 2]), 3), 1)  # a thread's own registers only
    l = l * by_row(alpha)[:, None] + gl.convert_layout(own, PARTIAL)
    p8 = to_e4m3(to_operand(p))
    mbarrier.wait(b.v_full.index(stage), phase)
    v = b.v.index(stage).permute((1, 0))
    pv = warpgroup_mma(p8, v, zero, use_acc=False, is_async=True)
    pv = warpgroup_mma_wait(0, deps=(pv,))
    mbarrier.arrive(b.empty.index(stage), count=1)
    return m_new, l, acc * alpha[:, None] + pv


@gluon.jit
def by_row(x):
    """A row tensor for the rows of the partial sums: a renaming."""
    return gl.convert_layout(x, gl.SliceLayout(1, PARTIAL))


@gluon.jit
def row_of(b, row, head):
    """Where row ``row`` of a KV head, position-major over its group, lies in [tokens, q_heads]."""
    group = get(b, A_GROUP).to(gl.int32)
    token = row // group
    return token.to(gl.int64) * (get(b, A_KV_HEADS) * group) + head * group + (row - token * group)


@gluon.jit
def load_q(b, w, row0, head):
    """The warpgroup's 64 query rows into shared memory, through registers: any G, any stride."""
    q = get_pointer(b, A_Q, gl.float8e4nv)
    row = row0 + w * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, Q_LOAD))
    d = gl.arange(0, 128, layout=gl.SliceLayout(0, Q_LOAD))
    at = row_of(b, row, head) * 128
    mask = row < get(b, A_ROWS)
    b.q.index(w).store(gl.load(q + at[:, None] + d[None, :], mask=mask[:, None], other=0.0))
    fence_async_shared()


@gluon.jit
def finish(b, w, i, m, total, acc, scale):
    """Write the rows' normalised result, or their float32 piece when others share the row tile."""
    segment = segment_of(b, i)
    head = gl.load(segment + 1)
    slot = gl.load(segment + 6)
    r = w * 64 + gl.arange(0, 64, layout=ROW)
    d = gl.arange(0, 128, layout=COLUMN)
    seen = total > 0
    v_scale = gl.load(get_pointer(b, A_V_SCALE, gl.float32) + head)
    o = acc * (gl.where(seen, 1.0 / total, 0.0) * v_scale)[:, None]
    lse = gl.where(seen, m * scale + gl.log2(total) - 8.0, float("-inf"))
    if slot < 0:
        row = gl.load(segment) + r
        at = row_of(b, row, head)
        mask = row < get(b, A_ROWS)
        out = get_pointer(b, A_OUT, gl.bfloat16)
        gl.store(out + at[:, None] * 128 + d[None, :], o.to(gl.bfloat16), mask=mask[:, None])
        gl.store(get_pointer(b, A_LSE, gl.float32) + at, lse, mask=mask)
    else:
        at = slot.to(gl.int64) * 192 + r
        part = get_pointer(b, A_PART, gl.float32)
        gl.store(part + at[:, None] * 128 + d[None, :], o)
        gl.store(get_pointer(b, A_PART_LSE, gl.float32) + at, lse)


@gluon.jit
def segment_of(b, i):
    """Segment i's record. It is read anew wherever it is needed, to hold no registers."""
    return get_pointer(b, A_SEGMENTS, gl.int32) + i * SEGMENT


@gluon.jit
def consumer(b, w, first, STAGES: gl.constexpr):
    """One warpgroup: 64 rows of every segment of the program."""
    it = 0
    i = first
    while tl.condition(i < get(b, A_LAST).to(gl.int32), disable_licm=True):
        segment = segment_of(b, i)
        row0 = gl.load(segment)
        head = gl.load(segment + 1)
        qk_scale = get(b, A_QK_SCALE).to(gl.int32).to(gl.float32, bitcast=True)
        scale = qk_scale * gl.load(get_pointer(b, A_K_SCALE, gl.float32) + head)
        load_q(b, w, row0, head)
        m = gl.full([64], -1.0e30, gl.float32, layout=ROW)
        l = gl.zeros([64, 4], gl.float32, layout=PARTIAL)
        acc = gl.zeros([64, 128], gl.float32, layout=MMA)
        tail_lo = gl.load(segment + 5)
        row = row0 + w * 64 + gl.arange(0, 64, layout=ROW)
        limit = get(b, A_START).to(gl.int32) + row // get(b, A_GROUP).to(gl.int32)
        for tile in range(tail_lo, gl.load(segment + 3)):
            m, l, acc = step(b, w, it, tile, limit, scale, m, l, acc, True, STAGES)
            it += 1
        segment = segment_of(b, i)
        for tile in range(gl.load(segment + 4), gl.load(segment + 5)):
            m, l, acc = step(b, w, it, tile, 0, scale, m, l, acc, False, STAGES)
            it += 1
        finish(b, w, i, m, gl.convert_layout(gl.sum(l, 1), ROW), acc, scale)
        i += 1


@gluon.jit
def producer(b, first, last, k_desc, v_desc, v_tail_desc, segments, table, last_tile, page_tiles,
             k_tile, v_tile, STAGES: gl.constexpr):  # fmt: skip
    """Bring every segment's K and V tiles in the order in which the consumers want them."""
    it = 0
    for i in range(first, last):
        segment = segments + i * SEGMENT
        head = gl.load(segment + 1)
        clear_lo = gl.load(segment + 4)
        tail_lo = gl.load(segment + 5)
        n_clear = tail_lo - clear_lo
        n_tail = gl.load(segment + 3) - tail_lo
        ahead = gl.load(segment + 7) - n_tail
        for k in range(0, n_tail + n_clear):
            clear = k + ahead
            clear = clear_lo + gl.where(clear < n_clear, clear, clear - n_clear)
            tile = gl.where(k < n_tail, tail_lo + k, clear)
            base = gl.load(table + tile) * page_tiles + head
            stage = it % STAGES
            phase = ((it // STAGES) & 1) ^ 1
            mbarrier.wait(b.empty.index(stage), phase)
            full = b.k_full.index(stage)
            mbarrier.expect(full, 16384)
            tma.async_copy_global_to_shared(
                k_desc, [(base + k_tile) * 8, 0, 0, 0, 0], full, b.k.index(stage))  # fmt: skip
            full = b.v_full.index(stage)
            v = b.v.index(stage)._reinterpret(gl.float8e4nv, [1, 128, 128], TILE_3D)
            mbarrier.expect(full, 16384)
            if tile == last_tile:
                tma.async_copy_global_to_shared(v_tail_desc, [base + v_tile, 0, 0], full, v)
            else:
                tma.async_copy_global_to_shared(v_desc, [base + v_tile, 0, 0], full, v)
            it += 1


@gluon.jit(
    do_not_specialize=[
        "start",
        "rows",
        "kv_heads",
        "group",
        "last_tile",
        "page_tiles",
        "k_tile",
        "v_tile",
    ],
    do_not_specialize_on_alignment=[
        *("table", "segments", "share", "lse", "part_lse", "k_scale", "v_scale")
    ],
)
def prefill_kernel(k_desc, v_desc, v_tail_desc, table, segments, share, q, out, lse, part,
                   part_lse, k_scale, v_scale, qk_scale, start, rows, kv_heads, group, last_tile,
                   page_tiles, k_tile, v_tile, STAGES: gl.constexpr):  # fmt: skip
    """See the module. Offsets of tiles are in tiles of 16 KiB, so that int32 reaches 4 TiB."""
    q_buf = gl.allocate_shared_memory(gl.float8e4nv, [3, 64, 128], TILE)
    k_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 8, 2, 4, 2, 128], TILE_5D)
    v_buf = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], TILE)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=3)
    first = gl.load(share + gl.program_id(0))
    last = gl.load(share + gl.program_id(0) + 1)
    arguments = gl.allocate_shared_memory(gl.int64, [14, 1], ONE)
    put(arguments, A_Q, q.to(gl.int64))
    put(arguments, A_OUT, out.to(gl.int64))
    put(arguments, A_LSE, lse.to(gl.int64))
    put(arguments, A_PART, part.to(gl.int64))
    put(arguments, A_PART_LSE, part_lse.to(gl.int64))
    put(arguments, A_K_SCALE, k_scale.to(gl.int64))
    put(arguments, A_V_SCALE, v_scale.to(gl.int64))
    put(arguments, A_SEGMENTS, segments.to(gl.int64))
    put(arguments, A_START, start.to(gl.int64))
    put(arguments, A_ROWS, rows.to(gl.int64))
    put(arguments, A_KV_HEADS, kv_heads.to(gl.int64))
    put(arguments, A_GROUP, group.to(gl.int64))
    put(arguments, A_QK_SCALE, qk_scale.to(gl.int32, bitcast=True).to(gl.int64))
    put(arguments, A_LAST, last.to(gl.int64))
    b = Buffers(q_buf, k_buf, v_buf, k_full, v_full, empty, arguments)
    # 168 + 160 + 160 registers for the consumers and 24 for the producer fill the register file.
    gl.warp_specialize([
        (consumer, (b, 0, first, STAGES)),
        (consumer, (b, 1, first, STAGES)),
        (consumer, (b, 2, first, STAGES)),
        (producer, (b, first, last, k_desc, v_desc, v_tail_desc, segments, table, last_tile,
                    page_tiles, k_tile, v_tile, STAGES)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip
