"""One run over the processes that ``torchrun`` started, on one machine or many.

``torchrun ... -m harness ...`` starts the same command once a rank. Rank 0 is the run: it decides,
writes the folder and prints. The others start a trial's rank when rank 0 says so and pass on what
it says, through torch's own store; they never talk to each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.cell import cell_from_json
from harness.folder import Outcome
from harness.hardware import Hardware, seen_gpu
from harness.launch import Job
from harness.lock import device_lock
from harness.ranks import Launched, Place, launched
from harness.ranks_launch import Handle, LocalRank, Record, run_ranks, start_here
from harness.ranks_meeting import RENDEZVOUS, long_wait_is_said, meet
from harness.ranks_peers import Beat, Peers
from harness.ranks_pulse import Pulse
from harness.rows import Row
from harness.scratch import scratch_folder
from harness.settings import Settings

RELAY_SECONDS = 0.05
END_SECONDS = 30.0
LOST = 1  # exit status of a rank whose harness is gone
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class World:
    """The processes that a launcher started, and the store through which they talk."""

    def __init__(self, here: Launched) -> None:
        self.here = here
        self.local: LocalRank | None = None
        self.beat: Beat | None = None
        with long_wait_is_said(here):
            self.store = meet(here)
            if here.rank:
                self.beat = Beat(self.store, here.rank, self._pulse)
            else:
                self.peers = Peers(self.store, range(1, here.world_size), RENDEZVOUS)
        self._jobs = [0] * here.world_size

    def _pulse(self) -> Pulse | None:
        local = self.local
        return None if local is None else local.pulse()

    @property
    def store_host(self) -> str:
        """Where rank 0's machine is reached."""
        host = os.environ["MASTER_ADDR"]
        return "127.0.0.1" if host in LOOPBACK else host

    def tell(self, key: str, message: Record | list[Record]) -> None:
        """Leave a message for one reader."""
        self.store.set(key, json.dumps(message))

    def hear(self, key: str) -> Any:  # noqa: ANN401
        """Take a message when it is there; None when it is not."""
        if not self.store.check([key]):
            return None
        message = json.loads(self.store.get(key))
        self.store.delete_key(key)
        return message

    def start(self, job: Job, place: Place, scratch: Path) -> Handle:
        """Start a rank: rank 0's here, another's by the process that has its number."""
        if place.rank == self.here.rank:
            index = job.cells[0].settings.hardware.index + self.here.local_rank
            return LocalRank(job, place, index, scratch, self.store_host)
        number = self._jobs[place.rank]
        self._jobs[place.rank] += place.rank not in self.peers.lost
        return RemoteRank(self, job, place, number)

    def end(self, code: int) -> None:
        """Let every other process end with this exit status."""
        for rank in range(1, self.here.world_size):
            self.tell(f"start/{rank}/{self._jobs[rank]}", {"end": code})
        until = time.monotonic() + END_SECONDS
        while time.monotonic() < until:  # the store may be this process's: it goes last
            self.peers.look()
            waited = set(range(1, self.here.world_size)) - self.peers.lost
            if not waited or self.store.check([f"ended/{rank}" for rank in waited]):
                return
            time.sleep(RELAY_SECONDS)


class RemoteRank:
    """A rank whose process another harness started."""

    def __init__(self, world: World, job: Job, place: Place, number: int) -> None:
        self._world, self._rank = world, place.rank
        self._name = f"{place.rank}/{number}"
        self._heard = self._told = 0
        self._end: Record | None = None
        if place.rank in world.peers.lost:
            self._lose()
            return
        fields = Place.__dataclass_fields__
        start = {
            "cells": [c.to_json() for c in job.cells],
            "extra": job.extra,
            "place": {k: getattr(place, k) for k in fields},
        }
        world.tell(f"start/{self._name}", start)

    def records(self) -> list[Record]:
        """What it passed on since the last call."""
        out: list[Record] = []
        while (batch := self._world.hear(f"up/{self._name}/{self._heard}")) is not None:
            self._heard += 1
            for record in batch:
                if record["type"] == "exit":
                    self._end = record
                else:
                    out.append(record)
        return out

    def send(self, message: Record) -> None:
        """Pass a message to it."""
        self._world.tell(f"down/{self._name}/{self._told}", message)
        self._told += 1

    def code(self) -> int | None:
        """Exit status, which comes after its last record, or when its harness is gone."""
        peers = self._world.peers
        peers.look()
        if self._end is None and self._rank in peers.lost:
            self.kill()  # should it come back
            self._lose()
        return None if self._end is None else int(self._end["code"])

    def _lose(self) -> None:
        self._end = {"code": LOST, "log": self._world.peers.loss(self._rank)}

    def kill(self) -> None:
        """Ask for its end."""
        self.send({"kill": True})

    def pulse(self) -> Pulse | None:
        """As its harness's last beat told it."""
        return self._world.peers.pulse(self._rank)

    def log(self) -> str:
        """The end of its log, once it has ended."""
        return "" if self._end is None else str(self._end["log"])


def follow(world: World) -> int:
    """Start and relay this process's ranks until rank 0 ends the run; its exit status."""
    from torch.distributed import DistError

    rank, number = world.here.rank, 0
    try:
        with scratch_folder() as scratch:
            while True:
                start = world.hear(f"start/{rank}/{number}")
                if start is None:
                    time.sleep(RELAY_SECONDS)
                elif "end" in start:
                    return int(start["end"])
                else:
                    _relay(world, start, f"{rank}/{number}", scratch)
                    number += 1
    except DistError:
        print(f"harness: rank {rank} ends: rank 0 and its store are gone", file=sys.stderr)
        return 1
    finally:
        with contextlib.suppress(DistError):
            world.tell(f"ended/{rank}", {})  # after Ctrl-C too, or rank 0 would wait for us


def _relay(world: World, start: Record, name: str, scratch: Path) -> None:
    job = Job([cell_from_json(c) for c in start["cells"]], start["extra"])
    index = job.cells[0].settings.hardware.index + world.here.local_rank
    here = LocalRank(job, Place(**start["place"]), index, scratch, world.store_host)
    world.local = here
    heard = told = 0
    try:
        while True:
            code = here.code()
            batch = here.records()
            if code is not None:
                batch.append({"type": "exit", "code": code, "log": here.log()})
            if batch:
                world.tell(f"up/{name}/{told}", batch)
                told += 1
            if code is not None:
                return
            while (message := world.hear(f"down/{name}/{heard}")) is not None:
                heard += 1
                here.kill() if "kill" in message else here.send(message)
            time.sleep(RELAY_SECONDS)
    finally:
        world.local = None
        here.kill()


_world: World | None = None


@contextlib.contextmanager
def joined_world() -> Iterator[World | None]:
    """Join the processes that a launcher started with this one; None when none did."""
    global _world
    here = launched()
    if here is None:
        yield None
        return
    _world = World(here)
    try:
        yield _world
    finally:
        if _world.beat is not None:
            _world.beat.stop()
        _world = None


def run_everywhere(
    job: Job, scratch: Path, on_record: Callable[[Row], None] | None = None
) -> Outcome:
    """Run one trial on every rank, wherever it is."""
    start = start_here if _world is None else _world.start
    return run_ranks(job, scratch, on_record, start)


def run_as(world: World | None, settings: list[Settings], run: Callable[[], int]) -> int:
    """Run the command as rank 0, or serve it as another rank; the exit status of all."""
    if world is None:
        return run()
    if world.here.rank:
        with device_lock(*_devices(settings[0], [world.here.local_rank])):
            return follow(world)
    code = 1
    try:
        code = run()
    finally:
        world.end(code)
    return code


def devices_here(settings: Settings) -> list[Hardware]:
    """The devices that a configuration's ranks take on this machine, for their locks."""
    if settings.parallel.planned:
        return []
    if _world is not None:
        return _devices(settings, [_world.here.local_rank])
    return _devices(settings, range(settings.parallel.processes))


def _devices(settings: Settings, offsets: Iterable[int]) -> list[Hardware]:
    hardware = settings.hardware
    if hardware.kind != "cuda":
        return []
    out = []
    for offset in offsets:
        gpu = seen_gpu(hardware.index + offset)
        if gpu is not None:
            out.append(replace(hardware, index=hardware.index + offset, uuid=gpu.uuid))
    return out
