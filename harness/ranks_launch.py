"""Starting every rank of a trial, keeping them in step, and ending all when one ends badly.

Ranks of this machine are child processes; those of other machines are reached through the harness
that ``torchrun`` started there (:mod:`harness.ranks_relay`). Either way they are handled alike.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from harness.cell import Cell
from harness.folder import Outcome
from harness.launch import POLL_SECONDS, Job, child_environment, kill_trial, prepared
from harness.lock import held_files
from harness.ranks import Place
from harness.ranks_ends import Failure, RankEnd, outcome_of, timed_out
from harness.ranks_group import STORE_HOST
from harness.ranks_pulse import Pulse, make_counters, read_pulse
from harness.rows import Row

# What a rank gets to end by itself once another has crashed; it may be inside a collective.
STOP_GRACE_SECONDS = 10.0
LOST_SECONDS = 30.0  # a rank that has not ended so long after a kill is given up
# How long before the end of a trial's time its ranks are looked at, to see which of them compute.
LOOK_SECONDS = 2.0
Record = dict[str, Any]


class Handle(Protocol):
    """One rank's process, here or on another machine."""

    def records(self) -> list[Record]:
        """Records that came since the last call."""

    def send(self, message: Record) -> None:
        """Tell the rank something; a dead one does not mind."""

    def code(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""

    def kill(self) -> None:
        """End it and every process that it started."""

    def pulse(self) -> Pulse | None:
        """What it does at this moment, without asking it; None where nobody can tell."""

    def log(self) -> str:
        """The end of what it printed."""


class LocalRank:
    """A rank that is a child process.

    Parameters
    ----------
    place : Place
    index : int
        Number of its GPU on this machine.
    store_host : str
        Where rank 0's machine is reached.
    """

    def __init__(self, job: Job, place: Place, index: int, scratch: Path, store_host: str) -> None:
        own = replace(
            job,
            cells=[_cell_of(c, place, index) for c in job.cells],
            extra=job.extra | {"rank": place.rank},
        )
        folder = scratch / f"rank{place.rank}"
        self._counters = folder / "counters"
        team = {
            "place": {k: getattr(place, k) for k in Place.__dataclass_fields__},
            "counters": str(self._counters),
        }
        spec, self._records, self._log = prepared(own, folder, team)
        make_counters(self._counters)
        self._position = 0
        with open(self._log, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", str(spec)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.PIPE,
                start_new_session=True,
                pass_fds=held_files(),
                env=_threads(place.world_size) | child_environment() | _network(store_host),
            )

    def records(self) -> list[Record]:
        """Whole lines that were appended since the last call."""
        with open(self._records, "rb") as source:
            source.seek(self._position)
            data = source.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        found = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return found

    def send(self, message: Record) -> None:
        """Write a line to its standard input."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def code(self) -> int | None:
        """Exit status; None while it runs."""
        return self.process.poll()

    def kill(self) -> None:
        """Kill its process group."""
        kill_trial(self.process)

    def pulse(self) -> Pulse | None:
        """As the kernel and its own counters tell it."""
        return read_pulse(self.process.pid, self._counters)

    def log(self) -> str:
        """The end of its log."""
        return self._log.read_bytes()[-20000:].decode(errors="replace")


def _cell_of(cell: Cell, place: Place, index: int) -> Cell:
    """A rank's own version of a cell: its share of the sequences, its GPU."""
    hardware = replace(cell.settings.hardware, index=index)
    settings = replace(cell.settings, hardware=hardware)
    return replace(cell, settings=settings, context_index=place.context_index)


def _threads(world_size: int) -> dict[str, str]:
    """Ranks of one machine share its cores, as under torchrun, unless the user says otherwise."""
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size))}


def _network(store_host: str) -> dict[str, str]:
    """Ranks of one machine talk through its loopback interface, unless the user chose another."""
    own = {STORE_HOST: store_host}
    if store_host == "127.0.0.1" and sys.platform == "linux":
        own["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    return own


def places(job: Job) -> list[Place]:
    """The places of a job's ranks."""
    parallel = job.cells[0].settings.parallel
    return [
        Place(rank, parallel.processes, parallel.tp, parallel.context_ranks)
        for rank in range(parallel.processes)
    ]


Start = Callable[[Job, Place, Path], Handle]


def start_here(job: Job, place: Place, scratch: Path) -> Handle:
    """Start a rank on this machine, each on a GPU of its own from ``hardware.index`` on."""
    index = job.cells[0].settings.hardware.index + place.rank
    return LocalRank(job, place, index, scratch, "127.0.0.1")


def run_ranks(
    job: Job,
    scratch: Path,
    on_record: Callable[[Row], None] | None = None,
    start: Start = start_here,
) -> Outcome:
    """Run one trial on every rank and wait for the end of all.

    Parameters
    ----------
    start : callable
        Starts one rank.

    Returns
    -------
    Outcome
        A row for every rank of every cell, in order of rank.
    """
    handles: list[Handle] = []
    try:
        for place in places(job):
            handles.append(start(job, place, scratch))
        return Conductor(job, handles, on_record).run()
    except BaseException:  # Ctrl-C: the ranks go first, then we
        for handle in handles:
            handle.kill()
        raise


@dataclass
class Conductor:
    """Follows the ranks of one trial from their start to the end of the last one."""

    job: Job
    handles: Sequence[Handle]
    on_record: Callable[[Row], None] | None = None
    began: float = field(default_factory=time.monotonic)
    failure: Failure | None = None
    kill_at: float | None = None

    def __post_init__(self) -> None:
        self.ends = [RankEnd(rank) for rank in range(len(self.handles))]
        self._joined: dict[str, dict[int, Any]] = {}
        self._killed_at: float | None = None
        self._looked = False

    def run(self) -> Outcome:
        """Until every rank has ended."""
        while any(end.code is None for end in self.ends):
            for end, handle in zip(self.ends, self.handles, strict=True):
                self._follow(end, handle)
            self._watch_time()
            time.sleep(POLL_SECONDS)
        seconds = time.monotonic() - self.began
        return outcome_of(self.job, self.ends, self.failure, seconds)

    def _follow(self, end: RankEnd, handle: Handle) -> None:
        if end.code is not None:
            return
        code = handle.code()  # before the records, so that the last of them are read
        for record in handle.records():
            self._take(end, record)
        if code is None:
            return
        end.code, end.log = code, handle.log()
        missing = len(self.job.cells) - len(end.rows)
        if code or missing:
            self._fail(Failure(end.rank, "crash"))

    def _take(self, end: RankEnd, record: Record) -> None:
        end.records.append(record)
        kind = record["type"]
        if kind in ("stage", "join"):
            end.advance(record)
        if kind == "join":
            self._join(record["stage"], end.rank, record["value"])
        elif kind == "row":
            end.rows.append(record["row"])
            failure = Failure.of(end.rank, record["row"])
            if failure is not None:
                self._fail(failure)
        if end.rank == 0 and self.on_record is not None:
            self.on_record(record)

    def _join(self, stage: str, rank: int, value: Any) -> None:  # noqa: ANN401
        """Release the ranks once the last has come."""
        values = self._joined.setdefault(stage, {})
        values[rank] = value
        if len(values) == len(self.handles):
            everyone = [values[r] for r in range(len(values))]
            for handle in self.handles:
                handle.send({"go": stage, "values": everyone})
            del self._joined[stage]

    def _fail(self, failure: Failure) -> None:
        """Note the first failure; a crash after an orderly one ends the rest at once as well."""
        first = self.failure is None
        if self.failure is None:
            self.failure = failure
        elif self.kill_at is not None or failure.limit is not None:
            return
        if failure.limit is None:
            self.kill_at = time.monotonic() + STOP_GRACE_SECONDS
        if first or failure.limit is None:
            for handle in self.handles:
                handle.send({"stop": {"rank": failure.rank, "limit": failure.limit}})

    def _look(self, running: list[RankEnd]) -> None:
        for end in running:
            pulse = self.handles[end.rank].pulse()
            if pulse is not None:
                end.pulses.append(pulse)

    def _watch_time(self) -> None:
        now = time.monotonic()
        settings = self.job.cells[0].settings
        limit = settings.trial.timeout_seconds
        running = [end for end in self.ends if end.code is None]
        if not self._looked and now - self.began > limit - LOOK_SECONDS:
            self._looked = True
            self._look(running)
        if running and self.kill_at is None and now - self.began > limit:
            self._look(running)
            late = timed_out(running, waiting_sleeps=settings.parallel.backend == "gloo")
            if self.failure is None and late.rank is not None:
                for rank in late.silent:
                    self.handles[rank].kill()
            self._fail(late)
        if self.kill_at is not None and now > self.kill_at:
            for end in running:
                self.handles[end.rank].kill()
            self._killed_at = self._killed_at or now
            if now - self._killed_at > LOST_SECONDS:
                for end in running:
                    end.code = -9
