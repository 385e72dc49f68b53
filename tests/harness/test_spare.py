"""A process that is ready before its trial is known: same rows, same ends, no orphan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness.cell import Cell
from harness.launch import Job, child_environment, run_job
from harness.spare import Spare
from harness.validate import compose_settings
from tests.harness.command import is_gone, until
from tests.harness.ranks_fixture import SMALL

HARNESS = """
import time
from harness.launch import child_environment
from harness.spare import Spare
spare = Spare()
spare.prepare(child_environment())
print(spare.process.pid, flush=True)
time.sleep(100)
"""


@pytest.fixture
def spare():
    made = Spare()
    made.prepare(child_environment())
    yield made
    made.close()


def job(*words: str) -> Job:
    settings = compose_settings(["strategy=static", *SMALL, *words])
    return Job([Cell(settings, settings.context_tokens, timing=False)])


def test_the_ready_process_runs_the_trial_and_the_next_is_made_ready(spare, tmp_path: Path):
    first = spare.process
    (row,) = run_job(job(), tmp_path, spare=spare).rows
    assert row["status"] == "ok" and row["resident_tokens"] == 64_000
    assert first.poll() == 0, "it ran the trial, and no other process"
    assert spare.process is not first and spare.process.poll() is None


def test_what_it_prints_is_in_the_trials_log(spare, tmp_path: Path):
    outcome = run_job(job("fault.kind=exception", "fault.phase=pool"), tmp_path, spare=spare)
    assert outcome.rows[0]["status"] == "crash"
    assert "Traceback" in outcome.log


def test_its_death_is_the_trials(spare, tmp_path: Path):
    (row,) = run_job(job("fault.kind=segfault", "fault.phase=pool"), tmp_path, spare=spare).rows
    assert (row["status"], row["signal"]) == ("crash", "SIGSEGV")


def test_a_dead_spare_is_not_missed(spare, tmp_path: Path):
    spare.process.kill()
    spare.process.wait()
    (row,) = run_job(job(), tmp_path, spare=spare).rows
    assert row["status"] == "ok"


def test_close_ends_the_waiting_process(spare):
    process = spare.process
    spare.close()
    assert process.poll() == 0 and spare.process is None


def test_it_dies_with_the_harness():
    harness = subprocess.Popen([sys.executable, "-c", HARNESS], stdout=subprocess.PIPE, text=True)
    assert harness.stdout is not None
    waiting = int(harness.stdout.readline())
    assert not is_gone(waiting)
    harness.kill()
    harness.wait()
    assert until(lambda: is_gone(waiting))
