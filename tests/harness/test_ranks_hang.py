"""Which rank holds up the rest, and a machine that is gone: without the ranks' own help."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
from torch.distributed import DistNetworkError

from harness import ranks_launch, ranks_peers
from harness.cell import Cell
from harness.launch import Job
from harness.lock import Busy
from harness.ranks import Launched, Place
from harness.ranks_ends import RankEnd, timed_out
from harness.ranks_launch import Conductor, LocalRank
from harness.ranks_peers import Beat, Peers
from harness.ranks_pulse import Counters, Pulse, make_counters, read_pulse
from harness.ranks_relay import World, follow
from harness.validate import compose_settings
from tests.harness.command import until
from tests.harness.ranks_fixture import ROOT, ranks


def test_the_rank_that_the_others_wait_for_is_the_one_that_hangs():
    ends = [RankEnd(rank) for rank in range(3)]
    for end in ends:
        said(end, "stage", "pool")
    for end in (ends[0], ends[2]):
        said(end, "join", "1 ready")
    late = timed_out(ends)
    assert (late.rank, late.status, late.silent) == (1, "timeout", (1,))
    assert late.said == "rank 1 had not answered since pool began"


def test_every_rank_that_has_not_answered_is_named():
    ends = [RankEnd(rank) for rank in range(4)]
    for end in ends:
        said(end, "stage", "nccl")
    for end in (ends[0], ends[2]):
        said(end, "stage", "weights")
    late = timed_out(ends)
    assert (late.rank, late.silent) == (1, (1, 3))
    assert late.said == "ranks 1 and 3 had not answered since communicator began"


def test_none_of_those_that_came_equally_far_is_blamed():
    ends = [RankEnd(rank) for rank in range(3)]
    late = timed_out(ends)
    assert (late.rank, late.silent) == (None, (0, 1, 2))
    assert late.said == "ranks 0, 1 and 2 had not answered since the start"


def test_the_last_rank_that_runs_is_the_one_that_hangs():
    end = RankEnd(2)
    said(end, "stage", "decode")
    assert timed_out([end]).rank == 2


def said(end: RankEnd, kind: str, stage: str) -> None:
    record = {"type": kind, "stage": stage}
    end.records.append(record)
    end.advance(record)


def pulse(entered: int, left: int, state: str = "S", cpu: float = 0.0, at: float = 0.0) -> Pulse:
    return Pulse(at, cpu, state, entered, left, "all-reduce")


def in_decode(*pulses: Pulse) -> list[RankEnd]:
    """Ranks that came equally far by their stages."""
    ends = [RankEnd(rank, pulses=[one]) for rank, one in enumerate(pulses)]
    for end in ends:
        said(end, "stage", "decode")
    return ends


def test_a_rank_that_is_stopped_is_blamed_wherever_it_is():
    late = timed_out(in_decode(pulse(4, 3), pulse(5, 5), pulse(5, 4, "T"), pulse(5, 4, "t")))
    assert (late.rank, late.silent) == (2, (2, 3))
    assert late.said == "ranks 2 and 3 are stopped in decode"


def test_a_rank_that_never_came_to_a_collective_is_named():
    late = timed_out(in_decode(pulse(7, 6), pulse(6, 6), pulse(7, 6)))
    assert (late.rank, late.silent) == (1, (1,))
    assert late.said == (
        "rank 1 had not answered since decode began, "
        "ranks 0 and 2 had come to the all-reduce in decode"
    )


def test_counts_of_collectives_say_nothing_when_a_rank_s_are_unknown():
    ends = in_decode(pulse(7, 6), pulse(6, 6))
    ends[0].pulses.clear()
    assert timed_out(ends).rank is None


@pytest.mark.parametrize(("sleeps", "blamed"), [(True, 1), (False, None)])
def test_one_that_computes_is_told_apart_only_where_waiting_takes_no_cpu(sleeps, blamed):
    ends = in_decode(pulse(7, 6), pulse(7, 6), pulse(7, 6))
    for end, cpu in zip(ends, (0.01, 1.5, 0.0), strict=True):
        end.pulses.append(pulse(7, 6, cpu=cpu, at=2.0))
    late = timed_out(ends, waiting_sleeps=sleeps)
    assert late.rank == blamed
    assert late.silent == ((1,) if sleeps else (0, 1, 2))


class Stuck:
    """A rank that began decode and says no more, until it is killed."""

    def __init__(self) -> None:
        self.left = [{"type": "stage", "stage": "decode"}]
        self.ended: int | None = None

    def records(self) -> list[dict]:
        left, self.left = self.left, []
        return left

    def send(self, message: dict) -> None:
        """It hears nothing."""

    def code(self) -> int | None:
        return self.ended

    def kill(self) -> None:
        self.ended = -9

    def pulse(self) -> Pulse | None:
        return None

    def log(self) -> str:
        return "FutureWarning: something is deprecated"


class Waiting(Stuck):
    """A process that waits in its third all-reduce, or does something else there."""

    def __init__(self, path, then: str = "time.sleep(60)", entered: int = 3) -> None:
        super().__init__()
        make_counters(path)
        code = (
            "import os, signal, sys, time; from pathlib import Path; "
            "from harness.ranks_pulse import Counters; counters = Counters(Path(sys.argv[1]))\n"
            f"for n in range({entered}): counters.leave(); counters.enter('all-reduce')\n"
            f"if {entered} < 3: counters.leave()\n"
            f"print(flush=True)\n{then}"
        )
        command = [sys.executable, "-c", code, str(path)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        self.path = path

    def kill(self) -> None:
        self.process.kill()
        self.ended = self.process.wait()
        self.process.stdout.close()

    def pulse(self) -> Pulse | None:
        return read_pulse(self.process.pid, self.path)


STOPS = "os.kill(os.getpid(), signal.SIGSTOP)"
SPINS = "while True: pass"


def rows_when_late(monkeypatch, handles):
    """Rows of ranks whose trial's time is half a second."""
    monkeypatch.setattr(ranks_launch, "STOP_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(ranks_launch, "LOOK_SECONDS", 0.4)
    counts = (f"parallel.ranks={len(handles)}", f"parallel.processes={len(handles)}")
    words = ("hardware=scale_model", "parallel=context", *counts, "trial.timeout_seconds=0.5")
    return Conductor(Job([Cell(compose_settings(words), 1000)]), handles).run().rows


@pytest.mark.parametrize(
    ("of_rank_1", "blamed", "how"),
    [
        ({"then": STOPS}, 1, "rank 1 is stopped in decode"),
        (
            {"then": SPINS},
            1,
            "rank 1 did not wait in the all-reduce in decode but computed, ranks 0 and 2 slept",
        ),
        (
            {"entered": 2},
            1,
            "rank 1 had not answered since decode began, "
            "ranks 0 and 2 had come to the all-reduce in decode",
        ),
        ({}, None, "ranks 0, 1 and 2 wait for each other in the all-reduce in decode"),
    ],
    ids=["stopped", "spins", "did not come", "all wait"],
)
def test_the_rank_that_holds_up_a_collective(of_rank_1, blamed, how, tmp_path, monkeypatch):
    own = [{}, of_rank_1, {}]
    handles = [Waiting(tmp_path / str(rank), **given) for rank, given in enumerate(own)]
    for handle in handles:
        handle.process.stdout.readline()
    rows = rows_when_late(monkeypatch, handles)
    assert {r["status"] for r in rows} == {"timeout"}
    assert {r.get("failed_rank") for r in rows} == {blamed}
    assert rows[1]["error"] == f"killed after 0.5 s: {how}"


def test_ranks_of_which_nothing_is_known_are_all_named(monkeypatch):
    rows = rows_when_late(monkeypatch, [Stuck() for _ in range(3)])
    assert {r["error"] for r in rows} == {
        "killed after 0.5 s: ranks 0, 1 and 2 had not answered since decode began"
    }
    assert not any(r.get("failed_rank") for r in rows)


def test_a_rank_of_this_machine_is_seen_to_be_stopped(tmp_path):
    rank = LocalRank(
        Job([ranks(2, "fault.kind=hang", "fault.phase=pool")]),
        Place(0, 2),
        0,
        tmp_path,
        "127.0.0.1",
    )
    try:
        until(lambda: "pool" in [r.get("stage") for r in rank.records()])
        assert not rank.pulse().stopped and not rank.pulse().inside
        os.kill(rank.process.pid, signal.SIGSTOP)
        until(lambda: rank.pulse().stopped)
    finally:
        rank.kill()
    assert rank.code() == -9


def test_a_pulse_is_that_of_the_process(tmp_path):
    make_counters(tmp_path / "counters")
    counters = Counters(tmp_path / "counters")
    counters.enter("all-gather")
    one = read_pulse(os.getpid(), tmp_path / "counters")
    assert (one.state, one.entered, one.left, one.kind) == ("R", 1, 0, "all-gather")
    assert one.cpu_seconds == pytest.approx(time.process_time(), abs=0.1)
    counters.leave()
    assert not read_pulse(os.getpid(), tmp_path / "counters").inside
    assert read_pulse(2**30, tmp_path / "counters") is None


class Store(dict):
    """A store in memory, as torch's are."""

    set = dict.__setitem__
    delete_key = dict.pop

    def check(self, keys):
        return all(key in self for key in keys)

    def get(self, key):
        return self[key]

    def wait(self, keys, patience):
        if not self.check(keys):
            raise RuntimeError("wait timeout")


@pytest.fixture
def two_machines(monkeypatch):
    """Rank 0's end of a run on two machines, the store, and the other's beat."""
    monkeypatch.setattr(ranks_peers, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(ranks_peers, "SILENT_SECONDS", 0.5)
    store = Store()
    beat = Beat(store, 1, lambda: pulse(2, 1, "T"))
    world = object.__new__(World)
    world.here, world.store, world._jobs = Launched(0, 2, 0), store, [0, 0]
    world.peers = Peers(store, [1], timedelta(seconds=1))
    yield world, store, beat
    beat.stop()


def test_ranks_of_a_machine_that_is_gone_end_their_trial_and_no_later_one_waits(
    two_machines, monkeypatch
):
    world, store, beat = two_machines
    words = ("hardware=scale_model", "parallel.ranks=2", "parallel.processes=2")
    job = Job([Cell(compose_settings(words), 1000)])
    monkeypatch.setattr(ranks_launch, "STOP_GRACE_SECONDS", 0.0)
    place = Place(1, 2, 2)
    handles = [Stuck(), world.start(job, place, None)]
    beat.stop()
    for waited in (0.4, 0.0):
        began = time.monotonic()
        rows = Conductor(job, handles).run().rows
        assert waited < time.monotonic() - began < waited + 5
        assert [r["status"] for r in rows] == ["crash", "crash"]
        assert {r["failed_rank"] for r in rows} == {1}
        assert rows[1]["error"].startswith("rank 1 is lost: its harness on ")
        handles = [Stuck(), world.start(job, place, None)]
    world.end(1)
    assert json.loads(store["start/1/1"]) == {"end": 1}  # the second trial was never sent to it


def test_a_machine_that_beats_is_not_lost_and_tells_what_its_rank_does(two_machines):
    world, _, _ = two_machines
    end = time.monotonic() + 0.7
    while time.monotonic() < end:
        world.peers.look()
        time.sleep(0.01)
    assert not world.peers.lost
    assert world.peers.pulse(1).stopped


def test_nobody_is_lost_because_rank_0_did_not_listen(two_machines):
    world, _, beat = two_machines
    world.peers.look()
    beat.stop()
    time.sleep(0.7)  # longer than a silence: rank 0 draws figures, or was stopped itself
    world.peers.look()
    assert not world.peers.lost


def test_ranks_that_never_come_are_named():
    with pytest.raises(Busy, match="did not come within 0 s: rank 1, 3"):
        Peers(Store({"beat/2": "{}"}), [1, 2, 3], timedelta(0))


def ends_of_its_own(error):
    """Another rank's end of a run whose store raises an error when it listens; and the store."""

    class Broken(Store):
        def check(self, keys):
            raise error

    world = object.__new__(World)
    world.here, world.store = Launched(1, 2, 0), Broken()
    return world, world.store


def test_rank_0_does_not_wait_for_one_that_was_interrupted():
    world, store = ends_of_its_own(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        follow(world)
    assert "ended/1" in store


def test_a_rank_ends_in_one_line_when_rank_0_is_gone(capsys):
    world, _ = ends_of_its_own(DistNetworkError("Connection reset by peer"))
    assert follow(world) == 1
    assert capsys.readouterr().err == "harness: rank 1 ends: rank 0 and its store are gone\n"
