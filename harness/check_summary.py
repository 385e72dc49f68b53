"""Checks of what is derived from rows: rates from times, summary.json from trials.csv."""

from __future__ import annotations

import json
from typing import Any

from harness.check_rules import Result, failed, named, not_applicable, passed
from harness.claims import decide
from harness.evidence import UNDECIDED
from harness.ranks_summary import per_trial
from harness.rows import Row
from harness.runs import Run, dicts, lookup
from harness.sources import as_written
from harness.summary import summarise

# A rate, the time it is taken from, and the column of what was done in that time.
RATES = (
    ("attention_decode_tokens_per_second", "attention_decode_step_ms", "sequences"),
    ("attention_decode_bytes_per_second", "attention_decode_step_ms", "kv_live_bytes"),
    (
        "attention_prefill_tokens_per_second",
        "attention_prefill_chunk_ms",
        "prefill_chunk_tokens",
    ),
)
ROUNDING = 1e-9
SHOWN = 3


def rates(run: Run) -> Result:
    """Check that every rate is what was done over its time: sequences, K/V read, a chunk."""
    seen = 0
    for rate, time_ms, done in RATES:
        rows = run.rows[(run.rows["status"] == "ok") & run.rows[rate].notna()]
        seen += len(rows)
        bad = rows[~((rows[rate] * rows[time_ms] / 1e3 / rows[done] - 1).abs() < ROUNDING)]
        if not bad.empty:
            return failed(f"{rate} does not follow from {time_ms} and {done}: {named(bad)}")
    return passed(f"{seen} rates follow from their times") if seen else not_applicable("no rate")


def summary(run: Run) -> Result:
    """Check that summary.json follows from the rows: brackets, peaks, rates, verdicts.

    A verdict is compared with what today's rule says of the same rows; its words may have changed
    since.
    """
    try:
        arms, today = _made(as_written(run.rows))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return failed(f"rows that cannot be summed up ({type(error).__name__}: {error})"[:200])
    found = lookup(run.summary, "strategies")
    said = found if isinstance(found, dict) else {}
    off = [name for name in sorted({*arms, *said}) if arms.get(name) != said.get(name)]
    if off:
        return failed(f"does not follow from the rows: {'; '.join(off[:SHOWN])}")
    claims = dicts(run.summary, "claims")
    wrong = [str(c.get("id")) for c in claims if not _follows(c, today.get(str(c.get("id"))))]
    if wrong:
        return failed(f"verdicts do not follow from the rows: {', '.join(wrong[:SHOWN])}")
    decided = sum(c.get("verdict") != UNDECIDED for c in claims)
    return passed(f"{len(arms)} arms and {decided} verdicts follow from the rows")


def _made(rows: list[Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arms by name and claims by id, as summary.json would hold them today."""
    made = json.loads(json.dumps(summarise(rows, decide(per_trial(rows)))))
    return made["strategies"], {claim["id"]: claim for claim in made["claims"]}


def _follows(claim: dict[str, Any], today: dict[str, Any] | None) -> bool:
    """Whether a verdict stands, on the same trials; and its figure, where rows carry it."""
    if today is None:
        return False
    keys = ("verdict", "trials", *(("measured",) if today["trials"] else ()))
    return all(claim.get(key) == today[key] for key in keys)
