"""One decode step of several ranks, timed: it counts only if it left what it should have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from harness.ranks_buffers import make_buffers
from harness.ranks_control import Team
from harness.ranks_exchange import Exchange
from harness.ranks_gate import StepGate, check_step, step_columns
from harness.ranks_group import Collectives, sizes_of
from harness.timing import Samples, Stopwatch

if TYPE_CHECKING:
    import torch

    from kernels.view import View

BUDGET_MS, MIN_SAMPLES = 3000.0, 3


@dataclass(frozen=True)
class TimedStep:
    """Samples of a step, and the gate that it passed or did not."""

    samples: Samples
    gate: StepGate


class Work(NamedTuple):
    """One layer group's part of a step."""

    view: View
    q: torch.Tensor
    plan: Any
    out: torch.Tensor
    lse: torch.Tensor
    exchange: Exchange


def time_step(
    watch: Stopwatch, team: Team, group: Collectives, sequences: list[int]
) -> tuple[TimedStep, TimedStep]:
    """A whole decode step, and its collectives alone, every rank in step with the others.

    Returns
    -------
    step, collectives : TimedStep
        Milliseconds; every rank takes the same number of samples, since each takes all of them.
    """
    sizes = sizes_of(watch.settings)
    flat = watch.buffers.workspace.buffers["collective_buffers"].u8 if watch.on_cuda else None
    work = []
    for view, q, plan, out, lse in watch.decode_work(sequences):
        buffers = make_buffers(view, sizes, group.context_size, flat)
        work.append(Work(view, q, plan, out, lse, Exchange(group, sizes, buffers)))
    last = work[-1]  # on a GPU all groups' outputs land where its do

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

    def forget_all() -> None:
        last.exchange.forget()
        last.out.fill_(math.nan)
        last.lse.fill_(math.nan)

    def timed(run: Callable[[], None], forget: Callable[[], None]) -> TimedStep:
        samples, moved = _sampled(watch, team, group, run, forget)
        return TimedStep(samples, check_step(last.exchange, last.out, last.lse, moved))

    return timed(step, forget_all), timed(collectives, last.exchange.forget)


def _sampled(
    watch: Stopwatch,
    team: Team,
    group: Collectives,
    step: Callable[[], None],
    forget: Callable[[], None],
) -> tuple[Samples, int]:
    """Samples that each begin after ``forget``, and the bytes that one step gave to collectives."""
    run, captured = _captured(watch, group, step) if watch.on_cuda else (step, 0)

    def once_ms() -> float:
        forget()
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
    before = group.moved_bytes
    samples = Samples(tuple(once_ms() for _ in range(count)), warmup)
    return samples, captured or (group.moved_bytes - before) // count


def _captured(
    watch: Stopwatch, group: Collectives, step: Callable[[], None]
) -> tuple[Callable[[], None], int]:
    """The step as a CUDA graph, NCCL's collectives with the kernels; the bytes that they move.

    Torch's watchdog thread queries events of earlier collectives: only this thread's own calls may
    spoil the capture.
    """
    import torch

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        before = group.moved_bytes
        step()
        moved = group.moved_bytes - before
    graph.replay()  # the driver takes a graph's memory at its first launch
    torch.cuda.synchronize()
    watch.on_driver("cuda_graph")
    return graph.replay, moved


def time_columns(step: TimedStep, collectives: TimedStep) -> dict[str, Any]:
    """Columns of a timed step; ``status=invalid`` when it, or its collectives, were not whole."""
    times: dict[str, Any] = {}
    for name, timed in (("parallel_decode_step", step), ("collective", collectives)):
        times[f"{name}_ms"] = timed.samples.median_ms
        times[f"{name}_ms_iqr"] = timed.samples.iqr_ms
    times["parallel_decode_samples"] = len(step.samples.ms)
    times["collective_samples"] = len(collectives.samples.ms)
    worse = step if not step.gate.passed else collectives
    return times | step_columns(worse.gate)
