"""Trials that die, hang, or hide what they hold: each ends in a row that says so."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path

import pytest

from harness.columns import PERFORMANCE
from harness.sizes import MIB
from tests.harness.command import (
    LIMIT_SECONDS,
    QUICK,
    is_gone,
    processes_of,
    read_json,
    rows,
    run,
    start,
    trial_process,
    until,
)
from tests.harness.memory_group import memory_group


def by_fault(ended):
    return {r["fault"].split()[0]: r for r in rows(ended.folder)}


def test_a_trial_s_death_is_its_row(died):
    assert died.code == 0, died.err
    found = by_fault(died)
    for fault, name in (("segfault", "SIGSEGV"), ("kill", "SIGKILL")):
        row = found[fault]
        assert (row["status"], row["signal"]) == ("crash", name)
        assert row["error"] == f"killed by signal {int(signal.Signals[name])} ({name})"
        assert row["oom_phase"] == "pool"  # the last that its ledger said
        assert row["peak_device_bytes"] > 0 and row["predicted_off_by"] is None
        assert not any(row[c] is not None for c in PERFORMANCE)
    assert found["host_oom"]["status"] == "oom_host"
    assert found["host_oom"]["signal"] is None
    for name in ("crash in pool (SIGSEGV)", "crash in pool (SIGKILL)", "oom_host in"):
        assert name in died.out
    assert read_json(died.folder / "manifest.json")["finished_utc"]


def test_a_hidden_allocation_is_named_as_unexplained(died):
    row = by_fault(died)["hidden_allocation"]
    assert row["status"] == "ok"
    hidden = 2 * 2**30 // 192
    assert row["tolerance_bytes"] == MIB < row["unexplained_bytes"]
    assert abs(row["unexplained_bytes"] - hidden) < 64 << 10  # each mapping is whole pages
    assert row["unexplained_phase"] == "workspace"
    assert row["peak_device_bytes"] - row["peak_ledger_bytes"] == row["unexplained_bytes"]
    (line,) = [s for s in died.out.splitlines() if "unexplained" in s]
    assert line.startswith("warning") and "workspace" in line and "10.7 MiB" in line


def test_an_error_of_a_trial_is_a_fault_of_the_harness(failed):
    assert failed.code == 1
    found = by_fault(failed)
    row = found["exception"]
    assert (row["status"], row["signal"]) == ("crash", None)
    assert row["error"] == "RuntimeError: a deliberate fault in phase pool"
    log = failed.folder / "logs" / f"{row['trial_id']}.txt"
    assert "Traceback" in log.read_text()


def test_a_trial_that_hangs_is_killed_when_its_time_is_over(failed):
    row = by_fault(failed)["hang"]
    assert row["status"] == "timeout" and "3 s" in row["error"]
    assert row["wall_seconds"] >= 3
    assert row["oom_phase"] in (None, "context", "weights")  # how far it came before that


@pytest.mark.beside
def test_a_trial_that_the_kernel_kills_for_memory_is_told_and_the_next_one_runs(tmp_path):
    """The real OOM killer, in a group whose memory is less than the pool that static touches."""
    words = [w for w in QUICK if not w.startswith(("context=", "sweep.contexts", "hardware.cap"))]
    large = ("context=3M", "sweep.contexts=[3M]", "hardware.capacity=100GiB")
    results = tmp_path / "runs"
    with memory_group(256 * MIB) as enter:
        process = start(results, "-m", "strategy=static,paged", *words, *large, preexec=enter)
        table = until(lambda: list(results.glob("*/*/trials.csv")))[0]
        until(lambda: table.read_text().count("\n") == 3)
        process.kill()
        process.communicate()
    killed, other = rows(table.parent)
    assert (killed["strategy"], killed["status"]) == ("static", "oom_host")
    assert killed["signal"] == "SIGKILL"
    assert killed["error"] == "killed by signal 9 (SIGKILL), as the host ran out of memory"
    assert (other["strategy"], other["status"]) == ("paged", "ok")


@pytest.mark.beside
def test_a_trial_dies_with_its_harness(tmp_path):
    process = start(tmp_path / "runs", *QUICK, "fault.kind=hang", "fault.phase=pool")
    trial = until(lambda: trial_process(tmp_path / "runs"))
    process.kill()
    process.communicate()
    until(lambda: is_gone(trial), seconds=30)


@pytest.mark.beside
def test_a_trial_that_kills_its_harness_leaves_no_row_and_no_orphan(tmp_path):
    process = start(tmp_path / "runs", *QUICK, "fault.kind=kill_harness", "fault.phase=pool")
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == -signal.SIGKILL
    (folder,) = (p.parent for p in (tmp_path / "runs").glob("*/*/manifest.json"))
    assert not (folder / "trials.csv").exists()
    until(lambda: not processes_of(folder), seconds=30)


@pytest.mark.beside
def test_a_full_disk_is_said_in_one_line_and_the_run_resumed(tmp_path):
    limit = 24 << 10  # bytes of any one file: enough for tables, not for a figure

    def small_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    # A diff of the checkout would not fit into the manifest.
    no_git = {"GIT_DIR": str(tmp_path / "none")}
    ended = run(tmp_path / "runs", *QUICK, preexec=small_files, **no_git)
    assert ended.code == 2
    said = [s for s in ended.err.splitlines() if s.startswith("harness:")]
    assert len(said) == 1 and "File too large" in said[0] and "Traceback" not in ended.err
    (row,) = rows(ended.folder)
    again = start(tmp_path / "runs", *QUICK)
    assert "device" in again.stdout.readline()
    assert again.stdout.readline() == f"results  {ended.folder} (resumed, 1 rows)\n"
    again.kill()
    again.communicate()
    assert rows(ended.folder) == [row]


@pytest.mark.beside
def test_a_disk_that_is_full_from_the_start(tmp_path):
    def no_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    ended = run(tmp_path / "runs", *QUICK, preexec=no_files)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert line.startswith("harness:") and "File too large" in line


@pytest.mark.beside
def test_results_below_a_file_are_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("mine")
    ended = run(tmp_path / "file" / "runs", *QUICK, cwd=tmp_path)
    assert ended.code == 2
    (line,) = ended.err.splitlines()
    assert "results=" in line and "Not a directory" in line
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.beside
def test_a_read_only_folder_is_said_in_one_line(tmp_path):
    """Root may write anywhere but where the kernel itself makes the files."""
    results = Path("/sys/kernel") if os.geteuid() == 0 else tmp_path / "runs"
    if os.geteuid():
        results.mkdir(mode=0o555)
    ended = run(results, *QUICK, cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    (line,) = ended.err.splitlines()
    assert line.startswith(f"harness: results={results}") and "Traceback" not in line
    refusals = (errno.EACCES, errno.EPERM, errno.EROFS)
    assert any(os.strerror(number) in line for number in refusals)
