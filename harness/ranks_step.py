"""One decode step of several ranks: its collectives, checked against float64, then timed.

After each layer's attention the context ranks' partial outputs are gathered and merged by their
LSE (:func:`kernels.merge.merge`, the same as for splits), and the tensor ranks' outputs, projected
to ``[sequences, hidden]``, are summed. No weights are multiplied here: a fixed selection stands in
for the output projection where values are checked, and nothing where time is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.buffers import query_dtype
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS, Gate
from harness.ranks_buffers import Buffers, make_buffers
from harness.ranks_control import Team
from harness.ranks_group import Collectives, Sizes, sizes_of
from harness.timing import Samples, Stopwatch
from strategies.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from harness.synthetic import Content
    from kernels.view import View

BUDGET_MS, MIN_SAMPLES = 3000.0, 3
QUERY_SEEDS = 1 << 40
MAX_REDUCED_ERROR = 1e-2  # a sum of bf16 values, rounded to bf16 at each rank


class Exchange:
    """The collectives that follow one layer's attention."""

    def __init__(self, group: Collectives, sizes: Sizes, buffers: Buffers) -> None:
        self.group, self.sizes, self.buffers = group, sizes, buffers

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole sequence's output and LSE, from every context rank's partial ones."""
        from kernels import ops

        if self.sizes.context_ranks == 1:
            return out, lse
        b = self.buffers
        self.group.gather(b.gathered, out)
        self.group.gather(b.gathered_lse, lse)
        return ops.merge(b.gathered, b.gathered_lse, b.merged, b.merged_lse)

    def reduce(self) -> torch.Tensor:
        """Sum ``buffers.hidden`` over the tensor ranks."""
        self.group.reduce(self.buffers.hidden)
        return self.buffers.hidden

    def __call__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Everything, as a timed step does it."""
        self.merge(out, lse)
        if self.sizes.tensor_ranks > 1:
            self.reduce()


def project(out: torch.Tensor, tensor_index: int, hidden: torch.Tensor) -> None:
    """Put a rank's heads ``[S, q_heads, D]`` where they belong in ``hidden [S, H]``, zeros around.

    Stands in for the row-parallel output projection: feature j of all ranks' concatenated heads is
    added to hidden feature ``j mod H``.
    """
    flat = out.flatten(1)
    width, at = hidden.shape[1], tensor_index * flat.shape[1]
    hidden.zero_()
    done = 0
    while done < flat.shape[1]:
        lo = (at + done) % width
        count = min(flat.shape[1] - done, width - lo)
        hidden[:, lo : lo + count] += flat[:, done : done + count].to(hidden.dtype)
        done += count


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
    outs = out.new_empty((group.context_size, *out.shape))
    lses = lse.new_empty((group.context_size, *lse.shape))
    group.gather(outs, out.contiguous())
    group.gather(lses, lse.contiguous())
    return outs, lses, mine


def _merged(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Partials ``[ranks, R, D]`` and their base-2 LSE as one attention's, float64."""
    import torch

    top = lses.amax(0)
    weights = torch.exp2(lses - top)
    total = weights.sum(0)
    return (outs * weights[..., None]).sum(0) / total[:, None], top + torch.log2(total)


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


def time_step(
    watch: Stopwatch, team: Team, group: Collectives, sequences: list[int]
) -> tuple[Samples, Samples]:
    """A whole decode step, and its collectives alone, every rank in step with the others.

    Returns
    -------
    step, collectives : Samples
        Milliseconds; every rank takes the same number of samples, since each takes all of them.
    """
    sizes = sizes_of(watch.settings)
    flat = watch.buffers.workspace.buffers["collective_buffers"].u8 if watch.on_cuda else None
    work = []
    for view, q, plan, out, lse in watch.decode_work(sequences):
        buffers = make_buffers(view, sizes, group.context_size, flat)
        work.append((view, q, plan, out, lse, Exchange(group, sizes, buffers)))

    def collectives() -> None:
        for view, _, _, out, lse, exchange in work:
            for _ in range(view.geometry.layers):
                exchange(out, lse)

    def step() -> None:
        from kernels import ops

        for view, q, plan, out, lse, exchange in work:
            for layer in range(view.geometry.layers):
                ops.decode(view, layer, q, plan, out, lse)
                exchange(out, lse)

    return _sampled(watch, team, step), _sampled(watch, team, collectives)


def _sampled(watch: Stopwatch, team: Team, step: Callable[[], None]) -> Samples:
    run = _captured(watch, step) if watch.on_cuda else step

    def once_ms() -> float:
        if not watch.on_cuda:  # the collectives count themselves
            return watch.once_ms(run)
        team.counters.enter("replay of a decode step")
        taken = watch.once_ms(run)
        team.counters.leave()
        return taken

    team.join("warm-up")
    warmup = once_ms()
    one = once_ms()
    limit = watch.settings.trial.max_samples
    wanted = max(MIN_SAMPLES, min(limit, int(BUDGET_MS / max(one, 1e-3))))
    count = min(team.join("samples", wanted))
    return Samples(tuple(once_ms() for _ in range(count)), warmup)


def _captured(watch: Stopwatch, step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph; NCCL's collectives are captured with the kernels.

    Torch's watchdog thread queries events of earlier collectives: only this thread's own calls may
    spoil the capture.
    """
    import torch

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    graph.replay()  # the driver takes a graph's memory at its first launch
    torch.cuda.synchronize()
    watch.on_driver("cuda_graph")
    replay: Callable[[], None] = graph.replay
    return replay


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


def step_columns(step: Samples, collectives: Samples, sizes: Sizes) -> dict[str, Any]:
    """Columns of the timed step."""
    return {
        "parallel_decode_step_ms": step.median_ms,
        "parallel_decode_step_ms_iqr": step.iqr_ms,
        "parallel_decode_samples": len(step.ms),
        "collective_ms": collectives.median_ms,
        "collective_ms_iqr": collectives.iqr_ms,
        "collective_samples": len(collectives.ms),
        "collective_bytes": sizes.step_bytes,
    }
