"""Starting a trial's process, waiting for it, and turning whatever became of it into rows."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.cell import Cell
from harness.folder import FolderError, Outcome
from harness.lock import Busy, held_files
from harness.oom_killer import oom_kills
from harness.rows import Row, identity
from harness.sizes import printable
from harness.spares import Spares

# A killed process gives 140 GiB of a GPU back before it is gone.
KILL_GRACE_SECONDS = 60.0
POLL_SECONDS = 0.02
ERROR_TEXT_CHARS = 500
THROWN = re.compile(r"^ *what\(\): +(.+)$", re.MULTILINE)  # C++, before it aborts


@dataclass
class Job:
    """Cells that one process runs, and the columns that the run adds to their rows."""

    cells: list[Cell]
    extra: Row = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What progress shows."""
        cell = self.cells[-1]
        return f"{cell.settings.strategy} {cell.context_tokens:,}"


def run_job(
    job: Job,
    scratch: Path,
    on_record: Callable[[Row], None] | None = None,
    spares: Spares | None = None,
) -> Outcome:
    """Run one trial in a fresh process and wait for its end, its timeout, or an interrupt.

    Parameters
    ----------
    scratch : Path
        Folder for the spec, the records and the log; emptied by the caller when the rows are safe.
    on_record : callable, optional
        Told of each record as it arrives, for progress.
    spares : Spares, optional
        A process that is ready takes the trial, and others are made ready beside it.

    Raises
    ------
    FolderError
        When the scratch folder cannot be written, or is taken away.
    Busy
        When the trial's process cannot be ended.
    """
    if job.cells[0].real:
        from harness.engines.launch import run_engine

        return run_engine(job, scratch, on_record, spares.engines if spares else None)
    parallel = job.cells[0].settings.parallel
    if parallel.planned:
        from harness.ranks_planned import planned_outcome

        return planned_outcome(job)
    if parallel.backend:
        from harness.ranks_relay import run_everywhere

        return run_everywhere(job, scratch, on_record)
    spec, records, log = prepared(job, scratch)
    began = time.monotonic()
    process = (spares.take(spec) if spares else None) or _started(spec, log)
    if spares:
        spares.prepare(child_environment())
    try:
        timed_out = _wait(process, job, records, on_record, began)
        return _outcome(job, process.returncode, timed_out, records, log, time.monotonic() - began)
    except OSError as error:
        raise FolderError(f"{scratch}: cannot be read ({error.strerror})") from None


def _started(spec: Path, log: Path) -> subprocess.Popen[bytes]:
    with open(log, "wb") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "harness.worker", str(spec)],
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=held_files(),
            env=child_environment(),
        )


def prepared(job: Job, scratch: Path, team: Row | None = None) -> tuple[Path, Path, Path]:
    """The trial's spec, written, and its records and log, empty; ``team`` is a rank's place."""
    spec, records, log = (scratch / n for n in ("spec.json", "records.jsonl", "log.txt"))
    content = {
        "parent": os.getpid(),
        "records": str(records),
        "log": str(log),
        "extra": job.extra,
        "cells": [c.to_json() for c in job.cells],
        "team": team,
    }
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        spec.write_text(json.dumps(content))
        records.write_text("")
        log.write_text("")
    except OSError as error:
        raise FolderError(f"{scratch}: cannot be written ({error.strerror})") from None
    return spec, records, log


def child_environment() -> dict[str, str]:
    """The trial's environment: modules are found as they were found here.

    Idle OpenMP threads sleep instead of spinning: on a busy two-core machine spinning makes the
    scale model's steps twenty times slower.
    """
    paths = [p for p in sys.path if p]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return {"OMP_WAIT_POLICY": "PASSIVE"} | os.environ | own


def _wait(
    process: subprocess.Popen[bytes],
    job: Job,
    records: Path,
    on_record: Callable[[Row], None] | None,
    began: float,
) -> bool:
    """Follow the records until the process ends; True when it had to be killed for its time."""
    limit = job.cells[0].settings.trial.timeout_seconds
    position = 0
    try:
        while process.poll() is None:
            if time.monotonic() - began > limit:
                kill_trial(process)
                return True
            time.sleep(POLL_SECONDS)
            position = _follow(records, position, on_record)
    except BaseException:  # Ctrl-C: the trial goes first, then we
        kill_trial(process)
        raise
    return False


def _follow(records: Path, position: int, on_record: Callable[[Row], None] | None) -> int:
    if on_record is None or records.stat().st_size == position:
        return position
    with open(records, "rb") as source:
        source.seek(position)
        for line in source:
            if not line.endswith(b"\n"):
                break
            position += len(line)
            on_record(json.loads(line))
    return position


def kill_trial(process: subprocess.Popen[bytes]) -> None:
    """End the trial and every process that it started.

    Raises
    ------
    Busy
        It does not end: whatever came next would be measured beside it.
    """
    try:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(KILL_GRACE_SECONDS)
    except ProcessLookupError:
        return
    except subprocess.TimeoutExpired:
        raise Busy(
            f"process {process.pid} of a trial was killed {KILL_GRACE_SECONDS:g} s ago and has not "
            "ended; the same command resumes this run once it is gone"
        ) from None


def _outcome(
    job: Job, code: int, timed_out: bool, records: Path, log: Path, seconds: float
) -> Outcome:
    found = _read_records(records)
    text = log.read_bytes()[-20000:].decode(errors="replace")
    rows = [r["row"] for r in found if r["type"] == "row"]
    done = {r["trial_id"] for r in rows}
    missing = [c for c in job.cells if c.trial_id not in done]
    if missing:
        ended = how_it_ended(job, code, timed_out, found, text)
        last: Row = next((r["row"] for r in reversed(found) if r["type"] == "timeline"), {})
        rows += [unfinished(c, job.extra, ended, last, seconds) for c in missing]
    return Outcome(
        rows,
        [r["row"] for r in found if r["type"] == "timeline"],
        [{k: v for k, v in r.items() if k != "type"} for r in found if r["type"] == "sample"],
        text,
    )


def _read_records(records: Path) -> list[dict[str, Any]]:
    """Every whole record; a killed trial may leave half of one."""
    out = []
    for line in records.read_bytes().split(b"\n")[:-1]:
        try:
            out.append(json.loads(line))
        except ValueError:
            continue
    return out


def how_it_ended(
    job: Job,
    code: int,
    timed_out: bool,
    found: list[dict[str, Any]],
    text: str,
    rank: int | None = None,
) -> Row:
    """Status, signal and error of a trial that left no row; ``rank``: the one that ended so."""
    if timed_out:
        limit = job.cells[0].settings.trial.timeout_seconds
        return {"status": "timeout", "error": f"killed after {limit:g} s"}
    errors = [r["error"] for r in found if r["type"] == "error"]
    return died(code, _killed_for_memory(found), errors[-1] if errors else "", text, rank)


def died(code: int, for_memory: bool, said: str, log: str, rank: int | None = None) -> Row:
    """Status, signal and error of a process that ended with ``code`` and left no result.

    Parameters
    ----------
    code : int
        As the operating system gives it: -9 for SIGKILL.
    for_memory : bool
        Whether the host's OOM killer struck while it ran.
    said : str
        Its own error; else the last line of ``log`` stands for it.
    """
    ended: Row = {"status": "crash", "error": None}
    if code < 0:
        ended["signal"] = signal_name(-code)
        killed = f"killed by signal {-code} ({ended['signal']})"
        ended["error"] = killed if rank is None else f"rank {rank} was {killed}"
        if -code == signal.SIGKILL and for_memory:
            ended["status"] = "oom_host"
            ended["error"] += ", as the host ran out of memory"
    # The last words of a process that a signal ended are of something else, unless it gave up.
    if not said and (code >= 0 or -code == signal.SIGABRT):
        thrown = THROWN.findall(log)
        said = thrown[-1] if code < 0 and thrown else log.strip().rpartition("\n")[2]
    if said:
        said = printable(said)[-ERROR_TEXT_CHARS:]
        ended["error"] = f"{ended['error']}: {said}" if ended["error"] else said
    return ended


def signal_name(number: int) -> str:
    """``SIGKILL``; ``SIG35`` for one without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _killed_for_memory(found: list[dict[str, Any]]) -> bool:
    """Whether the kernel's OOM killer struck since the trial began (cgroup v2's own counter)."""
    before = next((r["oom_kills"] for r in found if r["type"] == "began"), None)
    now = oom_kills()
    return before is not None and now is not None and now > before


def unfinished(cell: Cell, extra: Row, ended: Row, last: Row, seconds: float) -> Row:
    """A row for a cell whose process died: how, and the last that its ledger said."""
    row = identity(cell, extra) | ended
    row["wall_seconds"] = round(seconds, 3)
    row["resident_tokens"] = last.get("resident_tokens")
    row["peak_ledger_bytes"] = last.get("ledger_bytes")
    row["peak_device_bytes"] = last.get("device_used_bytes")
    row["kv_committed_bytes"] = last.get("kv_committed_bytes")
    row["oom_phase"] = last.get("phase")
    return row
