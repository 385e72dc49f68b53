"""A trial's process made ready while the trial before it runs.

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

from harness.settings import Settings

LEAST_CORES = 8
CLOSE_SECONDS = 10.0


def spare_for(settings: list[Settings]) -> Spare | None:
    """A spare where it pays and disturbs nothing: a GPU, and a host with cores to spare."""
    on_gpu = any(not s.on_host and not s.parallel.backend for s in settings)
    return Spare() if on_gpu and (os.cpu_count() or 1) >= LEAST_CORES else None


class Spare:
    """At most one waiting process; it dies with the harness, as a trial does."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None

    def prepare(self, environment: dict[str, str]) -> None:
        """Start a process that imports what a trial needs and waits."""
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "harness.worker", "--wait", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                env=environment,
            )

    def take(self, spec: Path) -> subprocess.Popen[bytes] | None:
        """Give the spec to the waiting process; None when there is none, or it died."""
        process, self.process = self.process, None
        if process is None or process.poll() is not None:
            return None
        assert process.stdin is not None
        try:
            process.stdin.write(f"{spec}\n".encode())
            process.stdin.close()
        except OSError:  # it died just now, and took the spec along unread
            process.kill()
            process.wait()
            return None
        return process

    def close(self) -> None:
        """End the waiting process: it reads the end of its input."""
        process, self.process = self.process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
