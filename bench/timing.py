"""How long a call takes: CUDA graphs, events, or the host's clock; medians with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

REST_CYCLES = 200_000_000  # about a tenth of a second without work, so that the card cools
L2_FLUSH_BYTES = 256 << 20
TURNS = 5  # in which variants are timed one after the other


@dataclass(frozen=True)
class Sample:
    """Times of one call, in microseconds."""

    median_us: float
    iqr_us: float
    count: int

    def per(self, calls: int) -> Sample:
        """The same for one of the ``calls`` that were timed together."""
        return Sample(self.median_us / calls, self.iqr_us / calls, self.count)


def summarise(times_us: list[float]) -> Sample:
    """Median, interquartile range and number of some times."""
    values = torch.tensor(times_us, dtype=torch.float64)
    low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    return Sample(float(middle), float(high - low), len(times_us))


def rest() -> None:
    """Let the card idle for a moment, so that a short timing starts from full clocks."""
    if torch.cuda.is_available():
        torch.cuda._sleep(REST_CYCLES)
        torch.cuda.synchronize()


def on_host(call: Callable[[], object], count: int = 3) -> Sample:
    """Wall-clock times, for a machine without a GPU."""
    times = []
    for _ in range(count):
        begin = time.perf_counter()
        call()
        times.append((time.perf_counter() - begin) * 1e6)
    return summarise(times)


def _replays(estimate_us: float, rep_ms: float) -> int:
    return min(max(10, round(rep_ms * 1e3 / max(estimate_us, 1))), 2000)


def _timed(call: Callable[[], object], count: int, flush: torch.Tensor | None) -> list[float]:
    """Times of ``count`` calls, in microseconds."""
    events = []
    for _ in range(count):
        if flush is not None:
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e3 for begin, end in events]


def _warm(call: Callable[[], object], rep_ms: float) -> int:
    """Warm up for a quarter of the time; returns how many calls fill it."""
    estimate = _elapsed(call, None) * 1e3
    for _ in range(min(max(1, round(rep_ms * 1e3 / 4 / max(estimate, 1))), 200)):
        call()
    return _replays(estimate, rep_ms)


def _elapsed(call: Callable[[], object], flush: torch.Tensor | None) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def by_events(call: Callable[[], object], rep_ms: float) -> Sample:
    """Times of single calls for about ``rep_ms`` ms, the L2 cache flushed before each."""
    if not torch.cuda.is_available():
        return on_host(call)
    flush = torch.empty(L2_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    return summarise(_timed(call, _warm(call, rep_ms), flush))


def by_graph(calls: list[Callable[[], object]], rep_ms: float) -> Sample:
    """Times of one of several calls that are captured in a CUDA graph and replayed together.

    The calls read different layers, so that together they exceed the L2 cache.
    """
    return by_graphs([calls], rep_ms)[0]


def by_graphs(variants: list[list[Callable[[], object]]], rep_ms: float) -> list[Sample]:
    """The same for several variants, which take turns: what drifts does so for all of them."""
    if not torch.cuda.is_available():
        return [on_host(lambda v=v: [call() for call in v]).per(len(v)) for v in variants]
    graphs = [_capture(calls) for calls in variants]
    counts = [-(-_warm(graph.replay, rep_ms) // TURNS) for graph in graphs]
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(TURNS):
        for graph, count, found in zip(graphs, counts, times, strict=True):
            graph.replay()
            found += _timed(graph.replay, count, None)
    return [summarise(t).per(len(calls)) for t, calls in zip(times, variants, strict=True)]


def _capture(calls: list[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph
