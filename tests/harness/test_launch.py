"""What becomes of a trial's process and of its folder, seen by who started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from harness import launch, oom_killer
from harness.cell import Cell
from harness.folder import FolderError
from harness.launch import Job, kill_trial, run_job
from harness.lock import Busy
from tests.harness.command import is_gone, processes_of, until
from tests.harness.composed import made


def job(*words):
    own = made("context=2K", "hardware.capacity=8GiB", *words)
    return Job([Cell(own, 2_000, purpose="bracket", timing=False)])


def test_a_folder_that_is_taken_away_ends_the_trial_and_is_said(tmp_path):
    scratch = tmp_path / ".trial"

    def taken_away(record):
        shutil.rmtree(scratch)

    with pytest.raises(FolderError, match="cannot be read"):
        run_job(job("fault.kind=hang", "fault.phase=pool"), scratch, taken_away)
    until(lambda: not processes_of(scratch), seconds=30)


NOISE = "FutureWarning: something is deprecated\n"


@pytest.mark.parametrize(
    ("code", "log", "rank", "signal", "error"),
    [
        (-9, NOISE, 1, "SIGKILL", "rank 1 was killed by signal 9 (SIGKILL)"),
        (-11, NOISE, None, "SIGSEGV", "killed by signal 11 (SIGSEGV)"),
        (-35, NOISE, 0, "SIG35", "rank 0 was killed by signal 35 (SIG35)"),
        (
            -6,
            "terminate called\n  what():  no route\n",
            2,
            "SIGABRT",
            "rank 2 was killed by signal 6 (SIGABRT): no route",
        ),
        (1, NOISE + "ImportError: no torch\n", 1, None, "ImportError: no torch"),
    ],
)
def test_what_a_signal_ended_says_so(code, log, rank, signal, error):
    ended = launch.how_it_ended(job(), code, False, [], log, rank)
    assert (ended["status"], ended.get("signal"), ended["error"]) == ("crash", signal, error)


def test_what_a_trial_said_itself_goes_before_its_log():
    said = [{"type": "error", "error": "RuntimeError: mine"}]
    assert launch.how_it_ended(job(), 1, False, said, NOISE)["error"] == "RuntimeError: mine"


def test_the_host_s_memory_is_named_where_its_killer_struck(monkeypatch):
    monkeypatch.setattr(launch, "oom_kills", lambda: 4)
    ended = launch.how_it_ended(job(), -9, False, [{"type": "began", "oom_kills": 3}], NOISE, 1)
    assert ended["status"] == "oom_host"
    assert ended["error"] == (
        "rank 1 was killed by signal 9 (SIGKILL), as the host ran out of memory"
    )


@pytest.mark.parametrize(
    ("groups", "counter", "kills"),
    [
        ("0::/job/7\n", "groups/job/7/memory.events", 2),
        ("4:memory:/job/7\n0::/\n", "groups/memory/job/7/memory.oom_control", 2),
        ("0::/of/the/host\n", "groups/memory.events", 2),
        ("4:cpu,cpuacct:/job\n", "nowhere", 9),
        (None, "nowhere", 9),
    ],
)
def test_kills_are_counted_in_the_own_group_where_there_is_one(
    tmp_path, monkeypatch, groups, counter, kills
):
    for name in ("OWN_GROUPS", "GROUPS", "MACHINE"):
        monkeypatch.setattr(oom_killer, name, tmp_path / name.partition("_")[0].lower())
    assert oom_killer.oom_kills() is None
    (tmp_path / "machine").write_text("pgfault 4\noom_kill 9\n")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    (tmp_path / counter).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / counter).write_text("under_oom 0\noom_kill_disable 0\noom_kill 2\n")
    assert oom_killer.oom_kills() == kills


def test_a_trial_ends_with_what_it_started():
    program = "import subprocess, sys; subprocess.Popen(['sleep', '600']); print('on'); input()"
    process = subprocess.Popen(
        [sys.executable, "-uc", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout.readline() == b"on\n"
    kill_trial(process)
    assert process.returncode == -9
    assert process.stdout.read() == b""  # nobody is left that could write
    kill_trial(process)  # once more does no harm


def test_a_process_that_cannot_be_ended_is_said_and_nothing_is_run_beside_it(monkeypatch):
    monkeypatch.setattr(launch, "KILL_GRACE_SECONDS", 0.05)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setattr(os, "killpg", lambda number, signal: None)
    with pytest.raises(Busy, match=f"process {process.pid} .* has not ended"):
        kill_trial(process)
    process.kill()
    process.communicate()
    assert is_gone(process.pid)
