"""C13: what turning SGLang's CUDA graphs off saves."""

from __future__ import annotations

from harness.engine_rows import best_first, default_flags, flags_of, version_of
from harness.evidence import (
    CONDITIONAL,
    MILLIONS_10,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    gib_of,
    option,
    scale,
    starts,
    undecided,
)
from harness.rows import Row
from harness.sizes import GIB

MANY_REQUESTS = 128  # graphs cost with the batches that they are captured for
RUN_CLAIMS = (
    f"experiment=claims (SGLang at 10M with {MANY_REQUESTS} requests, with and without graphs)"
)


def graphs_off(evidence: Evidence) -> Verdict:
    """C13: peak of a start with CUDA graphs, less that of the same start without.

    Short contexts and few requests save little and refute nothing: only 10M with many requests,
    where graphs cost most, can.
    """
    started = [r for r in evidence.of("sglang") if starts(r)]
    kinds = [found for kind in best_first(started) if (found := _with_and_without(kind))]
    pairs = next(filter(_can_decide, kinds), [])
    if not pairs:
        seen = [_saved_gb(pair) for pair in (kinds[-1] if kinds else [])]
        return undecided(RUN_CLAIMS + (f"; these starts save {_span(seen)}" if seen else ""))
    saved = list(map(_saved_gb, pairs))
    inside = [_start(on) for (on, _), gb in zip(pairs, saved, strict=True) if _as_reported(gb)]
    verdict = SUPPORTED if len(inside) == len(saved) else CONDITIONAL if inside else REFUTED
    text = _span(saved)
    if len(saved) > 1:
        text += ", by context and graph batch size"
    if inside:
        text += f"; 4 to 10 GB for {'; '.join(inside)}"
    if any(on.get("emulated_version") for on, _ in pairs):
        text += "; graphs themselves are counted by a formula, their tables exactly"
    own = [] if pairs == kinds[0] else [p for p in kinds[0] if p[0].get("engine_version")]
    if own:
        starts_named = "; ".join(dict.fromkeys(_start(on) for on, _ in own))
        text += f"; on SGLang itself {_span(list(map(_saved_gb, own)))} ({starts_named})"
    long = best_first(evidence.of("sglang", context_tokens=MILLIONS_10))
    failing = next((found for kind in long if (found := _failing_without(kind))), [])
    if failing:
        rescued = any(starts(off) for _, off in failing)
        text += "; where 10M fails with default flags, turning graphs off " + (
            "makes it start" if rescued else "does not make it start"
        )
    rows = tuple(r for pair in (*pairs, *own, *failing) for r in pair)
    return Verdict(verdict, text, rows, round(max(saved), 2))


def _with_and_without(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Starts with CUDA graphs, each beside the same one without; a measured pair before others."""
    pairs: dict[tuple[str, ...], tuple[Row, Row]] = {}

    def same(row: Row) -> tuple[str, ...]:
        flags = flags_of(row, "disable_cuda_graph")
        return tuple(map(str, (row["model"], row["context_tokens"], version_of(row), flags)))

    for on in [r for r in rows if not option(r, "disable_cuda_graph")]:
        for off in [r for r in rows if option(r, "disable_cuda_graph")]:
            if same(on) != same(off) or on["capacity_bytes"] != off["capacity_bytes"]:
                continue
            if same(on) not in pairs or on["basis"] == "measured":
                pairs[same(on)] = on, off
    return list(pairs.values())


def _can_decide(pairs: list[tuple[Row, Row]]) -> bool:
    """Whether a pair lies in the reported range, or could have."""
    return any(_as_reported(_saved_gb(pair)) or _costs_most(pair[0]) for pair in pairs)


def _costs_most(on: Row) -> bool:
    many = (option(on, "max_running_requests") or 0) >= MANY_REQUESTS
    return many and on["context_tokens"] == MILLIONS_10


def _saved_gb(pair: tuple[Row, Row]) -> float:
    return _peak_gb(pair[0]) - _peak_gb(pair[1])


def _span(gb: list[float]) -> str:
    """Return the least and the most, or the one figure that both are."""
    ends = dict.fromkeys(f"{value:.2f}" for value in (min(gb), max(gb)))
    return f"{' to '.join(ends)} GB"


def _as_reported(gb: float) -> bool:
    return 4 <= gb <= 10


def _peak_gb(row: Row) -> float:
    return gib_of(row, "peak_device_bytes") * GIB / 1e9


def _start(row: Row) -> str:
    requests = option(row, "max_running_requests") or "default"
    return f"{row['model']}, {row['context_tokens']:,} tokens, max_running_requests {requests}"


def _failing_without(long: list[Row]) -> list[tuple[Row, Row]]:
    """Starts at 10M that fail with default flags, each beside the same one without graphs."""
    off = [r for r in long if flags_of(r) == {"disable_cuda_graph": True}]
    return [
        (r, o)
        for r in long
        for o in off
        if default_flags(r)
        and not starts(r)
        and (r["model"], scale(r), version_of(r)) == (o["model"], scale(o), version_of(o))
    ]
