"""One harness a device at a time: two would measure each other.

A lock lives as long as any process that has its file open: the processes of trials are given it
(:func:`held_files`), so that nobody measures beside one that outlives a killed harness for the
seconds in which the driver takes its memory back.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO

from harness.hardware import Hardware
from harness.sizes import printable

LOCK_DIR = Path("/tmp")
_held_files: list[int] = []


class Busy(RuntimeError):
    """Another harness is measuring on this device."""


@contextmanager
def device_lock(*devices: Hardware) -> Iterator[None]:
    """Hold devices, by their UUIDs, for the time of a run.

    The kernel frees them when we have died, and the trial in hand with us. The scale model on the
    host needs none: its figures of speed are not compared.

    Raises
    ------
    Busy
        When another process holds one; names its pid.
    """
    by_uuid = {h.uuid: h for h in devices if h.kind == "cuda"}
    with ExitStack() as held:
        for uuid in sorted(by_uuid):
            held.enter_context(_held(by_uuid[uuid]))
        yield


@contextmanager
def _held(hardware: Hardware) -> Iterator[None]:
    path = lock_path(hardware.uuid)
    try:
        file, writable = _opened(path)
    except OSError as error:
        raise Busy(f"{path}: cannot be locked ({error.strerror})") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = printable(file.read(40)) or "unknown"
            raise Busy(
                f"{hardware.device_name} ({hardware.uuid}) is being measured by process {holder}; "
                "wait for it, or choose another hardware.index"
            ) from None
        if writable:
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        _held_files.append(file.fileno())
        try:
            yield
        finally:
            _held_files.remove(file.fileno())


def held_files() -> tuple[int, ...]:
    """Descriptors of the locks that this process holds, for ``pass_fds`` of a trial's process."""
    return tuple(_held_files)


def _opened(path: Path) -> tuple[TextIO, bool]:
    """The lock file, and whether it is ours to write; another user's can be locked all the same."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except PermissionError:
        return open(path, encoding="utf-8", errors="replace"), False
    return open(number, "r+", encoding="utf-8", errors="replace"), True


def lock_path(uuid: str) -> Path:
    """The lock file of a device.

    Not in the run's folder, since runs may write anywhere, nor in TMPDIR, which a cluster sets for
    each job: two jobs on one GPU must meet.
    """
    safe = "".join(c for c in uuid if c.isalnum() or c == "-") or "unknown"
    return LOCK_DIR / f"kv-alloc-bench-{safe}.lock"
