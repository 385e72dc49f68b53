"""Bytes of a prefill plan's scratch: plain arithmetic, which the planner shares.

What lies in it is cut by :mod:`kernels.prefill_plan`, which needs numpy; a prediction does not.
"""

from __future__ import annotations

from kernels.view import Geometry

SEGMENT_INTS = 8
MERGE_INTS = 4  # row tile's first row, KV head, first slot, pieces
ALIGN = 256
ROWS_MAX = 192  # of a row tile, over all kernels
PROGRAMS_PER_SM_MAX = 2  # over all kernels


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def scratch_sizes(
    segments: int, programs: int, merges: int, slots: int, rows: int, head_dim: int
) -> dict[str, int]:
    """Bytes of each part of a plan's scratch, in the order in which they lie in it."""
    return {
        "part": _aligned(slots * rows * head_dim * 4),
        "part_lse": _aligned(slots * rows * 4),
        "segments": _aligned(segments * SEGMENT_INTS * 4),
        "shares": _aligned((programs + 1) * 4),
        "merges": _aligned(merges * MERGE_INTS * 4),
    }


def prefill_scratch_bytes(geometry: Geometry, tokens: int, sm_count: int) -> int:
    """Upper bound of the scratch of any plan of a chunk of ``tokens`` queries, in bytes.

    A cut between two programs adds one segment, and makes at most one more row tile one that is in
    pieces: P programs have at most 2 (P - 1) partials. Smaller row tiles have more segments but
    smaller partials, so the bound takes the largest of each.
    """
    programs = sm_count * PROGRAMS_PER_SM_MAX
    tiles = geometry.kv_heads * -(-tokens * geometry.group // 64)
    merges = min(tiles, programs - 1)
    slots = min(tiles + programs - 1, 2 * (programs - 1))
    sizes = scratch_sizes(
        tiles + programs, programs, merges, slots, 64, geometry.head_dim
    )  # portable: small row tiles, twice the programs
    large = scratch_sizes(
        tiles + programs, programs, merges, 2 * (sm_count - 1), ROWS_MAX, geometry.head_dim
    )
    return sum(max(sizes[name], large[name]) for name in sizes)
