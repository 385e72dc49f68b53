"""The same functions on the same layout for a machine without a GPU: float32 on torch's CPU.

Sequences are streamed in blocks of 16Ki tokens; a block's codes become float32, the scores of all
query rows are one matrix product, and the softmax is online in base 2. Memory is tens of MB for
any context.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from kernels.host_pages import CODE_SCALE, BlockReader, write_run, write_tokens
from kernels.reference import LOG2E, quantise
from kernels.view import Geometry, View

VARIANT = "host_fp32"
ROW_BLOCK = 128  # query rows whose scores are held at a time


@dataclass(frozen=True)
class HostPlan:
    """A planned decode step or prefill chunk; its buffers serve every layer.

    Parameters
    ----------
    row, start, tokens : int
        The prefill chunk: row of the batch, position of its first query, and queries. Decode
        needs none.
    """

    geometry: Geometry
    row: int = 0
    start: int = 0
    tokens: int = 0
    variant: str = VARIANT
    reader: BlockReader = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reader", BlockReader(self.geometry))


def plan_decode(
    view: View, sm_count: int | None = None, scratch: torch.Tensor | None = None
) -> HostPlan:
    """Plan one decode step; the host needs no split, so only the buffers are made."""
    return HostPlan(view.geometry)


def plan_prefill(
    view: View,
    row: int,
    start: int,
    tokens: int,
    sm_count: int | None = None,
    scratch: torch.Tensor | None = None,
) -> HostPlan:
    """Plan the chunk of queries at positions [start, start + tokens) of one sequence."""
    return HostPlan(view.geometry, row, start, tokens)


def append(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Quantise and store single tokens; see :func:`kernels.append.append`."""
    codes = _codes(view, k, v)
    write_tokens(view, layer, *codes, rows, positions)


def append_run(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, start: int
) -> None:
    """Quantise and store consecutive tokens; see :func:`kernels.append.append_run`."""
    step = 1 << 15
    for lo in range(0, len(k), step):
        codes = _codes(view, k[lo : lo + step], v[lo : lo + step])
        write_run(view, layer, *codes, row, start + lo)


def append_codes_run(
    view: View,
    layer: int,
    k_codes: torch.Tensor,
    v_codes: torch.Tensor,
    row: int,
    start: int,
) -> None:
    """Store consecutive tokens that are quantised already.

    Parameters
    ----------
    k_codes, v_codes : torch.Tensor
        uint8 ``[T, kv_heads, D]`` FP8 codes (or int16 ``[T, kv_heads, D]`` BF16 bits). Fastest
        when the tokens of ``v_codes`` are contiguous in memory, as in
        ``bank.permute(2, 0, 1)`` of a bank ``[kv_heads, D, T]``.
    row, start : int
        Row of the batch and position of the first token.
    """
    write_run(view, layer, k_codes, v_codes, row, start)


def _codes(view: View, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = view.geometry.kv_dtype
    return (
        quantise(k, view.k_scale[:, None], dtype),
        quantise(v, view.v_scale[:, None], dtype),
    )


def decode(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: HostPlan,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one query token of each sequence; see :func:`kernels.decode.decode`."""
    g = view.geometry
    out = (
        q.new_empty((view.sequences, g.q_heads, g.head_dim), dtype=torch.float32)
        if (out is None)
        else out
    )
    lse = q.new_empty((view.sequences, g.q_heads), dtype=torch.float32) if lse is None else lse
    for row in range(view.sequences):
        for head in range(g.kv_heads):
            mine = slice(head * g.group, (head + 1) * g.group)
            rows = _Rows(view, layer, head, q[row, mine], q_scale, sm_scale)
            rows.attend(plan.reader, row, view.starts[row], view.lengths_host[row])
            rows.store(out[row, mine], lse[row, mine])
    return out, lse


def prefill(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: HostPlan,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the planned chunk; see :func:`kernels.prefill.prefill`."""
    g = view.geometry
    shape = (plan.tokens, g.q_heads, g.head_dim)
    out = q.new_empty(shape, dtype=torch.bfloat16) if out is None else out
    lse = q.new_empty(shape[:2], dtype=torch.float32) if lse is None else lse
    first, end = view.starts[plan.row], plan.start + plan.tokens
    for head in range(g.kv_heads):
        mine = slice(head * g.group, (head + 1) * g.group)
        packed = q[:, mine].reshape(-1, g.head_dim)
        rows = _Rows(view, layer, head, packed, q_scale, sm_scale)
        rows.last_visible = plan.start + torch.arange(len(packed)) // g.group
        rows.attend(plan.reader, plan.row, first, end)
        rows.store(out[:, mine], lse[:, mine])
    return out, lse


def merge(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partials of splits or ranks; see :func:`kernels.merge.merge`."""
    top = lses.float().amax(0)
    shift = torch.where(top.isinf(), 0.0, top)
    weights = torch.exp2(lses.float() - shift)
    total = weights.sum(0)
    seen = (lses > -math.inf)[..., None]
    parts = torch.where(seen, outs.float() * weights[..., None], 0.0)
    merged = parts.sum(0) / torch.where(total > 0, total, 1.0)[..., None]
    merged_lse = shift + torch.log2(total)
    out = merged if out is None else out.copy_(merged)
    return out, merged_lse if lse is None else lse.copy_(merged_lse)


class _Rows:
    """Query rows of one KV head and their online softmax."""

    def __init__(
        self,
        view: View,
        layer: int,
        head: int,
        q: torch.Tensor,
        q_scale: float,
        sm_scale: float | None,
    ) -> None:
        g = view.geometry
        self.view, self.layer, self.head = view, layer, head
        scale = g.head_dim**-0.5 if sm_scale is None else sm_scale
        code = CODE_SCALE[g.kv_dtype]
        self.q = q.float() * (scale * LOG2E * q_scale * code * float(view.k_scale[head]))
        self.v_factor = code * float(view.v_scale[head])
        self.last_visible: torch.Tensor | None = None
        self.top = torch.full((len(q),), -math.inf)
        self.total = torch.zeros(len(q))
        self.acc = torch.zeros(len(q), g.head_dim)

    def attend(self, reader: BlockReader, row: int, first: int, end: int) -> None:
        """Attend to tokens [first, end) of one sequence, block by block."""
        size = self.view.geometry.page_tokens
        pages = range(first // size, -(-end // size), reader.block_pages)
        for lo in pages:
            hi = min(lo + reader.block_pages, -(-end // size))
            k, v = reader.read(self.view, self.layer, self.head, row, lo, hi)
            before, after = max(0, first - lo * size), max(0, hi * size - end)
            if after:  # the unwritten tail may hold anything, and 0 x NaN is NaN
                v[-1, :, size - after :] = 0.0
            for at in range(0, len(self.q), ROW_BLOCK):
                self._block(slice(at, at + ROW_BLOCK), k, v, lo * size, before, after)

    def _block(
        self,
        rows: slice,
        k: torch.Tensor,
        v: torch.Tensor,
        position: int,
        before: int,
        after: int,
    ) -> None:
        s = self.q[rows] @ k.T
        tokens = s.shape[1]
        s[:, :before] = -math.inf
        s[:, tokens - after :] = -math.inf
        if self.last_visible is not None:
            last = self.last_visible[rows] - position
            if int(last[0]) < tokens - 1:
                s.masked_fill_(torch.arange(tokens) > last[:, None], -math.inf)
        top = torch.maximum(self.top[rows], s.amax(1))
        shift = torch.where(top.isinf(), 0.0, top)
        p = s.sub_(shift[:, None]).exp2_()
        keep = torch.exp2(self.top[rows] - shift)
        self.total[rows] = self.total[rows] * keep + p.sum(1)
        by_page = p.view(len(p), -1, v.shape[2]).transpose(0, 1)
        pv = torch.bmm(by_page, v.transpose(1, 2)).sum(0)
        self.acc[rows] = self.acc[rows] * keep[:, None] + pv
        self.top[rows] = top

    def store(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Write the normalised rows and their base-2 log-sum-exp; 0 and -inf where none is seen."""
        total = torch.where(self.total > 0, self.total, 1.0)
        out.copy_((self.acc * (self.v_factor / total)[:, None]).view(out.shape))
        lse.copy_((self.top + torch.log2(self.total)).view(lse.shape))
