"""What a rank does, read from outside: one that hangs, or is stopped, cannot be asked.

A rank counts the collectives that it enters and leaves in a small file that it maps, which costs a
store to memory each; the rest is what the kernel says of its process.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

KINDS = ("", "start of the process group", "all-gather", "all-reduce", "replay of a decode step")
STOPPED = ("T", "t")  # by a signal, by a debugger
_COUNTS = struct.Struct("<QQQ")  # entered, left, and the kind of the one entered last
_ONE = struct.Struct("<Q")


class Counters:
    """A rank's own count of its collectives; in memory alone without a path."""

    def __init__(self, path: Path | None = None) -> None:
        self.entered = self.left = 0
        self._map: Any = bytearray(_COUNTS.size)
        if path is not None:
            with open(path, "r+b") as source:
                self._map = mmap.mmap(source.fileno(), _COUNTS.size)

    def enter(self, kind: str) -> None:
        """The next collective begins, one of ``KINDS``."""
        self.entered += 1
        _ONE.pack_into(self._map, 16, KINDS.index(kind))
        _ONE.pack_into(self._map, 0, self.entered)

    def leave(self) -> None:
        """It has ended."""
        self.left = self.entered
        _ONE.pack_into(self._map, 8, self.left)


def make_counters(path: Path) -> None:
    """Write the file that a rank maps; its blocks exist, so that a full disk hurts no rank."""
    path.write_bytes(bytes(_COUNTS.size))


@dataclass(frozen=True)
class Pulse:
    """A rank at one moment.

    Parameters
    ----------
    at_seconds, cpu_seconds : float
        By its machine's monotonic clock, and what its threads have computed so far.
    state : str
        Of ``/proc/PID/stat``: ``R`` runs, ``S`` sleeps, ``T`` is stopped.
    entered, left : int
        Collectives.
    kind : str
        Of the collective entered last, one of ``KINDS``.
    """

    at_seconds: float
    cpu_seconds: float
    state: str
    entered: int
    left: int
    kind: str

    @property
    def stopped(self) -> bool:
        """Whether it runs no further until a signal or a debugger lets it."""
        return self.state in STOPPED

    @property
    def inside(self) -> bool:
        """Whether it is in a collective."""
        return self.entered > self.left

    def busy_since(self, earlier: Pulse) -> float:
        """Cores that it kept busy since then."""
        seconds = self.at_seconds - earlier.at_seconds
        return (self.cpu_seconds - earlier.cpu_seconds) / seconds if seconds > 0 else 0.0

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary; ``Pulse(**...)`` is its inverse."""
        return asdict(self)


def read_pulse(process: int, counters: Path) -> Pulse | None:
    """The pulse of a process; None where the system does not tell, or it is gone."""
    try:
        stat = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        entered, left, kind = _COUNTS.unpack(counters.read_bytes())
    except (OSError, struct.error):
        return None
    ticks = int(stat[11]) + int(stat[12])  # user and system, of all threads
    seconds = ticks / os.sysconf("SC_CLK_TCK")
    return Pulse(time.monotonic(), seconds, stat[0], entered, left, KINDS[kind])
