"""Rules that formulas decide: the planner, and an engine's source at a named version."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace

from harness.evidence import (
    CONDITIONAL,
    MILLIONS_10,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    starts,
    whole_context,
)
from harness.forecast import points
from harness.model_spec import known_model
from harness.options import engine_model
from harness.ranks_scaling import Gain
from harness.ranks_scaling import gains as rank_gains
from harness.rows import Row
from harness.schema import StaticConf
from harness.settings import Settings
from harness.validate import compose_settings
from strategies.engine_model import nvml_total_mib
from strategies.sglang_flags import SGLangFlags, resolve
from strategies.sglang_tables import VERSIONS

REPORTED_TOKEN_KIB = 24.0
CHUNK_TOKENS, GRAPH_ROWS = 8192, 256  # SGLang's own on an H200, on fewer than four ranks
FORMULA_MIB = 1.5 * CHUNK_TOKENS + 2 * GRAPH_ROWS
CLOSE = 0.01  # ends of a bracket
ROUNDING_MIB = 150.0
SAME_GAIN = 0.05
LISTED_MODELS = ("llama4_scout", "qwen3_30b_a3b", "qwen3_next_80b")


@functools.cache
def _report() -> Settings:
    """The report's model in pages on an H200: composed once, the others are variants of it."""
    return compose_settings(["hardware=h200", "context=1G", "strategy=paged"], planning=True)


@functools.cache
def _listed(model: str) -> Settings:
    """One of the models that the report lists, likewise."""
    report = _report()
    return replace(report, model=known_model(model, report.parallel.tp))


def reserve_formula(evidence: Evidence) -> Verdict:
    """C8: what each SGLang version reserves of an H200, and how it moves with the prefill chunk."""
    reserves = {v: _reserved_mib(v, CHUNK_TOKENS, GRAPH_ROWS) for v in VERSIONS}
    moved = {v: _reserved_mib(v, 2 * CHUNK_TOKENS, GRAPH_ROWS) - r for v, r in reserves.items()}
    # The fraction is rounded to three decimals (144 MiB), and 0.5.12 adds 8 MiB a graph size.
    with_term = [v for v, d in moved.items() if 0.9 < d / (1.5 * CHUNK_TOKENS) < 1.2]
    exact = [v for v, r in reserves.items() if abs(r - FORMULA_MIB) < ROUNDING_MIB]
    verdict = SUPPORTED if len(exact) == len(reserves) else CONDITIONAL if with_term else REFUTED
    return Verdict(
        verdict,
        f"the term 1.5 x chunked_prefill stands in {', '.join(with_term) or 'no version'}, beside "
        f"further terms; at chunked_prefill {CHUNK_TOKENS} and graph_bs {GRAPH_ROWS} the formula "
        f"gives {FORMULA_MIB:,.0f} MiB, each of 8 ranks reserves "
        + ", ".join(f"{r:,.0f} ({v})" for v, r in reserves.items()),
        measured=round(reserves[VERSIONS[-1]]),
        basis="source, SGLang " + ", ".join(reserves),
    )


def _reserved_mib(version: str, chunk: int, graph_bs: int) -> float:
    """``1 - mem_fraction_static`` of an H200, in MiB, at 8 ranks."""
    settings = _report()
    total = settings.hardware.total_bytes
    model = replace(engine_model(settings), tensor_parallel=8)
    flags = SGLangFlags(version=version, chunked_prefill_size=chunk, cuda_graph_max_bs=graph_bs)
    return (1 - resolve(model, flags, total).mem_fraction_static) * nvml_total_mib(total)


def weight_offload(evidence: Evidence) -> Verdict:
    """C15: tokens that a static pool gains when no weights are on the device; its price in time.

    Measured where a run closed both brackets, and the planner's figure beside it; else planned.
    """
    static = [
        r
        for r in evidence.rows
        if r["strategy"] == "static" and r["model"] == "report" and whole_context(r)
        and r["basis"] == "measured"
    ]  # fmt: skip
    here, away = _planned_ends()
    planned, basis = away - here, "planned"
    if rows := _both_brackets(static):
        basis = ""
        here, away = _context(rows[0]), _context(rows[2])
    gained, enough = away - here, away >= MILLIONS_10
    beside = f" ({planned:,} planned)" if rows else ", planned,"
    price, timed = _offload_price(evidence)
    return Verdict(
        SUPPORTED if enough else CONDITIONAL if gained > 0 else REFUTED,
        f"streamed from the host, {_report().model.weights_bytes / 2**30:.0f} GiB of weights leave "
        f"room for {gained:,} tokens{beside} on top of {here:,}: 10M "
        f"{'then starts' if enough else 'still does not start'}; {price}",
        (*rows, *timed),
        gained,
        basis,
    )


def _both_brackets(rows: list[Row]) -> tuple[Row, ...]:
    """Ends of start-up with the weights on the device, then with them offloaded.

    Of one run where it has both; what failed once there is not ok.
    """
    arms: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.get("run_id"), row.get("arm"), row.get("read_weights"))
        arms.setdefault(key, []).append(row)
    closed = {key: ends for key, own in arms.items() if (ends := _bracketed(own))}
    away = [key for key in closed if key[2] == "offload"]
    here = [key for key in closed if key[2] != "offload"]
    pairs = [(h, a) for a in away for h in here]
    best = min(pairs, key=lambda pair: pair[0][0] != pair[1][0], default=None)
    return (*closed[best[0]], *closed[best[1]]) if best else ()


def _bracketed(rows: list[Row]) -> tuple[Row, ...]:
    """The longest context that starts each time and the shortest that does not, if close."""
    failed = {_context(r) for r in rows if not starts(r)}
    good = max((r for r in rows if _context(r) not in failed), key=_context, default=None)
    bad = min((r for r in rows if not starts(r)), key=_context, default=None)
    if good is None or bad is None or not 0 < _context(bad) / _context(good) - 1 < CLOSE:
        return ()
    return good, bad


def _context(row: Row) -> int:
    return int(row["context_tokens"])


def _planned_ends() -> tuple[int, int]:
    """The longest contexts that static starts with: weights on the device, and offloaded."""
    options = asdict(StaticConf())
    options.pop("name")
    settings = replace(_report(), strategy="static", options=options)
    away = replace(settings, trial=replace(settings.trial, read_weights="offload"))
    return points(settings).startup.ok or 0, points(away).startup.ok or 0


def _offload_price(evidence: Evidence) -> tuple[str, tuple[Row, ...]]:
    """What a decode step takes with offloaded weights, beside one that reads them on the device."""
    timed = [
        r
        for r in evidence.every
        if r["basis"] == "measured" and r.get("attention_decode_step_ms") is not None
    ]
    for row in timed:
        if row.get("read_weights") != "offload":
            continue
        took = f"a decode step at {row['resident_tokens']:,} tokens then takes "
        took += f"{row['attention_decode_step_ms']:.1f} ms"
        same = ("strategy", "model", "resident_tokens", "device_name")
        for near in timed:
            if near.get("read_weights") == "device" and all(near[k] == row[k] for k in same):
                took += f" instead of {near['attention_decode_step_ms']:.1f}"
                return took, (row, near)
        return took, (row,)
    return "what it costs in step time: run experiment=remedies", ()


def context_parallelism(evidence: Evidence) -> Verdict:
    """C19: tokens of one sequence over 8 ranks, heads split against pages split.

    Ranks that ran decide where more than one model did, and the planner tells the other models.
    """
    ran = {
        g.pages.model: g  # of each model on most ranks
        for g in sorted(rank_gains(evidence.every), key=lambda g: g.pages.ranks)
        if g.basis != "planned"
    }
    if len(ran) > 1:
        return _measured_gain(evidence, ran)
    gains = {model: _planned_gain(_listed(model)) for model in LISTED_MODELS}
    copies = {model: _copies(_listed(model)) for model in LISTED_MODELS}
    only_copies = all(abs(gains[m] / copies[m] - 1) < SAME_GAIN for m in gains)
    why = "by the replication factor of the KV heads and no more: " if only_copies else ""
    return Verdict(
        _gain_verdict(gains), why + _times(gains), measured=_largest(gains), basis="planned"
    )


def _planned_gain(settings: Settings) -> float:
    tp = points(settings).resident.ok or 0
    heads = settings.parallel
    split = replace(settings, parallel=replace(heads, kind="context", context_ranks=heads.ranks))
    per_rank = points(split).resident.ok or 0
    return per_rank * split.parallel.context_ranks / tp if tp else 0.0


def _copies(settings: Settings) -> float:
    """Ranks that have the same KV head."""
    return max(1.0, settings.parallel.tp / settings.model.kv_heads_total)


def _measured_gain(evidence: Evidence, ran: dict[str, Gain]) -> Verdict:
    """C19 from ranks that really ran; models of which none did are told beside."""
    ratios = {model: g.ratio for model, g in ran.items()}
    told = ", ".join(f"{m} {g.ratio:.2f}x on {g.pages.ranks} ranks" for m, g in ran.items())
    rest = {m: _planned_gain(_listed(m)) for m in LISTED_MODELS if m not in ran}
    ids = {t for g in ran.values() for t in (*g.pages.trials, *g.heads.trials)}
    return Verdict(
        _gain_verdict(ratios),
        f"pages spread over ranks, against heads: {told}"
        + (f"; planned: {_times(rest)}" if rest else ""),
        tuple(r for r in evidence.every if r["trial_id"] in ids),
        _largest(ratios),
        "planned" if rest else "",
    )


def _gain_verdict(gains: dict[str, float]) -> str:
    more = [g for g in gains.values() if g > 1 + SAME_GAIN]
    return SUPPORTED if len(more) == len(gains) else CONDITIONAL if more else REFUTED


def _times(gains: dict[str, float]) -> str:
    return ", ".join(f"{model} {gain:.2f}x" for model, gain in gains.items())


def _largest(gains: dict[str, float]) -> float:
    return round(max(gains.values()), 2)


def fp8_cost(evidence: Evidence) -> Verdict:
    """C20: K/V bytes a token on each of 8 ranks, for every listed model and both dtypes."""
    cost: dict[tuple[str, str], float] = {}
    for model in LISTED_MODELS:
        settings = _listed(model)
        for dtype in ("fp8_e4m3", "bf16"):
            stored = replace(settings, model=replace(settings.model, kv_dtype=dtype))
            cost[model, dtype] = stored.full_model().token_bytes / 1024
    fp8 = {m: c for (m, d), c in cost.items() if d == "fp8_e4m3"}
    as_bf16 = [m for (m, d), c in cost.items() if d == "bf16" and c == REPORTED_TOKEN_KIB]
    hit = [m for m, c in fp8.items() if c == REPORTED_TOKEN_KIB]
    return Verdict(
        SUPPORTED if len(hit) == len(fp8) else CONDITIONAL if hit else REFUTED,
        "in FP8 "
        + ", ".join(f"{m} {c:g}" for m, c in fp8.items())
        + f" KiB; 24 KiB is the BF16 cost of {' and '.join(as_bf16) or 'none of them'}",
        measured=max(fp8.values()),
        basis="arithmetic",
    )
