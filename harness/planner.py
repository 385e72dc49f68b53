"""Predicts a trial from formulas alone: allocations, how it ends, and the three OOM points.

No torch, no GPU. ``predict`` answers for one configuration; the OOM points vary its context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from harness.planner_engines import ENGINES, predict_engine
from harness.planner_pools import predict_pool_strategy
from harness.planner_spec import OomPoint, OomPoints, PlanSpec, Prediction

__all__ = [
    "OomPoint",
    "OomPoints",
    "PlanSpec",
    "Prediction",
    "largest_context_that_starts",
    "oom_points",
    "predict",
]

# Contexts between 1 and the end of a sweep at which start-up is looked at before a failure is
# narrowed down: SGLang's request limit falls with the context, so that start-up is not monotone.
SCAN_POINTS = 96


def predict(spec: PlanSpec) -> Prediction:
    """How this trial would go.

    Raises
    ------
    ValueError
        For a strategy or a flag that does not exist; one line.
    """
    if spec.strategy in ENGINES:
        return predict_engine(spec)
    if spec.strategy not in ("static", "paged", "eager_pages"):
        raise ValueError(
            f"strategy={spec.strategy}: allowed are static, paged, eager_pages, sglang, vllm"
        )
    return predict_pool_strategy(spec)


def starts(spec: PlanSpec, context_tokens: int) -> bool:
    """Whether the process reaches ``ready`` at this context."""
    return predict(spec.at(context_tokens).filled(0.0)).started


def admits(spec: PlanSpec, context_tokens: int) -> bool:
    """Whether it starts and accepts a request of the full context."""
    made = predict(spec.at(context_tokens).filled(0.0))
    return made.started and made.admits_context


def oom_points(spec: PlanSpec) -> OomPoints:
    """Start-up, admit and resident points between 1 token and the configured context.

    Start-up and admit are the *first* failure from below. The resident point is how far one
    sequence grows at the largest context that starts.
    """
    startup = _point(spec, starts)
    if startup.ok is None:
        nothing = OomPoint(None, startup.not_ok, startup.limited_by)
        return OomPoints(startup, nothing, nothing)
    return OomPoints(startup, _point(spec, admits), _resident(spec.at(startup.ok)))


def largest_context_that_starts(spec: PlanSpec, limit_tokens: int = 0) -> tuple[int, int | None]:
    """Find the largest context up to ``limit_tokens`` that starts, and the first that does not.

    The two are neighbours unless start-up is not monotone; 0 when nothing starts, and ``None``
    when everything does.
    """
    limit = limit_tokens or spec.context_tokens
    grid = _grid(limit)
    good = [starts(spec, tokens) for tokens in grid]
    first_bad = next((i for i, ok in enumerate(good) if not ok), None)
    if first_bad is None:
        return limit, None
    last_good = next((i for i in reversed(range(len(grid))) if good[i]), None)
    if last_good is None:
        return 0, grid[0]
    low = (
        _turning(spec, starts, grid[first_bad - 1], grid[first_bad]) if first_bad else (0, grid[0])
    )
    high = low
    if last_good > first_bad:
        top = grid[last_good + 1] if last_good + 1 < len(grid) else limit + 1
        high = _turning(spec, starts, grid[last_good], top) if top <= limit else (limit, top)
    return high[0], low[1]


def _grid(limit: int) -> list[int]:
    """Geometric contexts from 1 to the limit."""
    points = {round(limit ** (i / SCAN_POINTS)) for i in range(SCAN_POINTS + 1)}
    return sorted({1, limit, *points})


Test = Callable[[PlanSpec, int], bool]


def _turning(spec: PlanSpec, test: Test, good: int, bad: int) -> tuple[int, int]:
    """Neighbouring contexts between which a test turns from good to bad."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if test(spec, middle) else (good, middle)
    return good, bad


def _point(spec: PlanSpec, test: Test) -> OomPoint:
    good, tokens = 0, 1
    grid = _grid(spec.context_tokens) if spec.strategy == "sglang" else [1, spec.context_tokens]
    for tokens in grid:
        if not test(spec, tokens):
            break
        good = tokens
    else:
        return OomPoint(spec.context_tokens, None, "sweep_end")
    ok, not_ok = _turning(spec, test, good, tokens) if good else (None, tokens)
    failed = predict(spec.at(not_ok).filled(0.0))
    if failed.started:
        return OomPoint(ok, not_ok, "refused", "fill", "admit")
    return OomPoint(ok, not_ok, failed.outcome, failed.phase, failed.allocation)


def _resident(spec: PlanSpec) -> OomPoint:
    """How far one sequence grows in a started process."""
    made = predict(replace(spec, fill=1.0, sequences=1))
    held = made.resident_tokens
    if made.outcome == "ok":
        return OomPoint(held, None, "sweep_end")
    return OomPoint(held, held + 1, made.outcome, made.phase, made.allocation)
