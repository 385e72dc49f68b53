"""A folder for what a process needs while it lives, and the end of those that were left behind.

A process that is killed removes nothing. The next one does, where the kernel says that the owner is
gone: its lock on the folder's file is free.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "kv-alloc-bench-"
OWNED, NEW = "owned", "new"


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process's own below ``TMPDIR``, gone afterwards."""
    _remove_left_behind(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with open(folder / NEW, "wb") as file:
            with contextlib.suppress(OSError):  # a file system without locks: nobody removes it
                fcntl.flock(file, fcntl.LOCK_EX)
                os.rename(folder / NEW, folder / OWNED)  # no other process ever sees it unlocked
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_behind(parent: Path) -> None:
    """Remove this user's folders whose owners are dead; others are left as they are."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            number = os.open(folder / OWNED, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            with open(number, "rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)  # which follows no link
