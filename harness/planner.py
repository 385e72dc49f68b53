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
SCAN_POINTS = 24
# Rows of a float32 rotary table of 128 elements that fill a segment of torch's allocator: with
# that many, nothing can lie behind the table, which else decides whether SGLang starts (see
# strategies.sglang_tables.rope_leftover_bytes). Engines are looked at there, from 100M tokens on.
ROUND_TOKENS = 4096
ROUND_FROM_TOKENS = 100_000_000


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
    if spec.strategy in ENGINES and context_tokens > ROUND_FROM_TOKENS:
        context_tokens -= context_tokens % ROUND_TOKENS
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
    return OomPoints(startup, _point(spec, admits), _resident(spec.at(startup.ok), startup))


def largest_context_that_starts(spec: PlanSpec, limit_tokens: int = 0) -> tuple[int, int | None]:
    """Find the largest context up to ``limit_tokens`` that starts, and the first that does not.

    The two are neighbours unless start-up is not monotone; 0 when nothing starts, and ``None``
    when everything does.
    """
    limit = limit_tokens or spec.context_tokens
    first_bad = _first_failure(spec, starts, limit)
    if first_bad is None:
        return limit, None
    later = [tokens for tokens in _grid(limit) if tokens > first_bad]
    later += [first_bad + 1] if first_bad < limit else []
    good = max((tokens for tokens in later if starts(spec, tokens)), default=first_bad - 1)
    above = min((tokens for tokens in later if tokens > good), default=limit + 1)
    if good < first_bad or above > limit:
        return min(good, limit), first_bad
    return _turning(spec, starts, good, above)[0], first_bad


Test = Callable[[PlanSpec, int], bool]


def _first_failure(spec: PlanSpec, test: Test, limit: int) -> int | None:
    """Find the smallest context up to a limit at which a test fails, or None."""
    if spec.strategy != "sglang":
        if test(spec, limit):
            return None
        return _turning(spec, test, 1, limit)[1] if limit > 1 and test(spec, 1) else 1
    low: int | None = 0
    for tokens in _grid(limit):
        if not test(spec, tokens):
            break
        low = tokens
    else:
        low, tokens = None, 0
    found = [_turning(spec, test, low, tokens)[1]] if low else ([1] if low == 0 else [])
    tooth = _failing_tooth(spec, test, limit)
    return min(found + ([tooth] if tooth else []), default=None)


def _failing_tooth(spec: PlanSpec, test: Test, limit: int) -> int | None:
    """Find the first failure where SGLang's default request limit falls with the context.

    There R = int(512 M / L), so that the table of R rows is a saw whose tops, at L = 512 M / R,
    rise with the context; a grid would step over them.
    """
    if spec.options.get("max_running_requests") is not None:
        return None
    pool = predict(spec.at(limit).filled(0.0)).pool_tokens

    def top(rows: int) -> int:
        return 512 * pool // rows

    good, bad = 4097, 2048
    if top(good) < 1 or top(4096) > limit:
        return None
    while top(bad) > limit or bad < 1:
        bad += 1
    if test(spec, top(bad)):
        return None
    while good - bad > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if test(spec, top(middle)) else (good, middle)
    valley = top(bad + 1) + 1
    return _turning(spec, test, valley, top(bad))[1] if test(spec, valley) else valley


def _grid(limit: int) -> list[int]:
    """Geometric contexts from 1 to the limit."""
    points = {round(limit ** (i / SCAN_POINTS)) for i in range(SCAN_POINTS + 1)}
    return sorted({1, limit, *points})


def _turning(spec: PlanSpec, test: Test, good: int, bad: int) -> tuple[int, int]:
    """Neighbouring contexts between which a test turns from good to bad."""
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if test(spec, middle) else (good, middle)
    return good, bad


def _point(spec: PlanSpec, test: Test) -> OomPoint:
    not_ok = _first_failure(spec, test, spec.context_tokens)
    if not_ok is None:
        return OomPoint(spec.context_tokens, None, "sweep_end")
    ok = not_ok - 1 or None
    failed = predict(spec.at(not_ok).filled(0.0))
    if failed.started:
        return OomPoint(ok, not_ok, "refused", "fill", "admit")
    return OomPoint(ok, not_ok, failed.outcome, failed.phase, failed.allocation)


def _resident(spec: PlanSpec, startup: OomPoint) -> OomPoint:
    """How far one sequence grows in a started process; start-up's own end when it grows to that."""
    made = predict(replace(spec.filled(1.0), filled_sequences=1))
    held = made.resident_tokens
    if made.outcome == "ok":
        return replace(startup, ok=held)
    return OomPoint(held, held + 1, made.outcome, made.phase, made.allocation)
