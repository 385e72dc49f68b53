"""Runs the real command in a process of its own, and reads what it left behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.columns import COLUMNS
from harness.csv_table import parse_field

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 180
# One empty trial that takes a fraction of a second: no torch, no fill, no brackets.
QUICK = (
    "hardware=scale_model",
    "hardware.capacity=8GiB",
    "context=2K",
    "sweep.contexts=[2K]",
    "sweep.brackets=false",
    "trial.timing=false",
    "fill=0",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended, and the folders of runs below its results."""

    code: int
    out: str
    err: str
    results: Path

    @property
    def folders(self) -> list[Path]:
        """Every run's folder, oldest first."""
        return sorted(p.parent for p in self.results.glob("*/*/manifest.json"))

    @property
    def folder(self) -> Path:
        """The only run's folder."""
        (folder,) = self.folders
        return folder


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "harness", *words]


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "COLUMNS": "120"}
    return os.environ | own | more


def run(
    results: Path,
    *words: str,
    cwd: Path | None = None,
    preexec: Callable[[], None] | None = None,
    **variables: str,
) -> Ended:
    """Run the command to its end, in the folder above ``results`` unless told otherwise."""
    if cwd is None:
        results.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command(*words, f"results={results}"),
        cwd=cwd or results.parent,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        preexec_fn=preexec,
    )
    return Ended(done.returncode, done.stdout, done.stderr, results)


def start(
    results: Path, *words: str, preexec: Callable[[], None] | None = None
) -> subprocess.Popen[str]:
    """Start the command and return at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.Popen(
        command(*words, f"results={results}"),
        cwd=results.parent,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=preexec,
    )


def until(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Wait for something to be true, and return it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not happen")


def trial_process(results: Path) -> int | None:
    """The process of the trial in hand, once it writes records."""
    for records in results.glob("*/*/.trial/records.jsonl"):
        for process in processes_of(records.parent) if records.stat().st_size else []:
            return process
    return None


def is_gone(process: int) -> bool:
    """Whether a process has ended, even if nobody has asked how yet."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def processes_of(folder: Path) -> list[int]:
    """Processes that still run a trial of this folder."""
    found = [int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()]
    return [p for p in found if str(folder) in arguments(p) and not is_gone(p)]


def arguments(process: int) -> str:
    """A process's command line; empty once it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def interrupt(process: subprocess.Popen[str]) -> tuple[str, str]:
    process.send_signal(signal.SIGINT)
    return process.communicate(timeout=LIMIT_SECONDS)


def rows(folder: Path) -> list[dict[str, Any]]:
    """``trials.csv`` with numbers as numbers; fails when a column is missing."""
    with open(folder / "trials.csv", newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == COLUMNS
        return [{c: parse_field(c, v) for c, v in row.items()} for row in reader]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_json(path: Path) -> dict[str, Any]:
    loaded = json.loads(path.read_text())
    assert isinstance(loaded, dict)
    return loaded
