"""Check of a folder's OOM points: is each closed, did both ends run twice, and alike."""

from __future__ import annotations

import pandas as pd

from harness.check_numbers import grain_bytes
from harness.check_rules import Result, failed, not_applicable, passed
from harness.ranks_summary import held_tokens
from harness.runs import Run, lookup, trials
from harness.sources import Sources, arms_of
from harness.summary import filled
from harness.tabular import tokens

POINTS = ("startup", "admit", "resident")
BRACKET_WIDTH = 0.001
ENGINE_BRACKET_WIDTH = 0.0205  # a start takes a minute: two, 1 % below and above the planner's


def brackets(run: Run) -> Result:
    """Check that every bracket is closed, and each end ran twice (:func:`found_of`)."""
    sources = Sources(run.rows)
    found = _found(run, sources)
    if faults := [f"{arm} {point}: {w}" for (arm, point), wrong in found.items() for w in wrong]:
        return failed("; ".join(faults[:3]))
    if not found:
        return not_applicable("no bracket with two ends")
    text = f"{len(found)} brackets closed, both ends ran twice and agree"
    if len(_with_engines(run)):
        text += ", or are an engine's, and lie within 2 %"
    if both_ways := sum(_granted_once(run, sources, *where) for where in found):
        text += f"; the upper end of {both_ways} was also granted once"
    return passed(text)


def found_of(run: Run) -> dict[tuple[str, str], list[str]]:
    """What is wrong with each bracket of two ends, by arm and point; nothing where it is sound.

    The lower end of start-up and of admission was ok each time. The upper one failed: once is
    enough, since the driver may grant within a few MiB of the end what it refuses the next time.
    What a sequence held is what each trial held that was to find it, and its context started each
    time. Where engines themselves were started, the ends of start-up run once, and lie within 2 %;
    so do those of their emulations.
    """
    return _found(run, Sources(run.rows))


def _found(run: Run, sources: Sources) -> dict[tuple[str, str], list[str]]:
    found: dict[tuple[str, str], list[str]] = {}
    engines = _with_engines(run)
    for name, own in arms_of(trials(run.rows)).items():
        ends = own[own["purpose"] == "bracket"]
        if ends.empty:
            continue
        once = bool(ends["run_id"].isin(engines).all())
        one = lookup(run.summary, "strategies", name)
        for point in POINTS[:1] if once else POINTS:
            ok, bad = lookup(one, point, "ok"), lookup(one, point, "not_ok")
            if not isinstance(ok, (int, float)) or not isinstance(bad, (int, float)):
                continue
            chunk = (grain_bytes(own) / own["kv_bytes_per_token"]).max()
            allowed = ENGINE_BRACKET_WIDTH if once else BRACKET_WIDTH
            width = max(chunk if chunk > 0 else 0, allowed * ok) + 1
            if point == "resident":
                never = lookup(one, "startup", "not_ok")
                faults = _held(sources, name, ok, width, never or float("inf"))
            else:
                faults = _asked(sources, name, point, (ok, bad), own, 1 if once else 2)
            if bad - ok > width:
                faults.append(f"{tokens(ok)} to {tokens(bad)} is not closed")
            found[name, point] = faults
    return found


def _asked(
    sources: Sources,
    name: str,
    point: str,
    ends: tuple[float, float],
    own: pd.DataFrame,
    least: int,
) -> list[str]:
    """Faults of the trials that asked for a context at either end."""
    faults = []
    for end in ends:
        times = int((own["context_tokens"] == end).sum())
        if times < least:
            faults.append(f"{tokens(end)} ran {times} times")
        elif end == ends[0] and sources.end(name, point, end, False):
            faults.append(f"{tokens(end)} ended both ways")
    return faults


def _held(sources: Sources, name: str, ok: float, width: float, never_tokens: float) -> list[str]:
    """Faults of the trials that filled a sequence to its end.

    ``never_tokens`` is the smallest context that does not start: what was held there is no end.
    """
    tried = [
        row
        for row in sources.arms.get(name, [])
        if row["purpose"] == "resident" and int(row["context_tokens"]) < never_tokens
    ]
    held = [held_tokens(row) for row in tried if filled(row)]
    if len(held) < 2:
        return [f"{tokens(ok)} ran {len(held)} times"]
    faults = [f"{tokens(n)} in one trial, {tokens(ok)} in another" for n in held if ok - n > width]
    for context in sorted({int(row["context_tokens"]) for row in tried}):
        if sources.end(name, "startup", context, False):
            faults.append(f"{tokens(context)}, where it was filled, did not start each time")
    return faults


def _granted_once(run: Run, sources: Sources, name: str, point: str) -> bool:
    bad = lookup(run.summary, "strategies", name, point, "not_ok")
    return point != "resident" and bool(sources.end(name, point, bad, True))


def _with_engines(run: Run) -> set[str]:
    """Runs, by id, in which an engine itself was started."""
    return set(run.rows.loc[run.rows["engine_version"] != "", "run_id"])
