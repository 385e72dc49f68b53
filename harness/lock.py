"""One harness a device at a time: two would measure each other."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from harness.hardware import Hardware


class Busy(RuntimeError):
    """Another harness is measuring on this device."""


@contextmanager
def device_lock(hardware: Hardware) -> Iterator[None]:
    """Hold the device, by its UUID, for the time of a run; the kernel frees it when we die.

    The scale model on the host needs none: its figures of speed are not compared.

    Raises
    ------
    Busy
        When another process holds it; names its pid.
    """
    if hardware.kind != "cuda":
        yield
        return
    path = lock_path(hardware.uuid)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Busy(
                f"{hardware.device_name} ({hardware.uuid}) is being measured by process {holder}; "
                "wait for it, or choose another hardware.index"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def lock_path(uuid: str) -> Path:
    """The lock file of a device; not in the run's folder, since runs may write anywhere."""
    safe = "".join(c for c in uuid if c.isalnum() or c == "-") or "unknown"
    return Path(tempfile.gettempdir()) / f"kv-alloc-bench-{safe}.lock"
