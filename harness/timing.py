"""Throughput of attention alone: every layer's decode or prefill kernels and merges of one rank."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from harness.gate import query_dtype
from harness.offload import WeightReader, read_around
from harness.settings import Settings
from harness.workspace import Workspace
from strategies.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from kernels.view import View

CUDA_BUDGET_SECONDS, CUDA_MIN_SAMPLES = 3.0, 3
HOST_BUDGET_SECONDS, HOST_MIN_SAMPLES = 1.0, 2


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
    relative_residual: float


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
    """

    def __init__(
        self,
        settings: Settings,
        strategy: Strategy,
        workspace: Workspace,
        reader: WeightReader | None = None,
    ) -> None:
        self.settings, self.strategy, self.workspace = settings, strategy, workspace
        self.reader = reader
        self.on_cuda = not settings.on_host

    def decode_work(self, sequences: list[int]) -> list[tuple[Any, ...]]:
        """View, queries, plan, output and LSE of every layer group's decode step."""
        from kernels import ops

        work = []
        for view in self.strategy.batch(sequences):
            q, out, lse = self._decode_buffers(view)
            plan = ops.plan_decode(view, self.settings.hardware.sm_count, self._scratch("decode"))
            work.append((view, q, plan, out, lse))
        return work

    def decode(self, sequences: list[int]) -> Samples:
        """One query token for each sequence, through every layer."""
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

        if not self.on_cuda or (self.reader is not None and not self.reader.graph_safe):
            return self._sample(step)
        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return self._sample(graph.replay)

    def _weight_layers(self, index: int, layers: int) -> range:
        """Layers of weights beside one layer of attention, of which the scale model has fewer."""
        count = self.settings.model.layers
        return range(index * count // layers, (index + 1) * count // layers)

    def prefill(self, sequence: int, history: int, chunk: int) -> Samples:
        """The chunk of queries that follows ``history`` tokens, through every layer."""
        from kernels import ops

        work = []
        for view in self.strategy.batch([sequence]):
            q, out, lse = self._prefill_buffers(view, chunk)
            plan = ops.plan_prefill(
                view, 0, history, chunk, self.settings.hardware.sm_count, self._scratch("prefill")
            )
            work.append((view, q, plan, out, lse))

        def step() -> None:
            for view, q, plan, out, lse in work:
                for layer in range(view.geometry.layers):
                    ops.prefill(view, layer, q, plan, out, lse)

        return self._sample(step)

    def prefill_model(self, sequence: int, tokens: int, chunk: int) -> PrefillModel:
        """Chunk times at several histories, fitted, and their sum over a prompt of ``tokens``."""
        count = self.settings.trial.prefill_histories
        top = tokens - chunk
        histories = tuple(sorted({round(top * i / (count - 1)) for i in range(count)}))
        ms = tuple(self.prefill(sequence, h, chunk).median_ms for h in histories)
        a, b = fit_line(histories, ms)
        # Under context parallelism a rank sees every query, and its share of the history.
        ranks = self.settings.parallel.context_ranks
        chunks = -(-tokens * ranks // chunk)
        total = sum(a + b * i * chunk / ranks for i in range(chunks)) / 1e3
        residual = max(abs(a + b * h - t) / t for h, t in zip(histories, ms, strict=True))
        return PrefillModel(histories, ms, total, residual)

    def _scratch(self, kind: str) -> torch.Tensor | None:
        return self.workspace.buffers[f"{kind}_partials"].u8 if self.on_cuda else None

    def _queries(self, shape: tuple[int, ...], view: View) -> torch.Tensor:
        import torch

        generator = torch.Generator().manual_seed(self.settings.seed)
        dtype = query_dtype(view.geometry.kv_dtype)
        return torch.randn(shape, generator=generator).to(dtype)

    def _decode_buffers(self, view: View) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        g = view.geometry
        shape = (view.sequences, g.q_heads, g.head_dim)
        values = self._queries(shape, view)
        if not self.on_cuda:
            return values, torch.empty(shape), torch.empty(shape[:2])
        flat = self.workspace.buffers["decode_outputs"].u8
        n = view.sequences * g.q_heads
        out = flat[: n * g.head_dim * 4].view(torch.float32).view(shape)
        rest = flat[n * g.head_dim * 4 :]
        lse = rest[: n * 4].view(torch.float32).view(shape[:2])
        q = rest[n * 4 :][: n * g.head_dim * g.itemsize].view(values.dtype).view(shape)
        q.copy_(values)
        return q, out, lse

    def _prefill_buffers(
        self, view: View, chunk: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        import torch

        g = view.geometry
        shape = (chunk, g.q_heads, g.head_dim)
        values = self._queries(shape, view)
        if not self.on_cuda:
            return values, torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape[:2])
        q = self.workspace.tensor("prefill_queries", shape, values.dtype)
        q.copy_(values)
        flat = self.workspace.buffers["prefill_outputs"].u8
        n = chunk * g.q_heads
        out = flat[: n * g.head_dim * 2].view(torch.bfloat16).view(shape)
        lse = flat[n * g.head_dim * 2 :][: n * 4].view(torch.float32).view(shape[:2])
        return q, out, lse

    def once_ms(self, step: Callable[[], None]) -> float:
        """Milliseconds of one step."""
        return self._cuda_ms(step) if self.on_cuda else _host_ms(step)

    def _sample(self, step: Callable[[], None]) -> Samples:
        one = self.once_ms
        budget, least = (
            (CUDA_BUDGET_SECONDS, CUDA_MIN_SAMPLES)
            if self.on_cuda
            else (HOST_BUDGET_SECONDS, HOST_MIN_SAMPLES)
        )
        warmup = one(step)
        ms: list[float] = []
        began = time.perf_counter()
        while len(ms) < self.settings.trial.max_samples:
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
