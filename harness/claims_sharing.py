"""C12: what becomes of K/V memory that many sequences share."""

from __future__ import annotations

from harness.evidence import CONDITIONAL, REFUTED, SUPPORTED, Evidence, Verdict, undecided
from harness.rows import Row
from harness.shares import SPOKEN

FRAGMENTED = 0.05  # of K/V memory that no request can have
QUOTED = ("live", "internal", "external")


def fragmentation(evidence: Evidence) -> Verdict:
    """C12: shares of K/V memory under a trace, static slots of every policy beside pages.

    It rests on slots of the full context, which are the report's, for the share that is live, and
    on all policies for the share that is lost between slots.
    """
    rows = [r for r in evidence.every if r.get("live_share") is not None]
    policies: dict[str, list[Row]] = {}
    for row in (r for r in rows if r["strategy"] == "static"):
        policies.setdefault(str(row["slot_policy"]), []).append(row)
    paged = [r for r in rows if r["strategy"] == "paged"]
    if "max" not in policies or not paged:
        return undecided("experiment=waste")
    slots = {policy: min(own, key=_live) for policy, own in policies.items()}
    pages = max(paged, key=_live)
    least, most = _live(slots["max"]), _live(pages)
    between = [p for p, r in slots.items() if (r.get("external_share") or 0) >= FRAGMENTED]
    if most <= least:
        verdict, said = REFUTED, "paging wastes no less"
    elif len(between) == len(slots):
        verdict, said = SUPPORTED, "external fragmentation with every slot policy"
    else:
        verdict = CONDITIONAL
        said = f"external fragmentation with {_only(between)}"
    told = "; ".join(f"static slots {policy} {_shares(row)}" for policy, row in slots.items())
    names = " / ".join(SPOKEN[name] for name in QUOTED)
    text = f"{said}; {names}: {told}; pages {_shares(pages)}"
    static = [r for own in policies.values() for r in own]
    return Verdict(verdict, text, (*static, *paged), round(least / most, 3))


def _only(policies: list[str]) -> str:
    return f"slots {' and '.join(policies)} only" if policies else "no slot policy"


def _live(row: Row) -> float:
    return float(row["live_share"])


def _shares(row: Row) -> str:
    shares = (row.get(f"{name}_share") for name in QUOTED)
    return " / ".join("–" if s is None else f"{s:.1%}" for s in shares)
