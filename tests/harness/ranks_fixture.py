"""Small trials on several ranks of the scale model, and what became of their processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness.cell import Cell
from harness.launch import Job, run_job
from harness.validate import compose_settings

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "hardware=scale_model",
    "hardware.capacity=8GiB",
    "model.weights_per_rank=1GiB",
    "context=64K",
    "sweep.contexts=[64K]",
    "sweep.brackets=false",
)
LIMIT_SECONDS = 180


def ranks(count: int, *words: str, **cell: Any) -> Cell:
    """A cell of ``count`` ranks that fills nothing and times nothing unless told."""
    parallel = (f"parallel.ranks={count}", f"parallel.processes={count}")
    settings = compose_settings([*SMALL, *parallel, *words])
    given = {"fill": 0.0, "timing": False} | cell
    return Cell(settings, settings.context_tokens, **given)


def rows_of(cell: Cell, scratch: Path) -> list[dict[str, Any]]:
    """Run one trial; its rows by rank."""
    return run_job(Job([cell]), scratch).rows


def processes_about(path: Path) -> list[str]:
    """Command lines of processes, zombies aside, that name a path."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(path) in line:
                found.append(line)
    return found


def start(command: list[str], cwd: Path) -> subprocess.Popen[str]:
    """Start a command that finds our packages."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
