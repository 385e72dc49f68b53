"""Where a log and the planner's formulas differ, in words."""

from __future__ import annotations

from harness.explain_log import LogFacts
from harness.planner_spec import Prediction
from harness.sizes import gib


def disagreements(made: Prediction, facts: LogFacts) -> list[str]:
    """Say where the formulas and the log differ."""
    out = []
    if facts.outcome in ("oom", "refused") and made.started:
        out.append("the formulas expect a start; the log shows none")
    if facts.outcome == "ok" and not made.started:
        out.append("the formulas expect no start; the log shows one")
    if facts.pool_tokens and made.pool_tokens:
        off = made.pool_tokens / facts.pool_tokens - 1
        if abs(off) > 0.01:
            out.append(f"the log's pool has {facts.pool_tokens:,} tokens, {off:+.1%} off")
    early = not made.started and made.phase in ("context", "weights")
    if early and facts.failed not in ("", "weights", made.allocation):
        out.append(
            f"the formulas fail in {made.allocation} already, the log in {facts.failed}: is it one "
            "of several ranks? --command '… --tp N' beside the log says so"
        )
    needed = made.requested_bytes if made.outcome == "refused" else 0
    if needed and facts.needed_bytes and abs(needed / facts.needed_bytes - 1) > 0.01:
        out.append(
            f"one request needs {gib(facts.needed_bytes)} by the log, {gib(needed)} by the "
            "formulas: another --kv-cache-dtype, --tp or config.json? --command beside the log "
            "says so"
        )
    available = int(made.settings.get("available_kv_bytes", 0))
    if available and facts.available_kv_bytes:
        off = available / facts.available_kv_bytes - 1
        if abs(off) > 0.01:
            out.append(
                f"the log has {gib(facts.available_kv_bytes)} for K/V, the formulas "
                f"{gib(available)}: trust the log where they are close to what is needed"
            )
    return out
