"""Cut the work of one decode step into equal shares, one for each program of a single wave.

The work is one list of blocks of tokens: every (sequence, KV head) in turn. A program takes a run
of it, which may end in the middle of one sequence and start in the middle of another, so that one
long sequence and many short ones keep the whole device busy alike. Where a (sequence, KV head) is
cut, each piece leaves a normalised partial and its LSE in scratch memory, and a merge follows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels.config import (
    SM_COUNT_H200,
    DecodeConfig,
    check_reach,
    decode_config,
)
from kernels.view import DTYPE_BYTES, Geometry, View

if TYPE_CHECKING:
    import torch

RECORD_INTS = 8
MERGE_INTS = 4
MAX_TOKENS = 2**31 - 1024
DIRECT = -1  # a segment that is a whole (sequence, KV head) writes the output itself
MIN_SHARE_BLOCKS = 2  # below it, more pieces cost more than they save
EDGE_COST_BLOCKS = 1.5  # a masked block is loaded and computed without overlap


@dataclass(frozen=True)
class Unit:
    """The visible tokens [first, end) of one sequence, for one KV head."""

    row: int
    head: int
    first: int
    end: int


@dataclass
class Cut:
    """Work that has been cut.

    ``segments`` are ``[row, head, first block, end block, first token, end token, slot]``,
    program p has segments ``shares[p]`` to ``shares[p + 1]``, and ``merges`` are
    ``[row, head, first slot, pieces]``.
    """

    segments: list[tuple[int, ...]] = field(default_factory=list)
    shares: list[int] = field(default_factory=lambda: [0])
    merges: list[tuple[int, int, int, int]] = field(default_factory=list)
    slots: int = 0


def _fill(units: list[Unit], programs: int, share: float, config: DecodeConfig) -> Cut | None:
    """Pack the units into programs of at most ``share`` blocks' cost; None if they do not fit."""
    block, start_cost = config.block_tokens, config.segment_cost_blocks
    cut, left = Cut(), share
    for unit in units:
        at, end = unit.first // block, -(-unit.end // block)
        pieces: list[tuple[int, int]] = []
        while True:
            edges = (at * block < unit.first) + 0.0
            whole = end - at + EDGE_COST_BLOCKS * (edges + (unit.end < end * block))
            if whole + start_cost <= left:
                take = end - at
            else:
                take = min(int(left - start_cost - EDGE_COST_BLOCKS * edges), end - at - 1)
            if take >= min(2, end - at):
                pieces.append((at, at + take))
                cut.segments.append((unit.row, unit.head, at, at + take, unit.first, unit.end))
                left -= take + start_cost + EDGE_COST_BLOCKS * edges
                at += take
                if at >= end:
                    left -= EDGE_COST_BLOCKS * (unit.end < end * block)
                    break
            if left == share:
                return None  # even a whole program is too small
            cut.shares.append(len(cut.segments))
            left = share
            if len(cut.shares) > programs:
                return None
        _number(cut, unit, len(pieces))
    cut.shares.append(len(cut.segments))
    return cut


def _number(cut: Cut, unit: Unit, pieces: int) -> None:
    """Give the last ``pieces`` segments their slots, or the output when there is one."""
    split = pieces > 1
    for index in range(pieces):
        at = len(cut.segments) - pieces + index
        slot = cut.slots + index if split else DIRECT
        cut.segments[at] = (*cut.segments[at], slot)
    if split:
        cut.merges.append((unit.row, unit.head, cut.slots, pieces))
        cut.slots += pieces


def cut_work(units: list[Unit], programs: int, config: DecodeConfig) -> Cut:
    """Cut units into at most ``programs`` shares whose largest is as small as can be.

    Parameters
    ----------
    units : list of Unit
    programs : int
        Programs of one wave.
    config : DecodeConfig
        ``block_tokens`` and ``segment_cost_blocks``.
    """
    block = config.block_tokens
    blocks = sum(max(0, -(-u.end // block) - u.first // block) for u in units)
    low = max(MIN_SHARE_BLOCKS, int((blocks + config.segment_cost_blocks * len(units)) / programs))
    step = 1
    while (best := _fill(units, programs, low + step, config)) is None:
        step *= 2
    low, high = low + step // 2, low + step  # best fits high
    while low + 1 < high:
        middle = (low + high) // 2
        cut = _fill(units, programs, middle, config)
        if cut is None:
            low = middle
        else:
            best, high = cut, middle
    return best


def records(cut: Cut, kv_heads: int) -> list[tuple[int, ...]]:
    """What the kernel reads: a program's first segment at its own number, the others behind.

    ``[row * kv_heads + head, first block, end block, first token, end token, slot, segments of the
    program, record of its second]``: one load tells a program where its first tokens are.
    """
    programs = len(cut.shares) - 1
    first: list[tuple[int, ...]] = []
    rest: list[tuple[int, ...]] = []
    for lo, hi in pairwise(cut.shares):
        rows = [(row * kv_heads + head, *where) for row, head, *where in cut.segments[lo:hi]]
        first.append((*rows[0], hi - lo, programs + len(rest)))
        rest += [(*row, 0, 0) for row in rows[1:]]
    return first + rest


@dataclass
class DecodePlan:
    """One decode step of a batch, planned; it serves every layer and any CUDA graph.

    The plan is made for the view's lengths and windows; a longer sequence needs a new one.
    Its tensors belong to it, so a graph that captured them must not outlive it.
    """

    variant: str
    config: DecodeConfig
    geometry: Geometry
    sequences: int
    programs: int
    cut: Cut = field(repr=False)
    records: torch.Tensor = field(repr=False)
    merges: torch.Tensor = field(repr=False)
    partial_out: torch.Tensor = field(repr=False)
    partial_lse: torch.Tensor = field(repr=False)
    arena: torch.Tensor = field(repr=False)
    unsettled_tokens: int

    @property
    def max_pieces(self) -> int:
        """Pieces of the (sequence, KV head) that is cut into the most."""
        return max((m[3] for m in self.cut.merges), default=0)

    @cached_property
    def boxes(self) -> tuple[Any, Any]:
        """TMA descriptors of a block of K and of V (:mod:`kernels.config` lists them)."""
        return tma_boxes(self.geometry, self.arena, self.config.block_tokens)


def tma_boxes(geometry: Geometry, arena: torch.Tensor, block_tokens: int) -> tuple[Any, Any]:
    """Descriptors ``[pages, rows of a page, row]`` over the whole arena, for K and for V tiles.

    Raises
    ------
    ValueError
        When the arena is out of their reach.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    from kernels.reference import DTYPES

    check_reach(geometry, arena.numel())
    pages = arena.numel() // geometry.page_bytes
    codes = arena[: pages * geometry.page_bytes].view(DTYPES[geometry.kv_dtype])
    page = geometry.page_bytes // DTYPE_BYTES[geometry.kv_dtype]

    def box(row: int, block: list[int]) -> Any:  # noqa: ANN401
        return TensorDescriptor(codes, [pages, page // row, row], [page, row, 1], block)

    depth, size = geometry.head_dim, geometry.page_tokens
    return box(depth, [1, block_tokens, depth]), box(size, [1, depth, block_tokens])


def units_of(view: View) -> list[Unit]:
    """Every (sequence, KV head) of a batch and its visible tokens."""
    for row, length in enumerate(view.lengths_host):
        if length > MAX_TOKENS:
            raise ValueError(f"lengths_host[{row}]={length}: at most {MAX_TOKENS} tokens")
    return [
        Unit(row, head, min(start, length), length)
        for row, (start, length) in enumerate(zip(view.starts, view.lengths_host, strict=True))
        for head in range(view.geometry.kv_heads)
    ]


def plan_decode(
    view: View,
    sm_count: int | None = None,
    scratch: torch.Tensor | None = None,
    config: DecodeConfig | None = None,
    unsettled_tokens: int | None = None,
) -> DecodePlan:
    """Plan one decode step over the view's stored tokens.

    Parameters
    ----------
    view : View
        ``lengths_host`` and ``starts`` decide the plan.
    sm_count : int, optional
        Streaming multiprocessors; by default the arena's device's.
    scratch : torch.Tensor, optional
        uint8 on the arena's device, 16-byte aligned, at least
        :func:`kernels.config.decode_scratch_bytes`; allocated when None.
    config : DecodeConfig, optional
        Instead of :func:`kernels.config.decode_config`'s choice.
    unsettled_tokens : int, optional
        A promise, which saves up to 1.4 us a layer: of each sequence only so many of the newest
        tokens may still be written by the kernel that is launched right before; older ones, the
        page table and the scales were there before it started. By default nothing is promised.

    Raises
    ------
    ValueError
        For a shape no kernel is written for, too small a scratch, or a length beyond int32.
    """
    import torch

    g, device = view.geometry, view.arena.device
    config = config or decode_config(g)
    if sm_count is None and device.type == "cuda":
        sm_count = torch.cuda.get_device_properties(device).multi_processor_count
    wave = (sm_count or SM_COUNT_H200) * config.programs_per_sm
    cut = cut_work(units_of(view), wave, config)
    out, lse = _partials(cut.slots, g, device, scratch)

    def table(rows: list[Any], width: int) -> torch.Tensor:
        return torch.from_numpy(np.array(rows, np.int32).reshape(-1, width)).to(device)

    return DecodePlan(
        variant=config.variant,
        config=config,
        geometry=g,
        sequences=view.sequences,
        programs=len(cut.shares) - 1,
        cut=cut,
        records=table(records(cut, g.kv_heads), RECORD_INTS),
        merges=table(cut.merges, MERGE_INTS),
        partial_out=out,
        partial_lse=lse,
        arena=view.arena,
        unsettled_tokens=MAX_TOKENS if unsettled_tokens is None else unsettled_tokens,
    )


def _partials(
    slots: int, geometry: Geometry, device: torch.device, scratch: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 ``[slots, group, D]`` and ``[slots, group]``, cut from scratch or allocated."""
    import torch

    out_shape = (slots, geometry.group, geometry.head_dim)
    out_bytes = slots * geometry.group * geometry.head_dim * 4
    need = out_bytes + slots * geometry.group * 4
    if scratch is None:
        scratch = torch.empty(max(need, 16), dtype=torch.uint8, device=device)
    if scratch.numel() < need:
        raise ValueError(f"scratch={scratch.numel()} bytes: this decode step needs {need}")
    out = scratch[:out_bytes].view(torch.float32).view(out_shape)
    lse = scratch[out_bytes:need].view(torch.float32).view(out_shape[:2])
    return out, lse
