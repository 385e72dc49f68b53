"""Inline assembly of the Gluon prefill kernel: what Triton has no operation for.

Each function is elementwise over a tensor whose layout fixes which elements a thread holds, and in
which order: in the accumulator layout a thread has (row r, 2 columns), (row r + 8, 2 columns) per
8 columns; in the FP8 operand layout it has 4 neighbouring columns of one row at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

TO_E4M3 = gl.constexpr(
    "{.reg .b16 lo, hi; cvt.rn.satfinite.e4m3x2.f32 lo, $2, $1;"
    " cvt.rn.satfinite.e4m3x2.f32 hi, $4, $3; mov.b32 $0, {lo, hi};}"
)


@gluon.jit
def exp2(x):
    """2^x on the special-function unit."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def less_lane_columns(x):
    """``x - 4 (lane % 4)`` in every lane: x counted from the lane's first token of the tile.

    ``x`` is a row tensor of an accumulator layout, which Triton holds to be equal across lanes of a
    row; the result is not, and is only to be compared with what does not depend on the lane.
    """
    return gl.inline_asm_elementwise(
        "{.reg .u32 t; mov.u32 t, %laneid; and.b32 t, t, 3; shl.b32 t, t, 2; sub.s32 $0, $1, t;}",
        "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def to_e4m3(x):
    """E4M3 codes of float32 values in the FP8 operand layout, four at a time."""
    return gl.inline_asm_elementwise(
        TO_E4M3, "=r,f,f,f,f", [x], dtype=gl.float8e4nv, is_pure=True, pack=4
    )
