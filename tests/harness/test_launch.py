"""What becomes of a trial's process and of its folder, seen by who started it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from harness import launch
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
