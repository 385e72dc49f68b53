"""Throughput of attention alone: every layer's decode or prefill kernels and merges of one rank."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.buffers import StepBuffers
from harness.offload import WeightReader, read_around
from harness.settings import Settings
from harness.workspace import Workspace
from strategies.errors import OutOfMemory, Refused
from strategies.strategy import Strategy

CUDA_BUDGET_SECONDS, CUDA_MIN_SAMPLES = 3.0, 3
HOST_BUDGET_SECONDS, HOST_MIN_SAMPLES = 1.0, 2
GROWING_SAMPLES = 8


@dataclass(frozen=True)
class Samples:
    """Raw timings of one step, in milliseconds; the warm-up is not among them."""

    ms: tuple[float, ...]
    warmup_ms: float

    @property
    def median_ms(self) -> float:
        """Median."""
        return statistics.median(self.ms)

    @property
    def iqr_ms(self) -> float:
        """Interquartile range."""
        if len(self.ms) < 2:
            return 0.0
        quarters = statistics.quantiles(self.ms, n=4, method="inclusive")
        return quarters[2] - quarters[0]


@dataclass(frozen=True)
class PrefillModel:
    """Chunk time against history, fitted as a + b h: a whole prompt's prefill is *modelled*."""

    histories: tuple[int, ...]
    chunk_ms: tuple[float, ...]
    total_seconds: float
    relative_residual: float  # root mean square of what the fit misses, over that of the times


def prefill_flops(q_heads: int, head_dim: int, history: int, chunk: int, first: int = 0) -> float:
    """Useful FLOPs of one layer: 4 D a (query, visible key) pair, causal inside the chunk."""
    pairs = chunk * (history - first) + chunk * (chunk + 1) / 2
    return 4.0 * q_heads * head_dim * pairs


class Stopwatch:
    """Times decode steps and prefill chunks of one trial's strategy, over all groups and layers.

    Parameters
    ----------
    reader : WeightReader, optional
        Reads each layer's weights in a decode step, beside its attention.
    on_driver : callable
        Given the name of what the driver has just taken memory for, once it has run.
    """

    def __init__(
        self,
        settings: Settings,
        strategy: Strategy,
        workspace: Workspace,
        reader: WeightReader | None = None,
        on_driver: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.settings, self.strategy = settings, strategy
        self.buffers = StepBuffers(settings, workspace)
        self.reader, self.on_driver = reader, on_driver
        self.on_cuda = self.buffers.on_cuda

    def decode_work(self, sequences: list[int]) -> list[tuple[Any, ...]]:
        """View, queries, plan, output and LSE of every layer group's decode step."""
        from kernels import ops

        work = []
        for view in self.strategy.batch(sequences):
            queries = self.buffers.random_queries(view, view.sequences, self.settings.seed)
            q, out, lse = self.buffers.decode(view, queries)
            sms = self.settings.hardware.sm_count
            # Between two steps nothing older than the newest token is written.
            plan = ops.plan_decode(view, sms, self.buffers.decode_scratch(), unsettled_tokens=1)
            work.append((view, q, plan, out, lse))
        return work

    def decode(self, sequences: list[int]) -> Samples:
        """One query token for each sequence, through every layer."""
        return self._sample(self.decode_step(sequences))

    def decode_step(self, sequences: list[int]) -> Callable[[], None]:
        """What launches such a step: on CUDA a graph, where the weights' reader allows one."""
        import torch

        from kernels import ops

        work = self.decode_work(sequences)
        layers = sum(view.geometry.layers for view, *_ in work)
        weights = [self._weight_layers(i, layers) for i in range(layers)]

        def step() -> None:
            mine = iter(weights)
            for view, q, plan, out, lse in work:
                for layer in range(view.geometry.layers):
                    with read_around(self.reader, next(mine)):
                        ops.decode(view, layer, q, plan, out, lse)

        if not self.on_cuda:
            return step
        step()
        torch.cuda.synchronize()
        if self.reader is not None and not self.reader.graph_safe:
            self.on_driver("copy_stream")  # taken when both streams first wait for each other
            return step
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        graph.replay()  # the driver takes a graph's memory at its first launch
        torch.cuda.synchronize()
        self.on_driver("cuda_graph")
        replay: Callable[[], None] = graph.replay
        return replay

    def decode_while_growing(self, sequences: list[int], tokens: int) -> Samples | None:
        """Decode steps while the last sequence grows by ``tokens``; None when it has no room to.

        Each lasts, on the host's clock, from the launch of the step until it and the growth are
        through. Nothing is written: the steps read what was there before. On the host sampling
        ends as that of a step alone does.
        """
        step, grown = self.decode_step(sequences), sequences[-1]
        ms: list[float] = []
        began = time.perf_counter()

        def enough() -> bool:
            spent = not self.on_cuda and time.perf_counter() - began > HOST_BUDGET_SECONDS
            return len(ms) > GROWING_SAMPLES or (spent and len(ms) > CUDA_MIN_SAMPLES)

        def once() -> None:
            step()
            self.strategy.extend(grown, tokens)
            if self.on_cuda:
                import torch

                torch.cuda.synchronize()

        try:
            while not enough():
                ms.append(_host_ms(once))
        except (OutOfMemory, Refused):
            if len(ms) <= CUDA_MIN_SAMPLES:
                return None
        return Samples(tuple(ms[1:]), ms[0])

    def _weight_layers(self, index: int, layers: int) -> range:
        """Layers of weights beside one layer of attention, of which the scale model has fewer."""
        count = self.settings.model.layers
        return range(index * count // layers, (index + 1) * count // layers)

    def prefill(
        self, sequence: int, history: int, chunk: int, most: int | None = None, warm: bool = False
    ) -> Samples:
        """The chunk of queries that follows ``history`` tokens, through every layer."""
        from kernels import ops

        work = []
        for group, view in enumerate(self.strategy.batch([sequence])):
            queries = self.buffers.random_queries(view, chunk, self.settings.seed)
            q, out, lse = self.buffers.prefill(view, queries)
            sms = self.settings.hardware.sm_count
            scratch = self.buffers.prefill_scratch(group)
            plan = ops.plan_prefill(view, 0, history, chunk, sms, scratch)
            work.append((view, q, plan, out, lse))

        def step() -> None:
            for view, q, plan, out, lse in work:
                for layer in range(view.geometry.layers):
                    ops.prefill(view, layer, q, plan, out, lse)

        return self._sample(step, most, warm)

    def prefill_model(self, sequence: int, tokens: int, chunk: int, top_ms: float) -> PrefillModel:
        """Chunk times at several histories, fitted, and their sum over a prompt of ``tokens``.

        Parameters
        ----------
        top_ms : float
            The chunk's time after the longest history, which was measured already.
        """
        count = self.settings.trial.prefill_histories
        top = tokens - chunk
        histories = tuple(sorted({round(top * i / (count - 1)) for i in range(count)}))
        # The kernels are loaded, and the shortest history, which comes first, warms up the rest.
        below = tuple(
            self.prefill(sequence, h, chunk, CUDA_MIN_SAMPLES, warm=h > 0).median_ms
            for h in histories[:-1]
        )
        ms = (*below, top_ms)
        a, b = fit_line(histories, ms)
        # Under context parallelism a rank sees every query, and its share of the history.
        ranks = self.settings.parallel.context_ranks
        chunks = -(-tokens * ranks // chunk)
        total = sum(a + b * i * chunk / ranks for i in range(chunks)) / 1e3
        off = [a + b * h - t for h, t in zip(histories, ms, strict=True)]
        residual = math.sqrt(sum(x * x for x in off) / sum(t * t for t in ms))
        return PrefillModel(histories, ms, total, residual)

    def once_ms(self, step: Callable[[], None]) -> float:
        """Milliseconds of one step."""
        return self._cuda_ms(step) if self.on_cuda else _host_ms(step)

    def _sample(
        self, step: Callable[[], None], most: int | None = None, warm: bool = False
    ) -> Samples:
        one = self.once_ms
        budget, least = (
            (CUDA_BUDGET_SECONDS, CUDA_MIN_SAMPLES)
            if self.on_cuda
            else (HOST_BUDGET_SECONDS, HOST_MIN_SAMPLES)
        )
        warmup = 0.0 if warm else one(step)
        ms: list[float] = []
        began = time.perf_counter()
        while len(ms) < (most or self.settings.trial.max_samples):
            if len(ms) >= least and time.perf_counter() - began > budget:
                break
            ms.append(one(step))
        return Samples(tuple(ms), warmup)

    @staticmethod
    def _cuda_ms(step: Callable[[], None]) -> float:
        import torch

        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))


def _host_ms(step: Callable[[], None]) -> float:
    began = time.perf_counter()
    step()
    return (time.perf_counter() - began) * 1e3


def fit_line(x: tuple[int, ...], y: tuple[float, ...]) -> tuple[float, float]:
    """Least squares a + b x."""
    if len(x) < 2:
        return y[0], 0.0
    fit = statistics.linear_regression(x, y)
    return fit.intercept, fit.slope
