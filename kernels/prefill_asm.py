"""Inline assembly of the Gluon prefill kernel: what Triton has no operation for.

Each function is elementwise over a tensor whose layout fixes which elements a thread holds, and in
which order: in the accumulator layout a thread has (row r, 2 columns), (row r + 8, 2 columns) per
8 columns; in the FP8 operand layout it has 4 neighbouring columns of one row at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 2^f 2^-12 on [-1/2, 1/2] as float16 bits of 1, f and f^2 (minimax: relative error 1.7e-3).
EXP2_COEFFICIENTS = (0x0C00, 0x09A1, 0x03D1)


CONSTANTS = {"one": 0x3C00, "twelve": 0x4A00, "big": 0x6400, "small": 0xE400} | {
    f"c{power}": bits for power, bits in enumerate(EXP2_COEFFICIENTS)
}
DECLARE = (
    "{.reg .b16 lo, hi; .reg .b32 h, r, i, p; .reg .f32 a, b;"
    + f" .reg .b32 {', '.join(CONSTANTS)};"
    + "".join(f" mov.b32 {name}, 0x{bits:04X}{bits:04X};" for name, bits in CONSTANTS.items())
)


def _emulate(low: int) -> str:
    """Leave in p, as two float16, 2^x of operands ``low`` and ``low + 1`` without the MUFU.

    h = max(x + 12, 0) = i + f with i an integer and |f| <= 1/2 (adding 1024 leaves i in the low
    bits), 2^f 2^-12 from a parabola, i added to the exponent. Below 2^-12 it is 2^-12, which E4M3
    rounds to zero.
    """
    return (
        f" cvt.rn.f16x2.f32 h, ${low + 1}, ${low};"
        " fma.rn.relu.f16x2 h, h, one, twelve;"
        " add.rn.f16x2 r, h, big; add.rn.f16x2 i, r, small; sub.rn.f16x2 h, h, i;"
        " fma.rn.f16x2 p, h, c2, c1; fma.rn.f16x2 p, p, h, c0;"
        " and.b32 r, r, 0x001F001F; shl.b32 r, r, 10; add.u32 p, p, r;"
    )


def _codes_text(count: int, emulated: int) -> str:
    """E4M3 codes of 2^x of ``count`` elements, the first ``emulated`` of them without the MUFU."""
    text = DECLARE
    for word in range(count // 4):
        for half, name in ((0, "lo"), (1, "hi")):
            low = count // 4 + word * 4 + half * 2
            if word * 4 + half * 2 < emulated:
                text += _emulate(low) + f" cvt.rn.satfinite.e4m3x2.f16x2 {name}, p;"
            else:
                text += (
                    f" ex2.approx.ftz.f32 a, ${low}; ex2.approx.ftz.f32 b, ${low + 1};"
                    f" cvt.rn.satfinite.e4m3x2.f32 {name}, b, a;"
                )
        text += f" mov.b32 ${word}, {{lo, hi}};"
    return text + "}"


def _values_text(count: int, emulated: int) -> str:
    """2^x of ``count`` elements as float32, the first ``emulated`` of them without the MUFU."""
    text = DECLARE
    for element in range(0, count, 2):
        low = count + element
        if element < emulated:
            text += _emulate(low) + " mov.b32 {lo, hi}, p;"
            text += f" cvt.f32.f16 ${element}, lo; cvt.f32.f16 ${element + 1}, hi;"
        else:
            text += "".join(f" ex2.approx.ftz.f32 ${element + k}, ${low + k};" for k in (0, 1))
    return text + "}"


def _codes_operands(count: int) -> str:
    return ",".join(["=r"] * (count // 4) + ["f"] * count)


CODES_0, CODES_2, CODES_4 = (gl.constexpr(_codes_text(16, n)) for n in (0, 2, 4))
VALUES_2, VALUES_4 = (gl.constexpr(_values_text(16, n)) for n in (2, 4))
VALUES_OPERANDS = gl.constexpr(",".join(["=f"] * 16 + ["f"] * 16))
CODES_OPERANDS = gl.constexpr(_codes_operands(16))
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


@gluon.jit
def exp2_e4m3(x, EMULATED: gl.constexpr):
    """E4M3 codes of 2^x in the operand layout; EMULATED of every 16 avoid the MUFU."""
    if EMULATED == 0:
        return gl.inline_asm_elementwise(CODES_0, CODES_OPERANDS, [x], gl.float8e4nv, True, 16)
    elif EMULATED == 2:
        return gl.inline_asm_elementwise(CODES_2, CODES_OPERANDS, [x], gl.float8e4nv, True, 16)
    else:
        return gl.inline_asm_elementwise(CODES_4, CODES_OPERANDS, [x], gl.float8e4nv, True, 16)


@gluon.jit
def exp2_some(x, EMULATED: gl.constexpr):
    """2^x; EMULATED of every 16 elements of a thread avoid the MUFU (relative error 0.3 %)."""
    if EMULATED == 0:
        return exp2(x)
    elif EMULATED == 2:
        return gl.inline_asm_elementwise(VALUES_2, VALUES_OPERANDS, [x], gl.float32, True, 16)
    else:
        return gl.inline_asm_elementwise(VALUES_4, VALUES_OPERANDS, [x], gl.float32, True, 16)
