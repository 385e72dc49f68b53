"""Trials of many sequences: a trace or churn, run against a strategy, becomes a row's columns.

Tokens are accounted and pages touched once; nothing is written through the kernels or timed. The
byte columns of these rows are means: over the steps of a trace in which a request waited for
memory (``admission_limited_share`` of them all), over the operations of churn.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from harness.batching import Batch
from harness.cell import Cell
from harness.churn import Churn
from harness.fill import uncounted_bytes
from harness.ledger import Ledger
from harness.lengths import mixed_lengths
from harness.planner_engines import ENGINES
from harness.rows import Row
from harness.shares import Means, Parts
from harness.trace_file import Request, read_trace
from strategies.device import Device
from strategies.strategy import Strategy

MS_PER_HOUR = 3.6e6

Note = Callable[[str, dict[str, Any]], None]


def account(cell: Cell, strategy: Strategy, device: Device, ledger: Ledger, note: Note) -> Row:
    """Run the cell's trace or churn to its end; returns the columns of its row.

    Raises
    ------
    RuntimeError
        Tokens are left when every sequence is closed: a leak.
    """
    began = time.perf_counter()
    recorder = _Recorder(strategy, ledger, note)
    made = _trace if cell.settings.workload["kind"] == "trace" else _churn
    row = made(cell, strategy, device, recorder)
    row["fill_seconds"] = round(time.perf_counter() - began, 4)
    held = strategy.footprint()
    if held.live_bytes:
        raise RuntimeError(f"{held.live_bytes} bytes are live with no sequence open: a leak")
    row["kv_end_committed_bytes"] = held.committed_bytes
    peak = recorder.peak_tokens
    row |= {"resident_tokens": peak, "resident_tokens_all_ranks": peak}
    return {"status": "ok", "resident_limited_by": "target"} | row


class _Recorder:
    """Tells the ledger and the samples how a workload stands."""

    def __init__(self, strategy: Strategy, ledger: Ledger, note: Note) -> None:
        self.strategy, self.ledger, self._note = strategy, ledger, note
        self.peak_tokens = 0

    def record(self, what: str, at: int, work: Batch | Churn, **more: int) -> None:
        """One ledger event and one sample."""
        self.strategy.settle()
        self.ledger.resident_tokens = work.resident_tokens
        self.peak_tokens = max(self.peak_tokens, work.resident_tokens)
        self.ledger.event("fill", "kv_pages", uncounted_bytes(self.strategy, self.ledger))
        parts = work.parts
        sample: dict[str, Any] = {"at": at, "committed_bytes": round(parts.committed)}
        sample |= {f"{n}_bytes": round(getattr(parts, n)) for n in ("live", "reserved", "internal")}
        self._note(what, sample | more)


def arrival_steps(
    requests: Sequence[Request], rate: str | float, step_ms: float, seed: int
) -> list[int]:
    """The step of the virtual clock at which each request arrives.

    Parameters
    ----------
    rate : str or float
        ``max``: all at the first step, so that one always waits; ``recorded``: as in the file; a
        number: so many a second on average, at random (a Poisson process).
    step_ms : float
        How long a step is taken to last.
    """
    if rate == "max":
        return [0] * len(requests)
    if rate == "recorded":
        seconds = [r.arrival_seconds for r in requests]
    else:
        chance, at, seconds = random.Random(f"arrivals/{seed}"), 0.0, []
        for _ in requests:
            at += chance.expovariate(float(rate))
            seconds.append(at)
    return [math.ceil(s * 1e3 / step_ms) for s in seconds]


def _trace(cell: Cell, strategy: Strategy, device: Device, recorder: _Recorder) -> Row:
    del device
    settings, keys = cell.settings, cell.settings.workload
    trace = read_trace(keys["path"] or None, keys["requests"])
    if trace.digest != keys["trace_digest"]:
        raise RuntimeError("workload.path: the file has changed since the command began")
    arrivals = arrival_steps(trace.requests, keys["rate"], keys["step_ms"], settings.seed)

    def observe(batch: Batch) -> None:
        waiting, running = len(batch.waiting), len(batch.running)
        recorder.record("trace", batch.step, batch, running=running, waiting=waiting)

    batch = Batch(
        strategy,
        settings.kv_model().token_bytes,
        trace.requests,
        arrivals,
        cell.local_context_tokens,
        observe,
    )
    batch.run()
    observe(batch)
    counts, whole = batch.counts, max(1, batch.whole.steps)
    return (
        _clock(cell, batch.step)
        | _means(cell, batch.means)
        | batch.growth.columns()
        | {
            "sequences_admitted": round(batch.mean_running, 3),
            "peak_sequences": counts.peak_running,
            "sequences_refused": counts.refused,
            "sequences_preempted": counts.preempted,
            "trace_file": keys["trace_file"],
            "trace_requests": counts.finished,
            "trace_input_tokens": counts.input_tokens,
            "trace_output_tokens": counts.output_tokens,
            "prefix_hashes": trace.prefix_hashes,
            "prefix_hashes_repeated": trace.prefix_hashes_repeated,
            "workload_steps": batch.step,
            "admission_limited_share": batch.limited.steps / whole,
        }
    )


def _churn(cell: Cell, strategy: Strategy, device: Device, recorder: _Recorder) -> Row:
    settings, keys = cell.settings, cell.settings.workload
    longest = min(keys["max_tokens"], cell.local_context_tokens)
    shortest = min(keys["min_tokens"], longest)
    lengths = mixed_lengths(settings.seed, keys["operations"], shortest, longest)
    committed = strategy.footprint().committed_bytes
    # A pool that is there at start-up is all that there will be.
    capacity = committed or device.free_bytes()

    def observe(churn: Churn) -> None:
        sample = {"open": len(churn.totals), "longest_tokens": churn.longest_tokens()}
        recorder.record("churn", churn.operation, churn, **sample)

    churn = Churn(
        strategy,
        settings.kv_model().token_bytes,
        capacity,
        lengths,
        cell.local_context_tokens,
        settings.seed,
        observe,
    )
    churn.run()
    seen = churn.admissible
    row = _means(cell, churn.means) | churn.growth.columns() | _clock(cell, churn.decode_steps)
    row |= {
        "sequences_admitted": round(churn.mean_open, 3),
        "peak_sequences": churn.peak_open,
        "sequences_refused": churn.refused,
        "sequences_preempted": churn.cut_short,
        "refused_while_free": churn.refused_while_free,
        "workload_steps": churn.operation,
    }
    if seen.of_free:
        row["largest_admissible_tokens"] = round(
            sum(seen.longest_tokens) / len(seen.longest_tokens)
        )
        row["admissible_of_free"] = sum(seen.of_free) / len(seen.of_free)
        row["admissible_of_free_min"] = min(seen.of_free)
    return row


def _clock(cell: Cell, steps: float) -> Row:
    """How long so many decode steps stand for, and the step time that is assumed."""
    step_ms = cell.settings.workload["step_ms"]
    return {"step_ms": step_ms, "simulated_hours": steps * step_ms / MS_PER_HOUR}


def _means(cell: Cell, means: Means) -> Row:
    """Mean bytes and their shares; no shares where an engine's windows are not followed."""
    parts: Parts | None = means.parts()
    if parts is None:
        return {}
    row: Row = {
        "kv_live_bytes": round(parts.live),
        "kv_committed_bytes": round(parts.committed),
    }
    if cell.settings.strategy in ENGINES and cell.settings.model.local_layers:
        return row
    return row | parts.columns()
