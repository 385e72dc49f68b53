"""Rules about the engines' code, over rows of ``strategy=sglang`` and ``strategy=vllm``.

Where the rows of really started engines (``engine_version`` filled) are enough to decide a claim,
they alone do; else the emulations' do.
"""

from __future__ import annotations

from harness.engine_rows import best_first, default_flags, flags_of, version_of
from harness.evidence import (
    CONDITIONAL,
    MILLIONS_10,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    admits,
    gib_of,
    option,
    scale,
    starts,
    token_kib,
    undecided,
)
from harness.rows import Row

SHORT_CONTEXT = 131_072
SAME_POOL = 0.02
RUN = "experiment=root_cause"
SMALL_REST_GIB = 4.0  # what the report says that vLLM holds at start-up


def _fitted(row: Row) -> bool:
    """Whether vLLM was free to serve a shorter context than was asked for."""
    return bool(option(row, "max_model_len") == "auto")


def _pool_bytes(row: Row) -> int:
    """The KV pool that a start made, or asked for when it failed there."""
    if starts(row):
        return int(row["kv_reserved_bytes"])
    return int(row["oom_requested_bytes"]) if row["oom_phase"] == "pool" else 0


def _pool_tokens(row: Row) -> int:
    """Tokens that SGLang's pool has room for: all but a page, which takes what is padding.

    ``srt/mem_cache/memory_pool.py:895-918`` of 0.5.12.post1: buffers of ``size + page_size``.
    """
    tokens: int = round(_pool_bytes(row) / row["kv_bytes_per_token"])
    return tokens - int(option(row, "page_size") or 1)


def _short_and_long(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Every start at a short context beside every one at 10M, where both say how large a pool."""
    own = [r for r in rows if _pool_bytes(r)]
    short = [r for r in own if r["context_tokens"] == SHORT_CONTEXT]
    long = [r for r in own if r["context_tokens"] == MILLIONS_10]

    def same(row: Row) -> tuple[object, ...]:
        return str(row["model"]), scale(row), version_of(row)

    return [(s, t) for s in short for t in long if same(s) == same(t)]


def sglang_pool_by_context(evidence: Evidence) -> Verdict:
    """C9: SGLang's pool and its table at a short context and at 10M."""
    kinds = map(_short_and_long, best_first(evidence.of("sglang", default_flags)))
    pairs = next((found for found in kinds if found), [])
    if not pairs:
        return undecided(RUN)
    rows = tuple(r for pair in pairs for r in pair)
    ratios = [float(_pool_bytes(t) / _pool_bytes(s)) for s, t in pairs]
    farthest = max(ratios, key=lambda ratio: abs(ratio - 1.0))
    if all(abs(r * SHORT_CONTEXT / MILLIONS_10 - 1.0) < SAME_POOL for r in ratios):
        text = "the pool grows in proportion to the context"
        return Verdict(SUPPORTED, text, rows, round(farthest, 4))
    if abs(farthest - 1.0) > SAME_POOL:
        text = "the pool's size changes with context, but not in proportion"
        return Verdict(CONDITIONAL, text, rows, round(farthest, 4))
    sizes: dict[float, set[int]] = {}
    for short, long in pairs:
        both = {_pool_tokens(short), _pool_tokens(long)}
        sizes[token_kib(long)] = sizes.get(token_kib(long), set()) | both
    pools = ", ".join(
        f"{' and '.join(f'{n:,}' for n in sorted(sizes[kib]))} tokens at {kib:g} KiB a token"
        for kib in sorted(sizes)
    )
    alike = "the same" if all(ratio == 1 for ratio in ratios) else "alike"
    after = max(gib_of(t, "tables_bytes") for _, t in pairs)
    before = max(gib_of(s, "tables_bytes") for s, _ in pairs)
    failing = sorted({str(t["oom_allocation"]) for _, t in pairs if not starts(t)})
    text = (
        f"the pool made at {SHORT_CONTEXT:,} and the one asked for at 10M are {alike} ({pools}); "
        f"what grows with the context is the request-to-token table: all tables together take "
        f"{before:.2f} GiB, then {after:.2f}"
    )
    if failing:
        text += f", beside which {', '.join(failing)} no longer fits"
    return Verdict(REFUTED, text, rows, round(farthest, 4))


def vllm_preallocates(evidence: Evidence) -> Verdict:
    """C10: what vLLM holds at ready, whatever the context."""
    empty = [r for r in evidence.of("vllm", starts) if not r["resident_tokens"]]
    rows = next((kind for kind in best_first(empty) if kind), [])
    if not rows:
        return undecided(RUN)
    eager = [r for r in rows if _holds_its_pool(r)]
    least = min(rows, key=lambda r: gib_of(r, "kv_committed_bytes"))
    pool, held = gib_of(least, "kv_committed_bytes"), gib_of(least, "peak_device_bytes")
    if len(eager) == len(rows):
        verdict = REFUTED
        text = (
            f"the whole pool ({pool:.1f} GiB at the least) is allocated and zeroed at start-up; on "
            "demand is only which block belongs to which request"
        )
    elif eager:
        verdict, text = CONDITIONAL, f"{len(eager)} of {len(rows)} starts hold their whole pool"
    else:
        verdict, text = SUPPORTED, "little more than weights is held at ready"
    return Verdict(verdict, text, tuple(rows), round(held, 2))


def _holds_its_pool(row: Row) -> bool:
    held, pool = gib_of(row, "peak_device_bytes"), gib_of(row, "kv_committed_bytes")
    return held - gib_of(row, "weights_bytes") > SMALL_REST_GIB and pool > held / 2


def vllm_supports_ten_million(evidence: Evidence) -> Verdict:
    """C11: vLLM at 10M, by the K/V cost of a token and the hybrid manager."""
    asked = evidence.of("vllm", lambda r: not _fitted(r), context_tokens=MILLIONS_10)
    rows = next((kind for kind in best_first(asked) if len(_costs(kind)) > 1), [])
    if not rows:
        return undecided(f"{RUN} (vLLM at 24 and at 12 KiB a token)")
    good = [r for r in rows if starts(r)]
    bad = [r for r in rows if not starts(r)]
    if not bad or not good:
        return Verdict(
            SUPPORTED if good else REFUTED,
            "in every configuration that was run",
            tuple(rows),
            "starts" if good else "refused",
        )
    started, models = rows[0].get("engine_version"), {r["model"] for r in rows}
    only = [r for r in asked if started and r["model"] not in models]
    return Verdict(
        CONDITIONAL,
        _of_two_ends(rows) + (f". Emulated only: {_of_two_ends(only)}" if only else ""),
        tuple(rows + only),
        f"{len(good)} of {len(rows)} configurations start",
    )


def _of_two_ends(rows: list[Row]) -> str:
    """Which configurations start, and which do not."""
    ends = {
        "starts": sorted({_named(r) for r in rows if starts(r)}),
        "Does not": sorted({_named(r) for r in rows if not starts(r)}),
    }
    return ". ".join(f"{end}: {'; '.join(those)}" for end, those in ends.items() if those)


def _costs(rows: list[Row]) -> set[tuple[str, float]]:
    """Models, and what a token costs them."""
    return {(str(r["model"]), token_kib(r)) for r in rows}


def _named(row: Row) -> str:
    flags = ("gpu_memory_utilization", "max_num_seqs", "hybrid_kv_cache_manager")
    given = [f"{k}={option(row, k)}" for k in flags if option(row, k) is not None]
    said = f"{token_kib(row):g} KiB a token flat; {', '.join(given) or 'defaults'}"
    if not starts(row):
        needs, has = gib_of(row, "oom_requested_bytes"), gib_of(row, "oom_free_bytes")
        said += f"; its K/V needs {needs:.1f} GiB, has {has:.1f}" if needs else ""
        said += "; crashes with everything allocated" if row["status"] == "crash" else ""
    whose = "a dense stand-in of " if row.get("engine_version") else ""
    return f"{whose}{row['model']} ({said})"


def _few_and_default(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Starts with 16 running requests, and with default flags."""
    few = [r for r in rows if flags_of(r) == {"max_running_requests": 16}]
    return few, [r for r in rows if default_flags(r)]


def few_requests_start(evidence: Evidence) -> Verdict:
    """C18: SGLang at 10M with 16 running requests, beside default flags."""
    long = evidence.of("sglang", context_tokens=MILLIONS_10)
    kinds = map(_few_and_default, best_first(long))
    few, default = next((found for found in kinds if all(found)), ([], []))
    if not few:
        return undecided(RUN)
    if not all(map(starts, few)) or all(map(starts, default)):
        text = f"with it {_count(few)} start, with default flags {_count(default)}"
        return Verdict(REFUTED, text, tuple(few + default), "does not decide it")
    short = sorted(
        {
            f"{token_kib(r):g} KiB a token (room for {_pool_tokens(r):,})"
            for r in few
            if not admits(r)
        }
    )
    note = f"; a request of 10M is still not admitted at {', '.join(short)}" if short else ""
    tables = max(gib_of(r, "tables_bytes") for r in few)
    before = max(gib_of(r, "tables_bytes") for r in default)
    return Verdict(
        SUPPORTED,
        f"its tables are then {tables:.2f} instead of {before:.2f} GiB{note}",
        tuple(few + default),
        "starts",
    )


def _count(rows: list[Row]) -> str:
    return f"{sum(map(starts, rows))} of {len(rows)}"


def choose_vllm(evidence: Evidence) -> Verdict:
    """C17: the conclusion stands or falls with C9, C10, C11 and C18."""
    parts = {
        "C9": sglang_pool_by_context(evidence),
        "C10": vllm_preallocates(evidence),
        "C11": vllm_supports_ten_million(evidence),
        "C18": few_requests_start(evidence),
    }
    missing = [k for k, v in parts.items() if v.verdict == "undecided"]
    if missing:
        return undecided(f"{RUN} ({', '.join(missing)} are undecided)")
    rows = tuple(r for v in parts.values() for r in v.rows)
    if parts["C9"].verdict == SUPPORTED and parts["C10"].verdict == SUPPORTED:
        return Verdict(SUPPORTED, "its allocation is dynamic and SGLang's is not", rows)
    if parts["C11"].verdict == REFUTED:
        return Verdict(REFUTED, "vLLM does not start at 10M in any configuration", rows)
    said = []
    if parts["C10"].verdict == REFUTED:
        said.append("not for its allocation: it allocates its whole pool at start-up")
    if parts["C9"].verdict == REFUTED:
        said.append("SGLang's pool does not depend on the context either")
    if parts["C18"].verdict == SUPPORTED:
        said.append("with 16 running requests SGLang starts at 10M too")
    if parts["C11"].verdict == CONDITIONAL:
        said.append(f"with vLLM {parts['C11'].measured} (C11)")
    return Verdict(CONDITIONAL, "; ".join(said) or "as C9, C10, C11 and C18 say", rows)
