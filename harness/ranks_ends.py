"""From what each rank of a trial left behind to its rows, and to the rank that ended it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness.cell import Cell
from harness.folder import Outcome
from harness.launch import Job, how_it_ended, unfinished
from harness.phases import PHASES, phase_name, place_name
from harness.ranks_pulse import Pulse
from harness.ranks_summary import ORDERLY
from harness.rows import Row

ENDED_BY_PEER = "ended by another rank"  # a rank's own word, until the trial's end replaces it
BUSY_CORES, ASLEEP_CORES = 0.2, 0.05  # of a rank that computes, of one that sleeps


@dataclass(frozen=True)
class Failure:
    """How a trial failed first.

    Parameters
    ----------
    rank : int or None
        None when ranks hang and nothing tells them apart.
    status : str
    silent, said : tuple of int, str
        Of a timeout, the ranks that hold up the rest, or all that may; and the same in words.
    limit : int or None
        Resident tokens of the failed rank, to which the others still grow: what a trial holds is
        what its smallest rank holds. None: they end at once.
    """

    rank: int | None
    status: str
    limit: int | None = None
    silent: tuple[int, ...] = ()
    said: str = ""

    @staticmethod
    def of(rank: int, row: Row) -> Failure | None:
        """The failure that a rank's row tells of; None when it is ok or another rank's doing."""
        status = row["status"]
        if status in ("ok", ENDED_BY_PEER):
            return None
        limit = int(row.get("resident_tokens") or 0) if status in ORDERLY else None
        return Failure(rank, status, limit)


@dataclass
class RankEnd:
    """What is known of one rank: its records, its rows, how far it came and how it ended.

    ``pulses`` are those before the end of the trial's time, the last at its end.
    """

    rank: int
    records: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    steps: int = 0
    waiting: bool = False
    pulses: list[Pulse] = field(default_factory=list)
    code: int | None = None
    log: str = ""

    @property
    def phase(self) -> str:
        """The phase that it began last; ``""`` before the first."""
        stages = [r["stage"] for r in reversed(self.records) if r["type"] == "stage"]
        return next((s for s in stages if s in PHASES), "")

    def advance(self, record: dict[str, Any]) -> None:
        """It came to another stage; a rank that joined one waits for the others."""
        self.waiting = record["type"] == "join"
        self.steps += 1


def timed_out(ends: Iterable[RankEnd], waiting_sleeps: bool = False) -> Failure:
    """Of ranks that still run when the time is over: which hold up the rest, as far as it shows.

    A process that is stopped does. Else those that came least far, by their stages, then by their
    collectives, are the ones that the others wait for. Of ranks that all wait in one collective the
    one that computes does not wait; where that does not tell them apart either, none is blamed.

    Parameters
    ----------
    waiting_sleeps : bool
        Whether a rank that waits in a collective takes no time of its CPU: gloo's does not, one
        that waits for its GPU does.
    """
    ends = list(ends)
    stopped = [e for e in ends if e.pulses and e.pulses[-1].stopped]
    if stopped:
        verb = "is" if len(stopped) == 1 else "are"
        return _late(stopped, f"{_names(stopped)} {verb} stopped{_in_phase(stopped)}")
    least = min(map(_progress, ends))
    behind = [e for e in ends if _progress(e) == least]
    if all(e.pulses for e in ends):  # counts of some ranks alone say nothing
        least_entered = min(e.pulses[-1].entered for e in behind)
        there = [e for e in behind if e.pulses[-1].entered > least_entered]
        behind = [e for e in behind if e not in there]
        inside = [e for e in behind if e.pulses[-1].inside]
        if there and not inside:
            return _late(behind, f"{_silence(behind)}, {_names(there)} had come to {_where(there)}")
        if len(behind) > 1 and len(inside) == len(behind):
            return _all_inside(behind, waiting_sleeps)
    named = len(behind) < len(ends) or len(ends) == 1
    return _late(behind, _silence(behind), named)


def _progress(end: RankEnd) -> tuple[int, bool]:
    return end.steps, end.waiting


def _late(silent: list[RankEnd], said: str, named: bool = True) -> Failure:
    ranks = tuple(e.rank for e in silent)
    return Failure(ranks[0] if named else None, "timeout", silent=ranks, said=said)


def _all_inside(ends: list[RankEnd], waiting_sleeps: bool) -> Failure:
    """Of ranks that are all in one collective, those that compute, where waiting takes no CPU."""
    cores = [e.pulses[-1].busy_since(e.pulses[0]) for e in ends]
    busy = [e for e, n in zip(ends, cores, strict=True) if n > BUSY_CORES]
    asleep = [e for e, n in zip(ends, cores, strict=True) if n < ASLEEP_CORES]
    if waiting_sleeps and busy and asleep and len(busy) + len(asleep) == len(ends):
        said = f"{_names(busy)} did not wait in {_where(ends)} but computed, {_names(asleep)} slept"
        return _late(busy, said)
    return _late(ends, f"{_names(ends)} wait for each other in {_where(ends)}", named=False)


def _where(ends: list[RankEnd]) -> str:
    """``the all-reduce in decode``: the collective to which the farthest of them has come."""
    kind = max((e.pulses[-1] for e in ends), key=lambda p: p.entered).kind
    return f"the {kind}{_in_phase(ends)}"


def _names(ends: list[RankEnd]) -> str:
    """``ranks 0, 1 and 2``."""
    *first, last = (str(e.rank) for e in ends)
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def _in_phase(ends: list[RankEnd]) -> str:
    phases = {e.phase for e in ends}
    return f" in {phase_name(phases.pop())}" if len(phases) == 1 and all(phases) else ""


def _silence(silent: list[RankEnd]) -> str:
    """``rank 1 had not answered since pool began``; several in a list."""
    phases = {e.phase for e in silent}
    since = f"{phase_name(phases.pop())} began" if len(phases) == 1 and all(phases) else "the start"
    return f"{_names(silent)} had not answered since {since}"


def outcome_of(job: Job, ends: list[RankEnd], failure: Failure | None, seconds: float) -> Outcome:
    """Rows of every rank, settled among them; timeline and samples with their rank."""
    rows: list[Row] = []
    late = _late_row(job, failure)
    for cell in job.cells:
        own = [_row_of(job, cell, end, failure, late, seconds) for end in ends]
        rows += settle(own, failure, late)
    timeline = [
        r["row"] | {"rank": e.rank} for e in ends for r in e.records if r["type"] == "timeline"
    ]
    samples = [
        {k: v for k, v in r.items() if k != "type"} | {"rank": e.rank}
        for e in ends
        for r in e.records
        if r["type"] == "sample"
    ]
    return Outcome(rows, timeline, samples, "\n".join(e.log for e in ends if e.log))


def _late_row(job: Job, failure: Failure | None) -> Row:
    """What a rank's row says when the trial's time was over; nothing when it was not."""
    if failure is None or failure.status != "timeout":
        return {}
    ended = how_it_ended(job, 0, True, [], "")
    return ended | {"error": f"{ended['error']}: {failure.said}"}


def _row_of(
    job: Job, cell: Cell, end: RankEnd, failure: Failure | None, late: Row, seconds: float
) -> Row:
    """A rank's row of a cell: its own, or what can be said of a rank that left none."""
    for row in end.rows:
        if row["trial_id"] == cell.trial_id:
            return row
    extra = job.extra | {"rank": end.rank}
    last: Row = next((r["row"] for r in reversed(end.records) if r["type"] == "timeline"), {})
    last = last | {"phase": end.phase or None}
    own = failure is not None and failure.rank == end.rank
    if failure is not None and late:
        ended = late if end.rank in failure.silent else {}
    elif own or failure is None or _died_by_itself(end):
        ended = how_it_ended(job, end.code or 0, False, end.records, end.log, end.rank)
    else:
        ended = {}
    return unfinished(cell, extra, ended or {"status": ENDED_BY_PEER}, last, seconds)


def _died_by_itself(end: RankEnd) -> bool:
    """Whether a rank that was not the first to fail failed too, not by our kill."""
    return end.code not in (0, None, -9)


def settle(rows: list[Row], failure: Failure | None, late: Row | None = None) -> list[Row]:
    """One trial's rows by rank: every one says how the trial ended, and which rank ended it.

    A rank that failed keeps its own status and figures; the others get the status of the one that
    ended the trial, without its figures. Of several that ran out of memory while growing, the one
    that holds the least ended it. ``late`` is what rows say of a timeout that no rank is to blame
    for.
    """
    failed = [r for r in rows if r["status"] not in ("ok", ENDED_BY_PEER)]
    if not failed and not any(r["status"] == ENDED_BY_PEER for r in rows):
        return rows
    cause = _cause(failed, failure)
    if cause is None:
        return [r | {"status": "timeout"} | (late or {}) for r in rows]
    held = [int(r["resident_tokens"] or 0) for r in rows]
    out = []
    for row in rows:
        row = row | {"failed_rank": cause["rank"]}
        if row["status"] in ("ok", ENDED_BY_PEER):
            row |= _shared(cause)
        row["resident_tokens_all_ranks"] = min(held) * int(row["context_ranks"])
        out.append(row)
    return out


def _cause(failed: list[Row], failure: Failure | None) -> Row | None:
    """The row of the rank that ended the trial."""
    if failure is not None and failure.limit is None:
        first = [r for r in failed if r["rank"] == failure.rank]
        if first or failure.rank is None:
            return first[0] if first else None
    return min(failed, key=_place_of_failure, default=None)


def _place_of_failure(row: Row) -> tuple[int, int, int, int]:
    """What failed first: by phase, then by tokens held, by what was free, and by rank."""
    phase = row.get("oom_phase")
    at = PHASES.index(phase) if phase in PHASES else len(PHASES)
    held, free = (int(row.get(c) or 0) for c in ("resident_tokens", "oom_free_bytes"))
    return at, held, free, int(row["rank"])


def _shared(cause: Row) -> Row:
    """What a rank's row says when another ended the trial."""
    where = place_name(cause.get("oom_phase"), cause.get("oom_allocation"))
    how = " ".join(str(cause[k]) for k in ("status", "signal") if cause.get(k))
    keep = ("status", "oom_phase", "oom_allocation")
    shared = {k: cause.get(k) for k in keep}
    if cause["status"] in ORDERLY:
        shared["resident_limited_by"] = cause.get("resident_limited_by")
    return shared | {
        "error": f"ended by rank {cause['rank']}: {how}" + (f" in {where}" if where else "")
    }
