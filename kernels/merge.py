"""Merge partial attention: splits of one sequence, or ranks that hold parts of it.

Partials are normalised and carry a base-2 log-sum-exp, so out = sum 2**(lse_i - top) out_i divided
by sum 2**(lse_i - top), and lse = top + log2 of that sum. The order of the sum is fixed: the same
partials give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from kernels.decode_plan import DecodePlan

INTERPRETED = triton.knobs.runtime.interpret
WIDTH = 32  # elements of D a program merges: many small programs, each with all loads in flight
PIECES = ((16, 4), (128, 4), (256, 4), (512, 8))  # partials held at once, and warps


@triton.jit(
    do_not_specialize=["rows", "pieces", "q_heads"],
    do_not_specialize_on_alignment=["lses", "merges", "out", "out_lse"],
)
def merge_kernel(
    outs,
    lses,
    merges,
    out,
    out_lse,
    rows,
    pieces,
    q_heads,
    G: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
    WIDTH: tl.constexpr,
    TABLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One output row (a query head of a sequence) and ``WIDTH`` of its elements."""
    r = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    if TABLE:  # row r of the output is head r % G of merge r // G; partials are [slot, G, D]
        unit = merges + r // G * 4
        at = tl.load(unit) * q_heads + tl.load(unit + 1) * G + r % G
        begin = tl.load(unit + 2) * G + r % G
        pieces = tl.load(unit + 3)
        step = G
    else:  # partials are [pieces, rows, D]
        at = r
        begin = r
        step = rows
    if PDL:
        gdc_wait()
    p = tl.arange(0, P)
    d = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    acc = tl.zeros([WIDTH], tl.float32)
    for lo in range(0, pieces, P):
        source = begin + (lo + p).to(tl.int64) * step
        x = tl.load(lses + source, mask=lo + p < pieces, other=float("-inf")).to(tl.float32)
        # Pieces of a split are all written, so their loads need not wait for x.
        written = lo + p < pieces if TABLE else x > float("-inf")
        mask = written[:, None] & (d < D)[None, :]
        o = tl.load(outs + source[:, None] * D + d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        w = tl.exp2(x - shift)
        rescale = tl.exp2(top - shift)
        total = total * rescale + tl.sum(w, 0)
        acc = acc * rescale + tl.sum(o.to(tl.float32) * w[:, None], 0)
        top = new_top
    result = acc * tl.where(total > 0, 1.0 / total, 0.0)
    where = at.to(tl.int64)
    tl.store(out + where * D + d, result.to(out.dtype.element_ty), mask=d < D)
    if tl.program_id(1) == 0:
        tl.store(out_lse + where, (top + tl.log2(total)).to(out_lse.dtype.element_ty))


def _held(pieces: int) -> tuple[int, int]:
    return next((shape for shape in PIECES if shape[0] >= pieces), PIECES[-1])


def merge_pieces(plan: DecodePlan, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Merge the pieces that a split decode step left in its plan's partials."""
    g = plan.geometry
    held, warps = _held(plan.max_pieces)
    merge_kernel[(len(plan.cut.merges) * g.group, g.head_dim // WIDTH)](
        plan.partial_out,
        plan.partial_lse,
        plan.merges,
        out,
        lse,
        0,
        0,
        g.q_heads,
        G=g.group,
        D=g.head_dim,
        P=held,
        WIDTH=WIDTH,
        TABLE=True,
        PDL=not INTERPRETED,
        num_warps=warps,
        launch_pdl=True,
    )


def merge(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge normalised partials by their base-2 log-sum-exp.

    Parameters
    ----------
    outs : torch.Tensor
        ``[N, ..., D]``, float32 or bf16, contiguous; N splits or ranks.
    lses : torch.Tensor
        float32 ``[N, ...]``, contiguous; -inf marks a partial that saw nothing, whose ``outs`` are
        not read.
    out, lse : torch.Tensor, optional
        Contiguous ``[..., D]`` in any float dtype (that of ``outs`` by default) and float32
        ``[...]``.

    Raises
    ------
    ValueError
        When the shapes do not fit each other.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"lses={tuple(lses.shape)}: must be {tuple(outs.shape[:-1])}")
    if not (outs.is_contiguous() and lses.is_contiguous()):
        raise ValueError("outs, lses: must be contiguous")
    if out is None:
        out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    if lse is None:
        lse = torch.empty(lses.shape[1:], dtype=torch.float32, device=outs.device)
    width, rows = outs.shape[-1], lses[0].numel()
    held, warps = _held(len(outs))
    merge_kernel[(rows, -(-width // WIDTH))](
        outs,
        lses,
        lses,
        out,
        lse,
        rows,
        len(outs),
        0,
        G=1,
        D=width,
        P=held,
        WIDTH=WIDTH,
        TABLE=False,
        PDL=False,
        num_warps=warps,
    )
    return out, lse
