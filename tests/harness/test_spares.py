"""A process that is ready before its trial is known: same rows, same ends, no orphan."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import harness.spares
from harness.cell import Cell
from harness.launch import Job, child_environment, run_job
from harness.spares import Spares
from harness.validate import compose_settings
from tests.harness.command import is_gone, until
from tests.harness.ranks_fixture import LIMIT_SECONDS, SMALL

HARNESS = """
import time
from harness.launch import child_environment
from harness.spares import Spares
spares = Spares(1)
spares.prepare(child_environment())
print(spares.waiting[0].pid, flush=True)
time.sleep(100)
"""


@pytest.fixture
def spares():
    made = Spares(1)
    made.prepare(child_environment())
    yield made
    made.close()


def job(*words: str) -> Job:
    settings = compose_settings(["strategy=static", *SMALL, *words])
    return Job([Cell(settings, settings.context_tokens, timing=False)])


def test_the_ready_process_runs_the_trial_and_the_next_is_made_ready(spares, tmp_path: Path):
    first = spares.waiting[0]
    (row,) = run_job(job(), tmp_path, spares=spares).rows
    assert row["status"] == "ok" and row["resident_tokens"] == 64_000
    assert first.poll() == 0, "it ran the trial, and no other process"
    assert spares.waiting[0] is not first and spares.waiting[0].poll() is None


def test_what_it_prints_is_in_the_trials_log(spares, tmp_path: Path):
    outcome = run_job(job("fault.kind=exception", "fault.phase=pool"), tmp_path, spares=spares)
    assert outcome.rows[0]["status"] == "crash"
    assert "Traceback" in outcome.log


def test_its_death_is_the_trials(spares, tmp_path: Path):
    (row,) = run_job(job("fault.kind=segfault", "fault.phase=pool"), tmp_path, spares=spares).rows
    assert (row["status"], row["signal"]) == ("crash", "SIGSEGV")


def test_a_dead_spare_is_not_missed(spares, tmp_path: Path):
    spares.waiting[0].kill()
    spares.waiting[0].wait()
    (row,) = run_job(job(), tmp_path, spares=spares).rows
    assert row["status"] == "ok"


def test_one_that_is_dying_is_not_taken_for_the_trial(tmp_path: Path):
    """It hears nothing any more, and has not ended yet."""
    made = Spares(1)
    deaf = [
        sys.executable,
        "-c",
        "import os, time; os.close(0); print(flush=True); time.sleep(600)",
    ]
    process = subprocess.Popen(deaf, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    made.waiting.append(process)
    assert process.stdout is not None
    process.stdout.read(1)
    assert made.take(tmp_path / "spec.json") is None
    assert process.poll() is not None


def test_close_ends_the_waiting_process(spares, monkeypatch):
    monkeypatch.setattr(harness.spares, "CLOSE_SECONDS", LIMIT_SECONDS)  # it is importing still
    process = spares.waiting[0]
    spares.close()
    assert process.poll() == 0 and not spares.waiting


def test_it_dies_with_the_harness():
    harness = subprocess.Popen([sys.executable, "-c", HARNESS], stdout=subprocess.PIPE, text=True)
    assert harness.stdout is not None
    waiting = int(harness.stdout.readline())
    assert not is_gone(waiting)
    harness.kill()
    harness.wait()
    assert until(lambda: is_gone(waiting))
