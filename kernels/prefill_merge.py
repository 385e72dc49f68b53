"""Merge the partials of row tiles that several programs shared.

Partials are normalised and carry a base-2 LSE, so that the merge is a mean weighted by 2^LSE. The
pieces of a row tile lie in consecutive slots; their number differs from row tile to row tile.
"""

import triton
import triton.language as tl


@triton.jit
def merge_pieces_kernel(part, part_lse, merges, out, lse, rows, q_heads,
                        G: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
                        BLOCK: tl.constexpr):  # fmt: skip
    """One program: BLOCK rows of one row tile; rows are position-major over the G query heads."""
    at = merges + tl.program_id(0) * 4
    row0 = tl.load(at)
    head = tl.load(at + 1)
    slot = tl.load(at + 2).to(tl.int64)
    pieces = tl.load(at + 3)
    r = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    k = 0
    while k < pieces:
        source = (slot + k) * ROWS + r
        piece_lse = tl.load(part_lse + source)
        new = tl.maximum(top, piece_lse)
        # A row may see nothing of a piece (its LSE is -inf), or of none so far.
        shift = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.exp2(top - shift)
        gain = tl.exp2(piece_lse - shift)
        weight = weight * keep + gain
        acc = acc * keep[:, None] + gain[:, None] * tl.load(part + source[:, None] * D + d[None, :])
        top = new
        k += 1
    row = row0 + r
    to = (row // G).to(tl.int64) * q_heads + head * G + row % G
    mask = row < rows
    inverse = tl.where(weight > 0, 1.0 / weight, 0.0)
    tl.store(out + to[:, None] * D + d[None, :], (acc * inverse[:, None]).to(tl.bfloat16),
             mask=mask[:, None])  # fmt: skip
    tl.store(lse + to, top + tl.log2(weight), mask=mask)
