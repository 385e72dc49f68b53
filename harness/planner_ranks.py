"""The planner's answers about one rank's share, in tokens of the whole sequences.

Context ranks each keep a share of every sequence, and the planner plans one rank; what a person
types and reads as a context is over all of them. With one context rank nothing changes.
"""

from __future__ import annotations

from dataclasses import replace

from harness.planner_changes import Change
from harness.planner_spec import OomPoint, OomPoints, PlanSpec, Prediction
from harness.settings import Settings


def whole_points(settings: Settings, points: OomPoints) -> OomPoints:
    """The OOM points: the longest sequence that a share of so many tokens is of, and one more."""

    def whole(point: OomPoint) -> OomPoint:
        ok = None if point.ok is None else settings.all_tokens(point.ok)
        failing = None if point.not_ok is None else first_beyond(settings, point.not_ok)
        if failing is None and ok is not None:
            ok = min(ok, settings.context_tokens)
        return replace(point, ok=ok, not_ok=failing)

    return replace(
        points,
        startup=whole(points.startup),
        admit=whole(points.admit),
        resident=whole(points.resident),
    )


def first_beyond(settings: Settings, local_tokens: int) -> int:
    """The shortest sequence of which a rank keeps ``local_tokens``."""
    return settings.all_tokens(local_tokens - 1) + 1


def whole_spec(settings: Settings, spec: PlanSpec) -> PlanSpec:
    """The question, with its context as it was typed."""
    return replace(spec, context_tokens=settings.context_tokens)


def whole_prediction(settings: Settings, made: Prediction) -> Prediction:
    """The answer; its allocations and bytes stay one rank's."""
    longest = settings.context_tokens  # of which other ranks may keep a page less than this one
    resident, request = map(settings.all_tokens, (made.resident_tokens, made.max_request_tokens))
    return replace(
        made,
        resident_tokens=min(resident, longest * settings.sequences),
        max_request_tokens=min(request, longest),
    )


def whole_change(settings: Settings, change: Change | None) -> Change | None:
    """A change of flags: a context in it as one types it."""
    if change is None:
        return None
    flags = tuple(
        (key, str(settings.all_tokens(int(value))) if key == "context" else value)
        for key, value in change.flags
    )
    tokens = settings.all_tokens(change.spec.context_tokens)
    return replace(change, flags=flags, spec=replace(change.spec, context_tokens=tokens))
