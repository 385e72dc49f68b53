"""Rules about where each strategy ends; an end that was only sampled is compared with nothing."""

from __future__ import annotations

from harness.evidence import (
    CONDITIONAL,
    MILLIONS_10,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    starts,
    undecided,
    whole_context,
)
from harness.rows import Row

SAME = 0.01  # ends within 1 % are the same
RUN_BOTH = "-m strategy=static,paged model=report context=10M"
RUN_STATIC = "strategy=static model=report context=10M"


def risk_of_oom(evidence: Evidence) -> Verdict:
    """C6: how many tokens of one sequence each holds at its end.

    The end of paged is a fill that was refused. That of static is the longest sequence that was
    filled into a pool, with a context within 1 % above it that does not start: without one it may
    have held more.
    """
    ends = _ends(evidence)
    if ends is None:
        return undecided(RUN_BOTH)
    paged, static = ends
    held, room = paged["resident_tokens"], static["resident_tokens"]
    if abs(held / room - 1) < SAME:
        verdict = CONDITIONAL
        text = "both hold the same tokens when filled; the failure moves from start-up to run time"
    elif held < room:
        verdict, text = REFUTED, f"a static pool holds {room:,} tokens, paged only {held:,}"
    else:
        verdict, text = SUPPORTED, f"paged holds {held:,} tokens, a static pool {room:,}"
    return Verdict(verdict, text, (paged, static), round(held / room, 4))


def _ends(evidence: Evidence) -> tuple[Row, Row] | None:
    """Longest refused fill of paged, and longest filled sequence of static where it is its end."""
    paged = [
        r
        for r in evidence.of("paged", starts, model="report", sequences=1)
        if r["status"] == "oom" and r["oom_phase"] == "fill"
    ]
    static = evidence.of("static", whole_context, model="report")
    filled = [r for r in static if starts(r) and r["resident_tokens"]]
    failing = [r["context_tokens"] for r in static if not starts(r)]
    if not paged or not filled or not failing:
        return None
    longest = max(filled, key=lambda r: r["resident_tokens"])
    if min(failing) >= longest["resident_tokens"] * (1 + SAME):
        return None
    return max(paged, key=lambda r: r["resident_tokens"]), longest


def on_demand_starts(evidence: Evidence) -> Verdict:
    """C14: the same configuration with and without on-demand commit."""
    paged = evidence.of("paged", context_tokens=MILLIONS_10, model="report")
    static = evidence.of("static", whole_context, context_tokens=MILLIONS_10, model="report")
    if not paged or not static:
        return undecided(RUN_BOTH)
    works = all(map(starts, paged)) and not any(map(starts, static))
    text = "for start-up"
    if not works:
        counts = (f"{sum(map(starts, own))} of {len(own)}" for own in (paged, static))
        text = "{} paged trials start, {} static ones".format(*counts)
    ends = _ends(evidence) if works else None
    if ends is not None:
        held, room = (r["resident_tokens"] for r in ends)
        text += f"; filled, a sequence ends at {held:,} tokens, the longest in a static pool has "
        text += f"{room:,}"
    return Verdict(
        SUPPORTED if works else REFUTED,
        text,
        tuple(paged + static),
        "starts" if all(map(starts, paged)) else "does not start",
    )


def five_to_six_million(evidence: Evidence) -> Verdict:
    """C16: the largest context that static starts with, at the report's cost of a token."""
    rows = evidence.of("static", whole_context, model="report")
    good = [r for r in rows if starts(r)]
    bad = [r for r in rows if not starts(r)]
    largest = max((r["context_tokens"] for r in good), default=0)
    # At the very edge one context may end both ways, and so may those below it.
    above = [r["context_tokens"] for r in bad if r["context_tokens"] > largest]
    smallest = min(above, default=0)
    if largest >= 5_000_000:
        verdict, text = SUPPORTED, f"starts at {largest:,} tokens"
    elif above and smallest <= 5_000_000:
        verdict, text = REFUTED, f"starts at {largest:,} tokens" if good else "starts nowhere"
    else:
        return undecided(RUN_STATIC)
    text += f", not at {smallest:,}" if above else ""
    return Verdict(verdict, text, tuple(good + bad), _largest_start(largest, smallest))


def _largest_start(largest: int, smallest_bad: int) -> int | str:
    """The longest context that starts, or what is known of it where no neighbour was tried."""
    if not smallest_bad:
        return f"at least {largest:,}"
    if smallest_bad < largest * (1 + SAME):
        return largest
    return f"{largest:,} - {smallest_bad:,}" if largest else f"below {smallest_bad:,}"
