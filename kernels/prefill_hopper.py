"""Launch the Hopper prefill kernel: its TMA descriptors and arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from kernels.prefill_config import HopperConfig
from kernels.prefill_gluon import TILE_3D, TILE_5D, prefill_kernel
from kernels.view import PAGE_TOKENS, Geometry, View

if TYPE_CHECKING:
    from kernels.prefill import PrefillPlan

HEAD_DIM = 128
TILE_BYTES = HEAD_DIM * PAGE_TOKENS
MAX_TILES = 2**28  # the K box counts 16-row units, 8 a tile, in an int32: 4 TiB


def check_reach(arena_bytes: int) -> None:
    """Refuse an arena that the K box cannot address.

    Raises
    ------
    ValueError
        When it is larger than 4 TiB.
    """
    if arena_bytes > MAX_TILES * TILE_BYTES:
        raise ValueError(
            f"arena of {arena_bytes} bytes: the prefill kernel's TMA box reaches "
            f"{MAX_TILES * TILE_BYTES}"
        )


def tma_boxes(geometry: Geometry, arena: torch.Tensor, end: int) -> tuple[Any, Any, Any]:
    """Descriptors of a K tile, a V tile, and the V tile that holds token ``end - 1``.

    The arena is a run of tiles of 16 KiB. The K box has five dimensions (16 tokens, b, t, j, byte)
    with strides of 16, 2, 4 and 1 rows: it brings token 16a + 4t + 2b + j to row 16a + 8b + 2t + j.
    The last descriptor ends at the last token, so that TMA writes zeros for what lies behind it.
    """
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    check_reach(arena.numel())
    pages = arena.numel() // geometry.page_bytes
    codes = arena[: pages * geometry.page_bytes].view(torch.float8_e4m3fn)
    tiles, d = codes.numel() // TILE_BYTES, HEAD_DIM
    k = TensorDescriptor(
        codes,
        [tiles * 8, 2, 4, 2, d],
        [16 * d, 2 * d, 4 * d, d, 1],
        [8, 2, 4, 2, d],
        TILE_5D.value,
    )

    def v_box(tokens: int) -> Any:  # noqa: ANN401
        shape, strides = [tiles, d, tokens], [TILE_BYTES, PAGE_TOKENS, 1]
        return TensorDescriptor(codes, shape, strides, [1, d, PAGE_TOKENS], TILE_3D.value)

    return k, v_box(PAGE_TOKENS), v_box((end - 1) % PAGE_TOKENS + 1)


def launch(
    plan: PrefillPlan,
    view: View,
    layer: int,
    q: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
) -> None:
    """Run the kernel for a plan; arguments have been checked by the caller.

    Raises
    ------
    ValueError
        When ``q`` or ``out`` is not aligned to 16 bytes.
    """
    for name, tensor in (("q", q), ("out", out)):
        if tensor.data_ptr() % 16:
            raise ValueError(f"{name}: its address must be a multiple of 16 bytes")
    g, config = plan.geometry, plan.config
    assert isinstance(config, HopperConfig)
    k_tile = layer * 2 * g.kv_heads
    prefill_kernel[(plan.programs,)](
        *plan.boxes,
        view.page_table[plan.row],
        plan.segments,
        plan.shares,
        q,
        out,
        lse,
        plan.part,
        plan.part_lse,
        view.k_scale,
        view.v_scale,
        scale,
        plan.start,
        plan.tokens * g.group,
        g.kv_heads,
        g.group,
        (plan.start + plan.tokens - 1) // PAGE_TOKENS,
        g.page_bytes // TILE_BYTES,
        k_tile,
        k_tile + g.kv_heads,
        STAGES=config.stages,
        num_warps=4,
        maxnreg=128,
    )
