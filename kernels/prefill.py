"""Prefill: the attention of a chunk of queries over its whole history, causal.

``plan_prefill`` chooses the kernel by shape and cuts the work; one plan serves every layer. FP8 K/V
with D = 128 and pages of 128 tokens run the Hopper kernel (:mod:`kernels.prefill_hopper`) where the
device has it; everything else runs :mod:`kernels.prefill_portable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kernels.config import SM_COUNT_H200, check_reach
from kernels.prefill_config import (
    HopperConfig,
    PrefillConfig,
    all_prefill_configs,
    choose,
)
from kernels.prefill_plan import Cut, cut
from kernels.prefill_scratch import MERGE_INTS, SEGMENT_INTS, scratch_sizes
from kernels.view import Geometry, View

if TYPE_CHECKING:
    import torch

__all__ = ["PrefillPlan", "all_prefill_configs", "plan_prefill", "prefill"]

MAX_TOKENS = 2**31 - 1024
MERGE_ROWS = 16  # rows that a program of the merge takes


@dataclass
class PrefillPlan:
    """One chunk of one sequence, planned; it serves every layer of the view's group.

    Parameters
    ----------
    variant : str
        Name of the kernel that runs: ``gluon_3wg`` or a ``triton_...``.
    config : HopperConfig or PortableConfig
    geometry : Geometry
    row, start, tokens, window : int
        Row of the batch; the queries are tokens ``[start, start + tokens)`` and see tokens from
        ``window`` on.
    cut : Cut
        The work cut; ``segments``, ``shares`` and ``merges`` are its tables on the device.
    part, part_lse : torch.Tensor
        float32 partials ``[slots, rows, D]`` and ``[slots, rows]``.
    arena : torch.Tensor
    """

    variant: str
    config: PrefillConfig
    geometry: Geometry
    row: int
    start: int
    tokens: int
    window: int
    cut: Cut = field(repr=False)
    segments: torch.Tensor = field(repr=False)
    shares: torch.Tensor = field(repr=False)
    merges: torch.Tensor = field(repr=False)
    part: torch.Tensor = field(repr=False)
    part_lse: torch.Tensor = field(repr=False)
    arena: torch.Tensor = field(repr=False)

    @property
    def programs(self) -> int:
        """Programs of the launch."""
        return len(self.cut.shares) - 1

    @cached_property
    def boxes(self) -> Any:  # noqa: ANN401
        """TMA descriptors, made at the first layer."""
        if isinstance(self.config, HopperConfig):
            from kernels.prefill_hopper import tma_boxes

            return tma_boxes(self.geometry, self.arena, self.start + self.tokens)
        from kernels.prefill_portable import tma_boxes as portable_boxes

        return portable_boxes(self.geometry, self.arena, self.config.block_tokens)


def plan_prefill(
    view: View,
    row: int,
    start: int,
    tokens: int,
    sm_count: int | None = None,
    scratch: torch.Tensor | None = None,
    variant: str | None = None,
) -> PrefillPlan:
    """Plan the chunk of queries at positions ``[start, start + tokens)`` of one sequence.

    Parameters
    ----------
    view : View
        K/V of the chunk are stored already; ``starts[row]`` is the first visible token.
    row, start, tokens : int
        Row of the batch, position of the first query (= tokens of history), queries.
    sm_count : int, optional
        Streaming multiprocessors; by default the arena's device's.
    scratch : torch.Tensor, optional
        uint8 on the arena's device, 256-byte aligned, at least
        :func:`kernels.prefill_scratch.prefill_scratch_bytes`; allocated when None.
    variant : str, optional
        A kernel instead of the chooser's; see :func:`kernels.prefill_config.choose`.

    Raises
    ------
    ValueError
        For a chunk outside the sequence, a shape no kernel is written for, or too small a scratch.
    """
    import torch

    g, device = view.geometry, view.arena.device
    window = _check_chunk(view, row, start, tokens)
    check_reach(g, view.arena.numel())
    cuda = device.type == "cuda"
    hopper = cuda and torch.cuda.get_device_capability(device)[0] == 9
    config = choose(g, window, hopper, variant)
    if sm_count is None and cuda:
        sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    programs = (sm_count or SM_COUNT_H200) * config.programs_per_sm
    work = cut(start, tokens, window, g, config.rows, config.block_tokens, programs)
    names = _scratch(work, g, device, scratch)
    return PrefillPlan(
        config.variant, config, g, row, start, tokens, window, work, arena=view.arena, **names
    )


def _check_chunk(view: View, row: int, start: int, tokens: int) -> int:
    """The chunk's first visible token."""
    if not 0 <= row < view.sequences:
        raise ValueError(f"row={row}: the batch has rows 0 to {view.sequences - 1}")
    length, window = view.lengths_host[row], view.starts[row]
    if tokens < 1 or start < 0 or start + tokens > min(length, MAX_TOKENS):
        raise ValueError(
            f"start={start}, tokens={tokens}: the chunk must lie in the {length} stored tokens"
        )
    if not 0 <= window <= start:
        raise ValueError(f"starts[{row}]={window}: must be 0 to start={start}")
    return window


def _scratch(
    work: Cut, geometry: Geometry, device: torch.device, scratch: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """Slice the scratch into the plan's tensors and fill its tables."""
    import torch

    sizes = scratch_sizes(
        len(work.segments),
        len(work.shares) - 1,
        len(work.merges),
        work.slots,
        work.rows,
        geometry.head_dim,
    )
    need = sum(sizes.values())
    if scratch is None:
        scratch = torch.empty(need, dtype=torch.uint8, device=device)
    if scratch.numel() < need:
        raise ValueError(f"scratch={scratch.numel()} bytes: this prefill chunk needs {need}")
    shapes = {
        "part": (torch.float32, (work.slots, work.rows, geometry.head_dim)),
        "part_lse": (torch.float32, (work.slots, work.rows)),
        "segments": (torch.int32, (len(work.segments), SEGMENT_INTS)),
        "shares": (torch.int32, (len(work.shares),)),
        "merges": (torch.int32, (len(work.merges), MERGE_INTS)),
    }
    found, at = {}, 0
    for name, (dtype, shape) in shapes.items():
        flat = scratch[at : at + sizes[name]].view(dtype)
        count = int(torch.Size(shape).numel())
        found[name] = flat[:count].view(shape)
        at += sizes[name]
    for name in ("segments", "shares", "merges"):
        found[name].copy_(torch.from_numpy(getattr(work, name)))
    return found


def prefill(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: PrefillPlan,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the planned chunk.

    Parameters
    ----------
    view : View
        The chunk's K/V of this layer are stored.
    layer : int
        Layer of the view's group.
    q : torch.Tensor
        ``[tokens, q_heads, D]`` contiguous; fp8_e4m3 for FP8 K/V, bf16 for BF16 K/V.
    plan : PrefillPlan
        From :func:`plan_prefill`.
    out, lse : torch.Tensor, optional
        bf16 ``[tokens, q_heads, D]`` and float32 ``[tokens, q_heads]``, contiguous.
    q_scale : float
        A code of ``q`` times this is its value.
    sm_scale : float, optional
        Softmax scale, by default ``D ** -0.5``.

    Returns
    -------
    out, lse : torch.Tensor
        The normalised output, and the base-2 log-sum-exp of the scaled scores.

    Raises
    ------
    ValueError
        When ``q`` has another shape or dtype, or ``layer`` is not of the group.
    """
    import torch

    from kernels.reference import LOG2E

    g = plan.geometry
    _check_call(view, layer, q, plan)
    if out is None:
        out = torch.empty(q.shape, dtype=torch.bfloat16, device=q.device)
    if lse is None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if sm_scale is None:
        sm_scale = g.head_dim**-0.5
    if isinstance(plan.config, HopperConfig):
        from kernels.prefill_hopper import launch
    else:
        from kernels.prefill_portable import launch
    launch(plan, view, layer, q, out, lse, sm_scale * LOG2E * q_scale)
    if len(plan.cut.merges):
        from kernels.prefill_merge import merge_pieces_kernel

        merge_pieces_kernel[(len(plan.cut.merges), plan.cut.rows // MERGE_ROWS)](
            plan.part,
            plan.part_lse,
            plan.merges,
            out,
            lse,
            plan.tokens * g.group,
            g.q_heads,
            G=g.group,
            D=g.head_dim,
            ROWS=plan.cut.rows,
            BLOCK=MERGE_ROWS,
            num_warps=4,
        )
    return out, lse


def _check_call(view: View, layer: int, q: torch.Tensor, plan: PrefillPlan) -> None:
    from kernels.reference import DTYPES

    g = plan.geometry
    shape = (plan.tokens, g.q_heads, g.head_dim)
    if tuple(q.shape) != shape or not q.is_contiguous():
        raise ValueError(f"q={tuple(q.shape)}: must be {shape}, contiguous")
    if q.dtype != DTYPES[g.kv_dtype]:
        raise ValueError(f"q={q.dtype}: {g.kv_dtype} K/V takes {DTYPES[g.kv_dtype]}")
    if not 0 <= layer < g.layers:
        raise ValueError(f"layer={layer}: the group has layers 0 to {g.layers - 1}")
    if view.arena.data_ptr() != plan.arena.data_ptr():
        raise ValueError("view: the plan was made for another arena")
