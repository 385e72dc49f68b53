"""Keepers whose engines load their libraries while another engine is measured.

Every start takes one; where nothing was made ready, it is started then. A waiting engine holds no
memory of the GPU (:mod:`harness.engines.adapters.awaited`), but it does use a core.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from harness.cell import Cell
from harness.engines.keeper import REAP_SECONDS
from harness.lock import held_files

POLL_SECONDS = 0.05
ADAPTERS = Path(__file__).resolve().parent / "adapters"
# Ours, which would hide the engine's own packages from it.
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


@dataclass
class Keeper:
    """A keeper's process, and the file without a name that it and its engine print to."""

    process: subprocess.Popen[bytes]
    printed: IO[bytes]

    def hand_over(self, spec: Path) -> None:
        """Tell it what to start; whether it still lives, its records say."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.write(f"{spec.resolve()}\n".encode())
            self.process.stdin.close()

    def wait(self, limit_seconds: float) -> None:
        """Wait for its end; it ends the engine in time. It may outlive the wait: :meth:`end` it."""
        deadline = time.monotonic() + limit_seconds + 2 * REAP_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def end(self) -> None:
        """End it and its engine, if they live."""
        if self.process.poll() is None:
            assert self.process.stdin is not None
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(OSError):
                self.process.stdin.close()
            try:
                self.process.wait(2 * REAP_SECONDS)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def text(self, most_bytes: int) -> str:
        """The end of what was printed."""
        size = self.printed.seek(0, os.SEEK_END)
        self.printed.seek(max(0, size - most_bytes))
        found = self.printed.read().decode(errors="replace")
        self.printed.close()
        return found


class Keepers:
    """One waiting keeper for each engine."""

    def __init__(self) -> None:
        self.waiting: dict[tuple[str, str], Keeper] = {}

    def take(self, cell: Cell) -> Keeper:
        """The one that waits for this cell's engine; another is made ready in its place."""
        key = (cell.settings.engine["python"], cell.settings.strategy)
        found = self.waiting.pop(key, None) or keeper_for(cell)
        self.waiting[key] = keeper_for(cell)
        return found

    def close(self) -> None:
        """End those that wait."""
        while self.waiting:
            _, keeper = self.waiting.popitem()
            keeper.end()
            keeper.printed.close()


def keeper_for(cell: Cell) -> Keeper:
    """Start the keeper of a cell's engine."""
    adapter = ADAPTERS / f"start_{cell.settings.strategy}.py"
    printed = tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "harness.engines.keeper", str(os.getpid())),
            *(cell.settings.engine["python"], str(adapter)),
        ],
        stdin=subprocess.PIPE,
        stdout=printed,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=held_files(),
        env=environment(cell),
    )
    return Keeper(process, printed)


def environment(cell: Cell) -> dict[str, str]:
    """The keeper's environment: ours, one GPU of it; the engine is not given our packages."""
    own = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    own |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ADAPTERS.parents[2])}
    index = cell.settings.hardware.index
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if index or len(visible) > 1:
        own["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return own
