"""What a row's prediction is off by: the items, and where a trial ended, what decided it."""

from __future__ import annotations

from harness.phases import SIZED_PHASES
from harness.planner_spec import Prediction
from harness.rows import Row

OFF_BY = 0.01  # a prediction within 1 % of the measurement stands
FAILED = ("oom", "refused")


def off_by(row: Row, made: Prediction) -> list[str]:
    """Name what differs, with the bytes or tokens that it differs by.

    Items count that are off by more than 1 % of the peak. Where the trial ended at an allocation
    as foreseen, that one decides: what it asked for and what was free, and only what is off by 1 %
    of that counts beside it. Where it ended otherwise, both ends are told, and the item that
    differs most, however little: near an edge little decides.
    """
    ended = "ok" if row["status"] == "invalid" else str(row["status"])
    off = _items(row, made, alike=ended == made.outcome)
    peak = max(1, int(row["peak_device_bytes"]))
    if ended != made.outcome:
        named = _above(off, OFF_BY * peak) or sorted(off.items(), key=lambda i: -abs(i[1]))[:1]
        return [*_told(named), _both_ends(row, ended, made)]
    if ended not in FAILED:
        return _told(_above(off, OFF_BY * peak))
    if row.get("oom_phase") == "fill" == made.phase:
        limit = OFF_BY * max(1, int(row["resident_tokens"] or 0))
        held = {"resident_tokens": int(row["resident_tokens"] or 0) - made.resident_tokens}
        return _told(_above(off, OFF_BY * peak)) + _told(_above(held, limit))
    asked = int(row.get("oom_requested_bytes") or 0)
    if row.get("oom_allocation") != made.allocation:
        return [*_told(_above(off, OFF_BY * peak)), _both_ends(row, ended, made)]
    free = int(row.get("oom_free_bytes") or 0)
    decides = {
        f"{made.allocation} asked": asked - made.requested_bytes,
        f"{made.allocation} free": free - made.free_bytes,
    }
    if not asked:  # an engine may refuse without a figure
        decides = {}
    return _told(_above(decides | off, OFF_BY * max(peak, asked)))


def _items(row: Row, made: Prediction, alike: bool) -> dict[str, int]:
    """Bytes of each phase, measured less predicted; of unlike ends, those before the failure."""
    predicted: dict[str, int] = {}
    for item in made.items:
        if item.location == "device":
            held = item.taken_bytes if item.failed else item.nbytes
            predicted[item.phase] = predicted.get(item.phase, 0) + held
    measured = {p: int(row.get(f"{p}_bytes") or 0) for p in SIZED_PHASES}
    if alike:
        predicted["kv"] = made.predicted_kv_bytes
        measured["kv"] = int(row.get("kv_committed_bytes") or 0)
        if row.get("engine_version"):  # an engine keeps no ledger of what its libraries hold
            measured["unexplained"] = int(row.get("unexplained_bytes") or 0)
    else:  # what failed gave back what it had, and nothing came after it
        unfinished = {made.phase if made.outcome != "ok" else "", row.get("oom_phase") or ""}
        measured = {p: n for p, n in measured.items() if p not in unfinished}
    return {p: n - predicted.get(p, 0) for p, n in measured.items()}


def _above(off: dict[str, int], allowed: float) -> list[tuple[str, int]]:
    return [(name, nbytes) for name, nbytes in off.items() if abs(nbytes) > allowed]


def _told(named: list[tuple[str, int]]) -> list[str]:
    return [f"{name} {nbytes:+d}" for name, nbytes in named if nbytes]


def _both_ends(row: Row, ended: str, made: Prediction) -> str:
    """How it was to end and how it did: each with its allocation, what was asked and free."""
    text = f"status {made.outcome}"
    if made.outcome in FAILED:
        text += f" at {made.allocation}, {made.requested_bytes} asked, {made.free_bytes} free"
    if ended in FAILED and row.get("oom_allocation"):
        asked, free = (int(row.get(f"oom_{n}_bytes") or 0) for n in ("requested", "free"))
        text += f", not {ended} at {row['oom_allocation']}, {asked} asked, {free} free"
    return text
