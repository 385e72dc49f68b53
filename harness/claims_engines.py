"""Rules about the engines' code, over rows of ``strategy=sglang`` and ``strategy=vllm``.

Where the rows of really started engines (``engine_version`` filled) are enough to decide a claim,
they alone do; else the emulations' do.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def _default_flags(row: Row) -> bool:
    keys = (
        "max_running_requests",
        "disable_cuda_graph",
        "mem_fraction_static",
        "cuda_graph_max_bs",
    )
    return not any(option(row, k) for k in keys)


def _kinds(rows: Iterable[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of the engines themselves, of their emulations, and all: the best evidence first."""
    own = list(rows)
    real = [r for r in own if r.get("engine_version")]
    return real, [r for r in own if not r.get("engine_version")], own


def _fitted(row: Row) -> bool:
    """Whether vLLM was free to serve a shorter context than was asked for."""
    return bool(option(row, "max_model_len") == "auto")


def _pool_bytes(row: Row) -> int:
    """The KV pool that a start made, or asked for when it failed there."""
    if starts(row):
        return int(row["kv_reserved_bytes"])
    return int(row["oom_requested_bytes"]) if row["oom_phase"] == "pool" else 0


def _short_and_long(rows: list[Row]) -> list[tuple[Row, Row]]:
    """Every start at a short context beside every one at 10M, where both say how large a pool."""
    pairs = []
    for model in sorted({str(r["model"]) for r in rows}):
        own = [r for r in rows if r["model"] == model and _pool_bytes(r)]
        short = [r for r in own if r["context_tokens"] == SHORT_CONTEXT]
        long = [r for r in own if r["context_tokens"] == MILLIONS_10]
        pairs += [(s, t) for s in short for t in long if scale(s) == scale(t)]
    return pairs


def sglang_pool_by_context(evidence: Evidence) -> Verdict:
    """C9: SGLang's pool and its table at a short context and at 10M."""
    kinds = map(_short_and_long, _kinds(evidence.of("sglang", _default_flags)))
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
    tokens = sorted({round(_pool_bytes(t) / t["kv_bytes_per_token"]) for _, t in pairs})
    after = max(gib_of(t, "tables_bytes") for _, t in pairs)
    before = max(gib_of(s, "tables_bytes") for s, _ in pairs)
    failing = sorted({str(t["oom_allocation"]) for _, t in pairs if not starts(t)})
    text = (
        f"the pool is the same at both contexts ({', '.join(f'{n:,}' for n in tokens)} tokens, a "
        "figure for each model); what grows with context are the tables (request-to-token, "
        f"rotary), from {before:.2f} to {after:.2f} GiB"
    )
    if failing:
        text += f", and then {', '.join(failing)} no longer fits"
    return Verdict(REFUTED, text, rows, round(farthest, 4))


def vllm_preallocates(evidence: Evidence) -> Verdict:
    """C10: what vLLM holds at ready, whatever the context."""
    empty = [r for r in evidence.of("vllm", starts) if not r["resident_tokens"]]
    rows = next((kind for kind in _kinds(empty) if kind), [])
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
    rows = next((kind for kind in _kinds(asked) if len(_costs(kind)) > 1), [])
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
    return Verdict(
        CONDITIONAL,
        "starts: "
        + "; ".join(sorted({_named(r) for r in good}))
        + ". Does not: "
        + "; ".join(sorted({_named(r) for r in bad})),
        tuple(rows),
        f"{len(good)} of {len(rows)} configurations start",
    )


def _costs(rows: list[Row]) -> set[tuple[str, float]]:
    """Models, and what a token costs them."""
    return {(str(r["model"]), token_kib(r)) for r in rows}


def _named(row: Row) -> str:
    flags = ("gpu_memory_utilization", "max_num_seqs", "hybrid_kv_cache_manager")
    given = [f"{k}={option(row, k)}" for k in flags if option(row, k) is not None]
    return f"{row['model']} ({token_kib(row):g} KiB a token flat; {', '.join(given) or 'defaults'})"


def graphs_off(evidence: Evidence) -> Verdict:
    """C13: peak of a start with CUDA graphs, less that of the same start without."""
    kinds = map(_saved, _kinds(r for r in evidence.of("sglang") if starts(r)))
    saved, used = next((found for found in kinds if found[0]), ({}, []))
    if not saved:
        return undecided(f"{RUN} (SGLang with and without CUDA graphs)")
    low, high = min(saved.values()), max(saved.values())
    inside = [what for what, g in saved.items() if 4 <= g * 1.0737 <= 10]
    verdict = SUPPORTED if len(inside) == len(saved) else CONDITIONAL if inside else REFUTED
    text = f"{low:.2f} to {high:.2f} GiB, by context and graph batch size"
    if inside:
        text += f"; 4 to 10 GB for {'; '.join(inside)}"
    text += (
        "; turning graphs off makes one more context start"
        if _off_starts_more(evidence)
        else "; where 10M fails, turning graphs off does not make it start"
    )
    return Verdict(verdict, text, tuple(used), round(high, 2))


def _saved(rows: list[Row]) -> tuple[dict[str, float], list[Row]]:
    """GiB that turning graphs off saves, by what was started; and the rows that say so."""
    saved: dict[str, float] = {}
    used: list[Row] = []
    for on in [r for r in rows if not option(r, "disable_cuda_graph")]:
        for off in [r for r in rows if option(r, "disable_cuda_graph")]:
            same = ("model context_tokens capacity_bytes emulated_version engine_version").split()
            flags = ("max_running_requests", "mem_fraction_static")
            if all(on[k] == off[k] for k in same) and all(
                option(on, k) == option(off, k) for k in flags
            ):
                what = f"{on['model']}, {on['context_tokens']:,} tokens"
                requests = option(on, "max_running_requests")
                what += f", max_running_requests {requests or 'default'}"
                saved[what] = gib_of(on, "peak_device_bytes") - gib_of(off, "peak_device_bytes")
                used += [on, off]
    return saved, used


def _off_starts_more(evidence: Evidence) -> bool:
    failing = [
        r
        for r in evidence.of("sglang", _default_flags, context_tokens=MILLIONS_10)
        if not starts(r)
    ]
    off = evidence.of("sglang", context_tokens=MILLIONS_10, disable_cuda_graph=True)
    return any(
        starts(o) and option(o, "max_running_requests") is None and o["model"] == r["model"]
        for r in failing
        for o in off
    )


def _few_and_default(rows: list[Row]) -> tuple[list[Row], list[Row]]:
    """Starts with 16 running requests, and with default flags."""
    other = ("disable_cuda_graph", "mem_fraction_static", "cuda_graph_max_bs")
    few = [
        r
        for r in rows
        if option(r, "max_running_requests") == 16 and not any(option(r, k) for k in other)
    ]
    return few, [r for r in rows if _default_flags(r)]


def few_requests_start(evidence: Evidence) -> Verdict:
    """C18: SGLang at 10M with 16 running requests, beside default flags."""
    long = evidence.of("sglang", context_tokens=MILLIONS_10)
    kinds = map(_few_and_default, _kinds(long))
    few, default = next((found for found in kinds if all(found)), ([], []))
    if not few:
        return undecided(RUN)
    if not all(map(starts, few)) or all(map(starts, default)):
        return Verdict(REFUTED, "the flag does not decide it", tuple(few + default))
    short = sorted(
        {
            f"{token_kib(r):g} KiB a token (room for "
            f"{r['kv_reserved_bytes'] // r['kv_bytes_per_token']:,})"
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
        said.append("whether vLLM starts is decided by the K/V bytes a token")
    return Verdict(CONDITIONAL, "; ".join(said), rows)
