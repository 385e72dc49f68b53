"""Which kernel runs for which shape: written down, not tuned at run time.

No module here imports torch or triton, so that planners can size buffers from shapes alone.

Boxes of the tensor-map (TMA) loads. A descriptor sees the arena as ``[pages, rows of a page, row
bytes]``; a box is one tile, or half of one, at (page, row, 0). TMA coordinates are int32, so the
reach is 2**31 - 1 pages of less than 1 TiB, whatever the width of a row (a flat ``[rows, row
bytes]`` would end at 256 GiB for rows of 128 bytes and at 128 GiB for rows of 64):

=====  =====  ==============  ==============  =====================
D      KV     K box (bytes)   V box (bytes)   bytes of a K/V buffer
=====  =====  ==============  ==============  =====================
64     FP8    128 x 64        64 x 128        16 KiB
128    FP8    128 x 128       128 x 128       32 KiB
256    FP8    64 x 256        256 x 64        32 KiB
64     BF16   128 x 128       64 x 256        32 KiB
128    BF16   64 x 256        128 x 128       32 KiB
256    BF16   64 x 512        256 x 128       64 KiB
=====  =====  ==============  ==============  =====================

Rows wider than the 128 bytes of a swizzle atom are several messages of 128 bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.view import PAGE_TOKENS, Geometry

SM_COUNT_H200 = 132
MAX_GROUP = 32
TMA_PAGES = 2**31 - 1
TMA_STRIDE_BYTES = 2**40


@dataclass(frozen=True)
class DecodeConfig:
    """How the decode kernel is compiled and launched.

    Parameters
    ----------
    variant : str
        ``swap_ab_tma`` (pages of 128 tokens) or ``swap_ab_pointer`` (smaller pages).
    n : int
        Query heads of a KV head, padded: the N side of wgmma. 16 or more, since narrower FP8
        products fall back to the older tensor-core instruction.
    block_tokens : int
        Tokens of one step: the M side of the first product.
    num_warps, num_stages : int
        Triton's launch options. The load of the page number takes part in the pipeline, so that
        2 to 4 stages give two K/V buffers, and 5 gives three.
    programs_per_sm : int
        Programs that fit an SM at once; the grid is one wave of them.
    early_blocks : int
        Blocks that the loop may load before it has waited for the kernel in front; 0 waits first.
        The query is then laid into shared memory in every block, which pays for FP8 and costs BF16,
        whose blocks have half the tokens, 13 %.
    segment_cost_blocks : float
        What starting and ending a run of blocks costs, in blocks, when work is cut into shares.
    """

    variant: str
    n: int
    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int
    early_blocks: int = 0
    segment_cost_blocks: float = 1.0


# (head_dim, kv_dtype) -> block_tokens, num_stages, (programs_per_sm, num_warps) with N = 16 and 32
_TMA = {
    (64, "fp8_e4m3"): (128, 5, (4, 4), (3, 4)),
    (128, "fp8_e4m3"): (128, 5, (2, 4), (2, 4)),
    (256, "fp8_e4m3"): (64, 5, (2, 4), (2, 4)),
    (64, "bf16"): (128, 5, (2, 4), (2, 4)),
    (128, "bf16"): (64, 5, (2, 4), (2, 4)),
    (256, "bf16"): (64, 5, (1, 4), (1, 4)),
}
_POINTER = {
    (64, "fp8_e4m3"): (128, 4, (3, 4), (2, 4)),
    (128, "fp8_e4m3"): (128, 4, (2, 4), (2, 4)),
    (256, "fp8_e4m3"): (64, 4, (2, 4), (1, 8)),
    (64, "bf16"): (128, 4, (2, 4), (2, 4)),
    (128, "bf16"): (64, 4, (2, 4), (2, 4)),
    (256, "bf16"): (64, 4, (1, 4), (1, 4)),
}
EARLY_BLOCKS = 3  # of a loop with three buffers: two before its first iteration, one within
PAGE_SIZES = (16, 32, 64, PAGE_TOKENS)
HEAD_DIMS = (64, 128, 256)


def check_geometry(geometry: Geometry) -> None:
    """Refuse a shape that no kernel is written for.

    Raises
    ------
    ValueError
        Naming the key, its value and what is allowed.
    """
    g = geometry
    if g.head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim={g.head_dim}: allowed are {', '.join(map(str, HEAD_DIMS))}")
    if g.page_tokens not in PAGE_SIZES:
        raise ValueError(
            f"page_tokens={g.page_tokens}: allowed are {', '.join(map(str, PAGE_SIZES))}"
        )
    if g.group > MAX_GROUP:
        raise ValueError(
            f"q_heads={g.q_heads}: at most {MAX_GROUP} query heads may share a KV head, "
            f"here {g.group} do"
        )


def check_reach(geometry: Geometry, arena_bytes: int) -> None:
    """Refuse an arena that the TMA descriptors cannot address.

    Raises
    ------
    ValueError
        When it has more than 2**31 - 1 pages, or a page is 1 TiB or more.
    """
    pages = arena_bytes // geometry.page_bytes
    if geometry.page_bytes >= TMA_STRIDE_BYTES:
        raise ValueError(
            f"page_bytes={geometry.page_bytes}: a TMA descriptor allows less than "
            f"{TMA_STRIDE_BYTES}; use fewer layers in a group"
        )
    if not 1 <= pages <= TMA_PAGES:
        raise ValueError(
            f"arena of {arena_bytes} bytes holds {pages} pages of {geometry.page_bytes} bytes: "
            f"a TMA descriptor reaches 1 to {TMA_PAGES}"
        )


def padded_group(group: int) -> int:
    """Query heads of a KV head padded to the N side of wgmma: a power of two, at least 16."""
    n = 16
    while n < group:
        n *= 2
    return n


def decode_config(geometry: Geometry) -> DecodeConfig:
    """Choose the decode kernel's configuration by shape; it serves contexts of any length.

    Raises
    ------
    ValueError
        For a head_dim, page size or group that no kernel is written for.
    """
    check_geometry(geometry)
    tma = geometry.page_tokens == PAGE_TOKENS
    table = _TMA if tma else _POINTER
    n = padded_group(geometry.group)
    block, stages, narrow, wide = table[geometry.head_dim, geometry.kv_dtype]
    programs, warps = narrow if n == 16 else wide
    return DecodeConfig(
        variant="swap_ab_tma" if tma else "swap_ab_pointer",
        n=n,
        block_tokens=block,
        num_warps=warps,
        num_stages=stages,
        programs_per_sm=programs,
        early_blocks=EARLY_BLOCKS if tma and geometry.kv_dtype == "fp8_e4m3" else 0,
    )


def decode_partials(geometry: Geometry, sm_count: int) -> int:
    """Most partial results of a decode step: a program leaves at most two pieces of a sequence."""
    return 2 * sm_count * decode_config(geometry).programs_per_sm


def decode_scratch_bytes(geometry: Geometry, sequences: int, sm_count: int) -> int:
    """Upper bound of the bytes of a decode step's partials: float32 out and LSE of each piece.

    Parameters
    ----------
    geometry : Geometry
    sequences : int
        Sequences of the batch; the bound holds for any lengths.
    sm_count : int
        Streaming multiprocessors of the device (132 on an H200).
    """
    pieces = decode_partials(geometry, sm_count) if sequences else 0
    return pieces * geometry.group * (geometry.head_dim + 1) * 4


def all_decode_configs() -> list[tuple[Geometry, DecodeConfig]]:
    """Every configuration that the chooser can pick, each with a geometry that leads to it."""
    found: list[tuple[Geometry, DecodeConfig]] = []
    for head_dim in HEAD_DIMS:
        for kv_dtype in ("fp8_e4m3", "bf16"):
            for page in (16, PAGE_TOKENS):  # 32 and 64 run the kernel of 16
                for group in (5, 20):
                    geometry = Geometry(2, 2, 2 * group, head_dim, kv_dtype, page)
                    found.append((geometry, decode_config(geometry)))
    return found
