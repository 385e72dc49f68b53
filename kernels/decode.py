"""Decode: one query token of each sequence against its whole history, in one launch and a merge."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.decode_kernel import blank_tokens, decode_kernel, tile_origin
from kernels.decode_plan import DecodePlan
from kernels.merge import merge_pieces
from kernels.reference import DTYPES, LOG2E
from kernels.view import View

INTERPRETED = triton.knobs.runtime.interpret

__all__ = ["blank_tokens", "decode", "tile_origin"]


def decode(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: DecodePlan,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token of each sequence over its visible tokens.

    Parameters
    ----------
    view : View
        Its lengths and windows are those of the plan.
    layer : int
        Layer of the view's group.
    q : torch.Tensor
        ``[sequences, q_heads, D]`` contiguous; fp8_e4m3 for FP8 K/V, bf16 for BF16 K/V.
    plan : DecodePlan
        From :func:`kernels.decode_plan.plan_decode`; serves every layer.
    out, lse : torch.Tensor, optional
        float32 ``[sequences, q_heads, D]`` and ``[sequences, q_heads]``, contiguous.
    q_scale : float
        A code of ``q`` times this is its value.
    sm_scale : float, optional
        Softmax scale, by default ``D ** -0.5``.

    Returns
    -------
    out, lse : torch.Tensor
        The normalised output, and the base-2 log-sum-exp of the scaled scores. A sequence with no
        visible token gives 0 and -inf.

    Raises
    ------
    ValueError
        When ``q`` has another shape or dtype, or ``layer`` is not of the group.
    """
    g, config = plan.geometry, plan.config
    _check(view, layer, q, plan)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if sm_scale is None:
        sm_scale = g.head_dim**-0.5
    tma = config.variant == "swap_ab_tma"
    k_box, v_box = plan.boxes if tma else (None, None)
    fp8 = g.kv_dtype == "fp8_e4m3"
    decode_kernel[(plan.programs,)](
        q,
        view.arena.data_ptr(),
        k_box,
        v_box,
        view.page_table,
        view.page_table.stride(0),
        g.page_tokens,
        g.page_tokens.bit_length() - 1,
        g.page_bytes // g.itemsize,
        plan.records,
        out,
        lse,
        plan.partial_out,
        plan.partial_lse,
        view.k_scale,
        view.v_scale,
        sm_scale * LOG2E * q_scale,
        layer,
        plan.unsettled_tokens,
        KV_HEADS=g.kv_heads,
        G=g.group,
        N=config.n,
        D=g.head_dim,
        BLOCK=config.block_tokens,
        DTYPE=tl.float8e4nv if fp8 else tl.bfloat16,
        TMA=tma,
        STAGES=config.num_stages,
        EARLY=config.early_blocks,
        PDL=not INTERPRETED,
        WIDE=INTERPRETED and not fp8,
        INTERPRETED=INTERPRETED,
        num_warps=config.num_warps,
        launch_pdl=True,
    )
    if plan.cut.merges:
        merge_pieces(plan, out, lse)
    return out, lse


def _check(view: View, layer: int, q: torch.Tensor, plan: DecodePlan) -> None:
    g = plan.geometry
    shape = (plan.sequences, g.q_heads, g.head_dim)
    if tuple(q.shape) != shape or not q.is_contiguous():
        raise ValueError(f"q={tuple(q.shape)}: must be {shape}, contiguous")
    if q.dtype != DTYPES[g.kv_dtype]:
        raise ValueError(f"q={q.dtype}: {g.kv_dtype} K/V takes {DTYPES[g.kv_dtype]}")
    if not 0 <= layer < g.layers:
        raise ValueError(f"layer={layer}: the group has layers 0 to {g.layers - 1}")
    if view.arena is not plan.arena and view.arena.data_ptr() != plan.arena.data_ptr():
        raise ValueError("view: the plan was made for another arena")
