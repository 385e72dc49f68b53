"""Processes made ready for the trials to come, while one runs.

Importing torch takes longer than many a trial lasts. A spare has done it and waits for its spec; it
has not touched the GPU, and every trial still has a process of its own. On few cores the import
would slow the trial that is being measured, so there is none.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from harness.engines.keepers import Keepers
from harness.lock import held_files
from harness.settings import Settings

LEAST_CORES = 8
COUNT = 2
CLOSE_SECONDS = 10.0


def spares_for(settings: list[Settings]) -> Spares | None:
    """Spares where they pay and disturb nothing: a GPU, and a host with cores to spare."""
    on_gpu = any(not s.on_host and not s.parallel.backend for s in settings)
    return Spares() if on_gpu and (os.cpu_count() or 1) >= LEAST_CORES else None


class Spares:
    """Waiting processes, the oldest first; they die with the harness, as a trial does."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self.waiting: list[subprocess.Popen[bytes]] = []
        self.engines = Keepers()

    def prepare(self, environment: dict[str, str]) -> None:
        """Start what is missing: processes that import what a trial needs and wait."""
        while len(self.waiting) < self.count:
            self.waiting.append(
                subprocess.Popen(
                    [sys.executable, "-m", "harness.worker", "--wait", str(os.getpid())],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    pass_fds=held_files(),
                    env=environment,
                )
            )

    def take(self, spec: Path) -> subprocess.Popen[bytes] | None:
        """Give the spec to a waiting process; None when there is none that lives."""
        while self.waiting:
            process = self.waiting.pop(0)
            assert process.stdin is not None
            try:
                process.stdin.write(f"{spec}\n".encode())
                process.stdin.close()
            except OSError:  # it died, and took the spec along unread
                process.kill()
                process.wait()
            if process.poll() is None:
                return process
        return None

    def close(self) -> None:
        """End the waiting processes: they read the end of their input."""
        self.engines.close()
        while self.waiting:
            process = self.waiting.pop()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
