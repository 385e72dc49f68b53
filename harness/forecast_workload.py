"""What formulas say of a trace or of churn in ``paged``, whose pool follows the requests.

Start-up is foreseen as always. Beyond it memory ends where it is full; whether the requests are
enough to fill it is told by their lengths alone, and only then is there a prediction.
"""

from __future__ import annotations

from dataclasses import dataclass

from harness.cell import Cell
from harness.lengths import mixed_lengths
from harness.planner_spec import PlanSpec, Prediction
from harness.sizes import BadValue
from harness.trace_file import read_trace
from strategies import sizing


@dataclass(frozen=True)
class Foreseen:
    """Bytes of a row that formulas know, and what they do not know in words; ``None``: unknown.

    ``kv_bytes`` is what ``kv_committed_bytes`` is to be: the mean over the steps in which a request
    of a trace waits for memory. ``peak_bytes`` is held when every chunk that fits is mapped.
    """

    kv_bytes: int | None = None
    peak_bytes: int | None = None
    unknown: str = ""


def foresee(cell: Cell, spec: PlanSpec, ready: Prediction) -> Foreseen:
    """What a trace or churn commits behind a start that went as in ``ready``."""
    at_ready = ready.predicted_peak_bytes - ready.predicted_kv_bytes
    full = full_bytes(spec, ready.free_bytes + ready.predicted_kv_bytes)
    if cell.settings.workload["kind"] == "churn":
        if _churn_bytes(cell, spec) < full:
            return Foreseen(unknown="kv and peak not foreseen: memory may not be filled")
        mean = "kv not foreseen: a mean over the operations"
        return Foreseen(peak_bytes=at_ready + full, unknown=mean)
    if cell.settings.workload["rate"] != "max":
        return Foreseen(unknown="kv and peak not foreseen: they follow the arrivals")
    if _trace_bytes(cell, spec) < full:
        return Foreseen(unknown="kv and peak not foreseen: memory may not be filled")
    return Foreseen(full, at_ready + full)


def full_bytes(spec: PlanSpec, free_bytes: int) -> int:
    """Bytes of all chunks that ``paged`` can map beside what is held at ``ready``."""
    assert spec.model is not None
    groups, context = spec.model.groups, (spec.context_tokens, spec.sequences)
    reserved = [sizing.paged_reserve_chunks(g, *context, spec.capacity_bytes) for g in groups]
    most = sum(n * g.chunk_bytes for n, g in zip(reserved, groups, strict=True))
    unit = min(g.chunk_bytes for g in groups)
    return min(most, free_bytes // unit * unit)


def _trace_bytes(cell: Cell, spec: PlanSpec) -> int:
    """Bytes of the prompts that could be admitted at once, were there memory for all of them."""
    keys = cell.settings.workload
    try:
        trace = read_trace(keys["path"] or None, keys["requests"])
    except BadValue:  # changed since the command began: its trial says so
        return 0
    served = [r for r in trace.requests if r.total_tokens <= spec.context_tokens]
    return sum(_bytes_of(spec, r.input_tokens) for r in served[: spec.sequences])


def _churn_bytes(cell: Cell, spec: PlanSpec) -> int:
    """Bytes that sequences open with while the first wave rises, at the least."""
    from harness.churn import FIRST_SHARE, WAVES

    keys = cell.settings.workload
    longest = min(keys["max_tokens"], spec.context_tokens)
    shortest = min(keys["min_tokens"], longest)
    lengths = mixed_lengths(cell.settings.seed, keys["operations"], shortest, longest)
    rising = lengths[: min(len(lengths) // (2 * WAVES), spec.sequences)]
    return sum(_bytes_of(spec, max(1, int(n * FIRST_SHARE))) for n in rising)


def _bytes_of(spec: PlanSpec, tokens: int) -> int:
    """Bytes of the pages of a sequence."""
    assert spec.model is not None
    return sum(
        g.pages(sizing.window_tokens(g, tokens)) * g.geometry.page_bytes for g in spec.model.groups
    )
