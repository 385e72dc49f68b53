"""What several ranks give together, against float64: before a step is timed, and what it left."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.buffers import query_dtype
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS, Gate
from harness.ranks_buffers import make_buffers
from harness.ranks_exchange import Exchange, project
from harness.ranks_group import Collectives, sizes_of
from strategies.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from harness.synthetic import Content
    from kernels.view import View

QUERY_SEEDS = 1 << 40
MAX_REDUCED_ERROR = 1e-2  # a sum of bf16 values, rounded to bf16 at each rank
MAX_MERGE_ERROR = 1e-4  # of float32 partials, merged in float32


@dataclass(frozen=True)
class MergedGate:
    """Errors of merged and reduced outputs against float64.

    ``distinct`` is whether no two context ranks' partials are alike: of ranks that are, one could
    be merged twice for the other and nothing would show it.
    """

    relative_rms: float
    lse_error: float
    reduced_error: float
    distinct: bool = True

    @property
    def passed(self) -> bool:
        """Whether several ranks give what one would; NaN never passes."""
        return (
            self.relative_rms < MAX_RELATIVE_RMS
            and self.lse_error < MAX_LSE_ERROR
            and self.reduced_error < MAX_REDUCED_ERROR
            and self.distinct
        )


def check_merged(
    gate: Gate, group: Collectives, strategy: Strategy, sequence: int, tokens: int
) -> MergedGate:
    """Compare merged outputs of first and last layer with the ranks' float64 partials, merged.

    Every rank's reference is computed from the content that it knows, over its own tokens; their
    merge in float64 is attention over the whole sequence.
    """
    sizes = sizes_of(gate.settings)
    squares, worst_lse, worst_sum, distinct = [0.0, 0.0], 0.0, 0.0, True
    for index, content in enumerate(gate.contents):
        view = strategy.batch([sequence])[index]
        for layer in sorted({0, view.geometry.layers - 1}):
            buffers = make_buffers(view, sizes, group.context_size, None)
            exchange = Exchange(group, sizes, buffers)
            q = _shared_queries(gate, view, layer, group.place.tensor_index)
            out, lse = _decoded(gate, view, layer, q)
            merged, merged_lse = exchange.merge(out, lse)
            outs, lses, mine = _partials(gate, group, content, sequence, layer, q, tokens)
            distinct = distinct and len(lses.unique(dim=0)) == len(lses)
            want, want_lse = _merged(outs, lses)
            squares[0] += (merged[0, mine].double() - want).square().sum().item()
            squares[1] += want.square().sum().item()
            off = (merged_lse[0, mine].double() - want_lse).abs().max().item()
            worst_lse = max(worst_lse, off if off == off else math.inf)
            off = _sum_error(exchange, merged)
            worst_sum = max(worst_sum, off if off == off else math.inf)
    rms = math.sqrt(squares[0] / squares[1]) if squares[1] else math.nan
    return MergedGate(rms, worst_lse, worst_sum, distinct)


def _decoded(
    gate: Gate, view: View, layer: int, q: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from kernels import ops

    sms = gate.settings.hardware.sm_count
    plan = ops.plan_decode(view, sms, gate.steps.decode_scratch(), unsettled_tokens=1)
    out, lse = ops.decode(view, layer, q, plan)
    return out.contiguous(), lse.contiguous()


def _shared_queries(gate: Gate, view: View, layer: int, tensor_index: int) -> torch.Tensor:
    """Queries that all context ranks of the same heads ask.

    Their seeds are none of the content's: a query that equals a key has so large a score that what
    the tensor cores drop of it (they sum FP8 products to 14 bits) shows in the LSE.
    """
    import torch

    g = view.geometry
    seed = QUERY_SEEDS + (gate.settings.seed * 1009 + layer) * 1009 + tensor_index
    q = torch.randn((1, g.q_heads, g.head_dim), generator=torch.Generator().manual_seed(seed))
    return q.to(query_dtype(g.kv_dtype)).to(view.arena.device)


def _partials(
    gate: Gate,
    group: Collectives,
    content: Content,
    sequence: int,
    layer: int,
    q: torch.Tensor,
    tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, slice]:
    """Every context rank's float64 output and LSE, and the query heads that they are of."""
    g = content.group.geometry
    head = layer % g.kv_heads
    mine = slice(head * g.group, (head + 1) * g.group)
    out, lse = gate.exact(content, sequence, layer, head, q[0, mine], tokens)
    return _gathered(group, out.contiguous()), _gathered(group, lse.contiguous()), mine


def _merged(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partials ``[ranks, ..., D]`` and their base-2 LSE as one attention's, float64."""
    import torch

    top = lses.amax(0)
    weights = torch.exp2(lses - top)
    total = weights.sum(0)
    return (outs * weights[..., None]).sum(0) / total[..., None], top + torch.log2(total)


def _sum_error(exchange: Exchange, merged: torch.Tensor) -> float:
    """All-reduced hidden values against the float64 sum of what each tensor rank gave."""
    import torch

    group, hidden = exchange.group, exchange.buffers.hidden
    if exchange.sizes.tensor_ranks == 1:
        return 0.0
    project(merged, group.place.tensor_index, hidden)
    every = torch.empty(
        (group.tensor_size, *hidden.shape), dtype=torch.float32, device=hidden.device
    )
    group.gather_tensor(every, hidden.float())
    want = every.double().sum(0)
    got = exchange.reduce().double()
    return float((got - want).norm() / want.norm())


def merged_columns(gate: MergedGate) -> dict[str, Any]:
    """Columns of the merged gate; ``status=invalid`` when it failed."""
    row: dict[str, Any] = {"merged_gate_error": gate.relative_rms}
    if gate.passed:
        return row
    return row | {
        "status": "invalid",
        "error": f"gate of merged ranks: relative RMS {gate.relative_rms:.3g} (allowed "
        f"{MAX_RELATIVE_RMS}), LSE {gate.lse_error:.3g}, sum {gate.reduced_error:.3g}"
        + ("" if gate.distinct else ", and two ranks hold the same tokens"),
    }


@dataclass(frozen=True)
class StepGate:
    """What a timed step left of its last layer.

    ``merge_rms`` and ``merge_lse`` are the merged output's errors against the partials that the
    ranks hold, merged in float64; ``summed`` is whether the tensor ranks' sum reached this one.
    ``moved_bytes`` were given to collectives in one step, of ``expected_bytes``.
    """

    merge_rms: float
    merge_lse: float
    summed: bool
    moved_bytes: int
    expected_bytes: int

    @property
    def passed(self) -> bool:
        """Whether what was timed is a whole step; NaN never passes."""
        return (
            self.merge_rms < MAX_MERGE_ERROR
            and self.merge_lse < MAX_LSE_ERROR
            and self.summed
            and self.moved_bytes == self.expected_bytes
        )


def check_step(
    exchange: Exchange, out: torch.Tensor, lse: torch.Tensor, moved_bytes: int
) -> StepGate:
    """Look at what a step left that began after :meth:`~harness.ranks_exchange.Exchange.forget`.

    Every rank must call it. Of a batch the last sequence is looked at, as in the other gates: the
    check takes memory of its own.

    Parameters
    ----------
    out, lse : torch.Tensor
        This rank's partials of the last layer, ``[S, q_heads, D]`` and ``[S, q_heads]``.
    moved_bytes : int
        That the group counted in one step.
    """
    sizes, rms, off = exchange.sizes, 0.0 if out.isfinite().all() else math.nan, 0.0
    if sizes.context_ranks > 1:
        outs, lses = (_gathered(exchange.group, x[-1:].contiguous()) for x in (out, lse))
        want, want_lse = _merged(outs.double(), lses.double())
        found, found_lse = exchange.buffers.merged[-1:], exchange.buffers.merged_lse[-1:]
        rms = float((found.double() - want).norm() / want.norm())
        off = float((found_lse.double() - want_lse).abs().max())
    summed = sizes.tensor_ranks == 1 or _is_sum(exchange)
    return StepGate(rms, off, summed, moved_bytes, sizes.step_bytes)


def _gathered(group: Collectives, own: torch.Tensor) -> torch.Tensor:
    every = own.new_empty((group.context_size, *own.shape))
    group.gather(every, own)
    return every


def _is_sum(exchange: Exchange) -> bool:
    """Whether all tensor ranks hold one number, of at least their own numbers together.

    Each layer sums what the one before left, so that it grows with them, to infinity in the end.
    """
    import torch

    group, hidden = exchange.group, exchange.buffers.hidden[-1:]
    every = torch.empty((group.tensor_size, *hidden.shape), device=hidden.device)
    group.gather_tensor(every, hidden.float())
    least = group.tensor_size * (group.tensor_size + 1) / 2
    whole = every >= least * (1 - MAX_REDUCED_ERROR)
    return bool((whole & (every == every[0])).all())


def step_columns(gate: StepGate) -> dict[str, Any]:
    """What the group counted; ``status=invalid`` when the step was not whole."""
    row: dict[str, Any] = {"collective_bytes": gate.moved_bytes}
    if gate.passed:
        return row
    return row | {
        "status": "invalid",
        "error": f"gate of the timed step: merged relative RMS {gate.merge_rms:.3g} (allowed "
        f"{MAX_MERGE_ERROR}), LSE {gate.merge_lse:.3g}, {gate.moved_bytes} bytes moved of "
        f"{gate.expected_bytes}" + ("" if gate.summed else ", and the sum did not arrive"),
    }
