"""Inline assembly of the Gluon prefill kernel: what Triton has no operation for.

Each function is elementwise over a tensor whose layout fixes which elements a thread holds, and in
which order: in the accumulator layout a thread has (row r, 2 columns), (row r + 8, 2 columns) per
8 columns; in the FP8 operand layout it has 4 neighbouring columns of one row at a time.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# 2^f 2^-12 on [-1/2, 1/2] as float16 bits of 1, f and f^2 (minimax: relative error 1.7e-3).
EXP2_COEFFICIENTS = (0x0C00, 0x09A1, 0x03D1)


def _rescale_text(count: int) -> str:
    """Multiply ``count`` accumulator elements by 2^((old - new) scale) if any row of a warp grew.

    Operands: outputs, the same values tied to them, then old, new and scale of every element.
    """
    old, new, scale = (count * k for k in (2, 3, 4))
    rows = "".join(
        f"sub.ftz.f32 a{k}, ${old + 2 * k}, ${new + 2 * k}; mul.ftz.f32 a{k}, a{k}, ${scale};"
        f" ex2.approx.ftz.f32 a{k}, a{k};"
        for k in (0, 1)
    )
    products = "".join(f" mul.ftz.f32 ${i}, ${i}, a{i // 2 % 2};" for i in range(count))
    return (
        "{.reg .pred grew; .reg .f32 a<2>;"
        f" setp.neu.f32 grew, ${old}, ${new};"
        f" setp.neu.or.f32 grew, ${old + 2}, ${new + 2}, grew;"
        " vote.sync.any.pred grew, grew, 0xffffffff;"
        f" @!grew bra.uni SAME; {rows}{products} SAME: }}"
    )


def _rescale_constraints(count: int) -> str:
    tied = [str(i) for i in range(count)]
    return ",".join(["=f"] * count + tied + ["f"] * (3 * count))


def _codes_text(count: int, emulated: int) -> str:
    """E4M3 codes of 2^x of ``count`` elements, the first ``emulated`` of them without the MUFU.

    The emulation works on two float16 at once: h = max(x + 12, 0) = i + f with i an integer and
    |f| <= 1/2 (adding 1024 leaves i in the low bits), 2^f from a parabola, i added to the
    exponent. Below 2^-12 it returns 2^-12, which E4M3 rounds to zero.
    """
    constants = {"one": 0x3C00, "twelve": 0x4A00, "big": 0x6400, "small": 0xE400}
    constants |= {f"c{k}": bits for k, bits in enumerate(EXP2_COEFFICIENTS)}
    text = ["{.reg .b16 lo, hi; .reg .b32 h, r, i, p; .reg .f32 a, b;"]
    if emulated:
        text.append(f".reg .b32 {', '.join(constants)};")
        text += [f"mov.b32 {name}, 0x{bits:04X}{bits:04X};" for name, bits in constants.items()]
    source = count // 4
    for word in range(count // 4):
        for half, name in ((0, "lo"), (1, "hi")):
            low = source + word * 4 + half * 2
            if low - source < emulated:
                text.append(
                    f"cvt.rn.f16x2.f32 h, ${low + 1}, ${low};"
                    f" fma.rn.relu.f16x2 h, h, one, twelve;"
                    " add.rn.f16x2 r, h, big; add.rn.f16x2 i, r, small;"
                    " sub.rn.f16x2 h, h, i;"
                    " fma.rn.f16x2 p, h, c2, c1; fma.rn.f16x2 p, p, h, c0;"
                    " and.b32 r, r, 0x001F001F; shl.b32 r, r, 10; add.u32 p, p, r;"
                    f" cvt.rn.satfinite.e4m3x2.f16x2 {name}, p;"
                )
            else:
                text.append(
                    f"ex2.approx.ftz.f32 a, ${low}; ex2.approx.ftz.f32 b, ${low + 1};"
                    f" cvt.rn.satfinite.e4m3x2.f32 {name}, b, a;"
                )
        text.append(f"mov.b32 ${word}, {{lo, hi}};")
    return " ".join(text) + "}"


def _codes_operands(count: int) -> str:
    return ",".join(["=r"] * (count // 4) + ["f"] * count)


RESCALE_64 = gl.constexpr(_rescale_text(64))
RESCALE_64_OPERANDS = gl.constexpr(_rescale_constraints(64))
RESCALE_4 = gl.constexpr(_rescale_text(4))
RESCALE_4_OPERANDS = gl.constexpr(_rescale_constraints(4))
CODES_0, CODES_2, CODES_4 = (gl.constexpr(_codes_text(16, n)) for n in (0, 2, 4))
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
def rescale(acc, old, new, scale):
    """``acc * 2^((old - new) scale)``, skipped by a warp in which no row's maximum grew.

    ``acc`` is [64, 128] or [64, 8] in an accumulator layout, ``old`` and ``new`` [64]. Two rows a
    thread decide, the warp votes: after the first tiles of a long history nearly all are skipped.
    """
    old = gl.expand_dims(old, 1)
    new = gl.expand_dims(new, 1)
    if acc.shape[1] == 128:
        return gl.inline_asm_elementwise(
            RESCALE_64, RESCALE_64_OPERANDS, [acc, old, new, scale], gl.float32, True, 64
        )
    else:
        return gl.inline_asm_elementwise(
            RESCALE_4, RESCALE_4_OPERANDS, [acc, old, new, scale], gl.float32, True, 4
        )


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
        text: gl.constexpr = CODES_0
    elif EMULATED == 2:
        text: gl.constexpr = CODES_2
    else:
        text: gl.constexpr = CODES_4
    return gl.inline_asm_elementwise(text, CODES_OPERANDS, [x], gl.float8e4nv, True, 16)
