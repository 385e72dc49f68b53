"""The report's claims, each a rule over rows; none knows its verdict before it has read them.

The rules are in :mod:`harness.claims_pools` (the report's two ideas), :mod:`harness.claims_ends`
(where each ends), :mod:`harness.claims_sharing` (many sequences), :mod:`harness.claims_engines`,
:mod:`harness.claims_graphs` (the engines' code) and :mod:`harness.claims_planned` (arithmetic).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness import (
    claims_ends,
    claims_engines,
    claims_graphs,
    claims_planned,
    claims_pools,
    claims_sharing,
)
from harness.evidence import UNDECIDED, Evidence, Verdict, basis_of
from harness.rows import Row

Rule = Callable[[Evidence], Verdict]


@dataclass(frozen=True)
class Claim:
    """A claim of the report in our words, its section, its figure, and the rule that decides it.

    Where rows that were measured are enough, the scale model's are left out; with ``every_basis``
    the rule itself takes the better of two that answer the same.
    """

    id: str
    section: str
    text: str
    reported: float | str | None
    unit: str
    rule: Rule
    every_basis: bool = False


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "C1",
        "Problem, 4",
        "A static pool for 10M tokens cannot start on a 140 GiB GPU",
        "does not start",
        "",
        claims_pools.static_cannot_start,
    ),
    Claim(
        "C2",
        "Problem, 4",
        "A paged pool starts with 10M configured",
        "starts",
        "",
        claims_pools.paged_starts,
    ),
    Claim(
        "C3",
        "3",
        "At start-up paged holds weights only, static weights and pool",
        4.0,
        "GiB",
        claims_pools.held_at_startup,
    ),
    Claim(
        "C4",
        "3",
        "Paged grows with the real length; static is flat",
        None,
        "committed at 10 % / at 100 %",
        claims_pools.growth_with_length,
    ),
    Claim(
        "C5",
        "2",
        "10M tokens need about 182 GB a GPU",
        182.0,
        "GB",
        claims_pools.bytes_of_ten_million,
    ),
    Claim(
        "C6",
        "3",
        "Paged lowers the out-of-memory risk",
        "lower",
        "resident tokens, paged / static",
        claims_ends.risk_of_oom,
    ),
    Claim(
        "C7",
        "7",
        "A lower mem-fraction (0.65) does not help a static pool",
        0.65,
        "largest fraction of the context that starts",
        claims_pools.lower_fraction,
    ),
    Claim(
        "C8",
        "5",
        "The reserve is 1.5 x chunked_prefill + 2 x graph_bs",
        claims_planned.FORMULA_MIB,
        "MiB of an H200 that the newest version reserves",
        claims_planned.reserve_formula,
    ),
    Claim(
        "C9",
        "1, 4",
        "SGLang sizes its KV pool by context length, and that is the root cause",
        "pool grows with context",
        "pool tokens at 10M / at 131,072",
        claims_engines.sglang_pool_by_context,
    ),
    Claim(
        "C10",
        "1, 5",
        "vLLM does not pre-allocate its KV pool",
        4.0,
        "GiB in use at ready",
        claims_engines.vllm_preallocates,
    ),
    Claim(
        "C11",
        "Problem",
        "vLLM supports 10M on 8xH200",
        "starts",
        "",
        claims_engines.vllm_supports_ten_million,
    ),
    Claim(
        "C12",
        "6",
        "Static pre-allocation fragments; paging does not",
        None,
        "share of KV memory that is live, static / paged",
        claims_sharing.fragmentation,
    ),
    Claim(
        "C13",
        "2",
        "Disabling CUDA graphs saves 4 - 10 GB",
        "4 - 10",
        "GB",
        claims_graphs.graphs_off,
        every_basis=True,
    ),
    Claim(
        "C14",
        "8.1, 8.3",
        "On-demand allocation lets 10M start",
        "starts",
        "",
        claims_ends.on_demand_starts,
    ),
    Claim(
        "C15",
        "8.2",
        "Weight offload relieves start-up",
        None,
        "tokens gained",
        claims_planned.weight_offload,
    ),
    Claim(
        "C16",
        "8.4",
        "Reduce to 5 - 6M tokens",
        "5 - 6M",
        "tokens",
        claims_ends.five_to_six_million,
    ),
    Claim(
        "C17",
        "Conclusion",
        "For 10M+, choose vLLM for its dynamic allocation",
        None,
        "",
        claims_engines.choose_vllm,
    ),
    Claim(
        "C18",
        "(ours)",
        "max_running_requests=16 lets SGLang start at 10M with its static pool",
        None,
        "",
        claims_engines.few_requests_start,
    ),
    Claim(
        "C19",
        "(ours)",
        "Context parallelism holds more than tensor parallelism",
        None,
        "tokens, context / tensor parallel",
        claims_planned.context_parallelism,
        every_basis=True,
    ),
    Claim(
        "C20",
        "2",
        "0.0234 MB a token is the FP8 cost",
        24.0,
        "KiB a token",
        claims_planned.fp8_cost,
    ),
)


def decide(rows: list[Row]) -> list[dict[str, Any]]:
    """A verdict on every claim, as summary.json holds it.

    A claim whose rows are missing is ``undecided`` and says what to run.
    """
    every = Evidence(rows)
    measured = Evidence(r for r in rows if r["basis"] != "scale_model")
    return [_entry(claim, _decided(claim, measured, every)) for claim in CLAIMS]


def _decided(claim: Claim, measured: Evidence, every: Evidence) -> Verdict:
    found = claim.rule(every if claim.every_basis else measured)
    return claim.rule(every) if found.verdict == UNDECIDED else found


def _entry(claim: Claim, found: Verdict) -> dict[str, Any]:
    basis = "; ".join(b for b in (basis_of(found.rows), found.basis) if b)
    return {
        "id": claim.id,
        "section": claim.section,
        "claim": claim.text,
        "verdict": found.verdict,
        "condition": found.condition,
        "basis": "" if found.verdict == UNDECIDED else basis,
        "measured": found.measured,
        "reported": claim.reported,
        "unit": claim.unit,
        "trials": sorted({str(r["trial_id"]) for r in found.rows}),
    }
