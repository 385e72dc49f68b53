"""A run that was cut off is found again by its content, and loses at most the trial in hand."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.harness.command import (
    LIMIT_SECONDS,
    QUICK,
    environment,
    interrupt,
    is_gone,
    processes_of,
    read_json,
    rows,
    run,
    start,
    table,
    trial_process,
    until,
)

SEVERAL = (*QUICK, "sweep.repeats=6")

# The command, killed as it hears from a trial in hand after two rows; it leaves the trial's number.
KILLED_INSIDE_A_TRIAL = """
import os, signal, sys
from pathlib import Path
from harness import progress
from harness.cli import main
from tests.harness.command import trial_process

rows, results = [], Path(sys.argv[-1].partition("=")[2])

def killed_after_two_rows(self, record):
    trial = trial_process(results) if len(rows) >= 2 else None
    if trial:
        Path("trial").write_text(str(trial))
        os.kill(os.getpid(), signal.SIGKILL)

progress.Progress.row = lambda self, row: rows.append(row)
progress.Progress.record = killed_after_two_rows
main(sys.argv[1:])
"""

# The command, killed the moment its third row is safe: between two trials.
KILLED_AFTER_THREE_ROWS = """
import os, signal, sys
from harness import progress
from harness.cli import main

seen = []

def killed_at_third(self, row):
    seen.append(row)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

progress.Progress.row = killed_at_third
main(sys.argv[1:])
"""


def the_folder(results):
    (folder,) = (p.parent for p in results.glob("*/*/manifest.json"))
    return folder


def measured(folder):
    path = folder / "trials.csv"
    return rows(folder) if path.exists() and path.read_text().count("\n") > 1 else []


def _killed(program, results):
    """Run the command as a program that kills itself."""
    done = subprocess.run(
        [sys.executable, "-c", program, *SEVERAL, f"results={results}"],
        env=environment(),
        cwd=results.parent,
        capture_output=True,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.beside
def test_killed_inside_a_trial_then_resumed(tmp_path):
    results = tmp_path / "runs"
    _killed(KILLED_INSIDE_A_TRIAL, results)
    trial = int((tmp_path / "trial").read_text())
    until(lambda: is_gone(trial), seconds=30)
    folder = the_folder(results)
    before = rows(folder)
    assert 2 <= len(before) < 6
    half = (folder / "trials.csv").read_bytes()
    with open(folder / "trials.csv", "ab") as file:  # a row that the kill cut in two
        file.write(half.splitlines(keepends=True)[-1][:100])
    with open(folder / "timeline.csv", "a") as file:  # an event of a trial without a row
        file.write(f"{folder.name},000000000000,0,0.1,pool,kv_pool,1,0,1,,,,,,,\n")

    ended = run(results, *SEVERAL)
    assert ended.code == 0, ended.err
    assert ended.folder == folder and f"resumed, {len(before)} rows" in ended.out
    after = rows(folder)
    assert after[: len(before)] == before and len(after) == 6
    assert len({r["trial_id"] for r in after}) == 6
    assert {e["trial_id"] for e in table(folder / "timeline.csv")} == {r["trial_id"] for r in after}
    manifest = read_json(folder / "manifest.json")
    assert manifest["finished_utc"] and len(manifest["attempts"]) == 2
    _same_command_again(results, folder)
    _edited_command(results, folder)


@pytest.mark.beside
def test_the_command_as_users_run_it_is_killed_from_outside_and_resumed(tmp_path):
    """Nothing is patched: the second trial hangs, so that the kill surely falls into it."""
    results = tmp_path / "runs"
    words = (*QUICK, "-m", "fault.kind=none,hang", "fault.phase=pool", "trial.timeout_seconds=8")
    process = start(results, *words)
    until(lambda: list(results.glob("*/*/trials.csv")))
    trial = until(lambda: trial_process(results) if measured(the_folder(results)) else None)
    process.kill()
    process.communicate()
    until(lambda: is_gone(trial), seconds=30)
    folder = the_folder(results)
    before = rows(folder)
    assert [r["status"] for r in before] == ["ok"]

    ended = run(results, *words)
    assert ended.folder == folder and "resumed, 1 rows" in ended.out
    after = rows(folder)
    assert after[:1] == before and [r["status"] for r in after] == ["ok", "timeout"]
    assert read_json(folder / "manifest.json")["finished_utc"]


def _contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def _new_folder(results, *words):
    """The folder that a command begins; the command is then killed."""
    old = set(results.glob("*/*/manifest.json"))
    process = start(results, *words)
    new = until(lambda: set(results.glob("*/*/manifest.json")) - old)
    process.kill()
    process.communicate()
    return new.pop().parent


def _same_command_again(results, finished):
    """A finished run is never touched."""
    before = _contents(finished)
    other = _new_folder(results, *SEVERAL)
    assert other != finished and _contents(finished) == before


def _edited_command(results, finished):
    """Another seed is another configuration: neither old folder is its own."""
    before = _contents(finished)
    other = _new_folder(results, *SEVERAL, "seed=1")
    assert other != finished and _contents(finished) == before
    assert len(list(results.glob("*/*/manifest.json"))) == 3


@pytest.mark.beside
def test_killed_between_trials_twice_nothing_is_lost(tmp_path):
    results = tmp_path / "runs"
    counts, ids = [], []
    for _ in range(2):
        _killed(KILLED_AFTER_THREE_ROWS, results)
        found = rows(the_folder(results))
        counts.append(len(found))
        ids.append([r["trial_id"] for r in found])
    assert counts == [3, 6]
    assert ids[1][:3] == ids[0] and len(set(ids[1])) == 6
    assert not (the_folder(results) / ".trial").exists()


@pytest.mark.beside
def test_ctrl_c_leaves_a_readable_folder_that_is_resumed(tmp_path):
    results = tmp_path / "runs"
    words = (
        *QUICK,
        "-m",
        "fault.kind=none,hang",
        "fault.phase=pool",
        f"trial.timeout_seconds={LIMIT_SECONDS}",
    )
    process = start(results, *words)
    until(lambda: results.exists() and len(list(results.glob("*/*/trials.csv"))))
    trial = until(lambda: trial_process(results) if measured(the_folder(results)) else None)
    out, err = interrupt(process)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "harness: interrupted; the same command resumes this run"
    assert "Traceback" not in err and is_gone(trial)
    folder = the_folder(results)
    (row,) = rows(folder)
    assert row["status"] == "ok"
    assert read_json(folder / "summary.json")["strategies"]
    assert read_json(folder / "manifest.json")["finished_utc"] is None

    again = start(results, *words)
    until(lambda: trial_process(results))
    os.kill(again.pid, signal.SIGINT)
    out, _ = again.communicate(timeout=LIMIT_SECONDS)
    assert "resumed, 1 rows" in out
    assert the_folder(results) == folder and rows(folder) == [row]


@pytest.mark.beside
def test_two_harnesses_with_one_command_do_not_share_a_folder(tmp_path):
    results = tmp_path / "runs"
    words = (*QUICK, "fault.kind=hang", "fault.phase=pool")
    both = [start(results, *words) for _ in range(2)]
    until(lambda: len(list(results.glob("*/*/.trial/records.jsonl"))) == 2)
    for process in both:
        process.kill()
        process.communicate()
    folders = {p.parent for p in results.glob("*/*/manifest.json")}
    assert len(folders) == 2
    assert len({read_json(f / "manifest.json")["config_hash"] for f in folders}) == 1
    for folder in folders:
        until(lambda folder=folder: not processes_of(folder), seconds=30)
