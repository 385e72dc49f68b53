"""Being a user who owns nothing, for files, in one thread: other tests run beside it."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

NOBODY = 65534


@contextmanager
def somebody_else() -> Iterator[None]:
    """Have the kernel judge this thread's files as nobody's; ``seteuid`` would change them all."""
    libc = ctypes.CDLL(None)
    libc.setfsgid(NOBODY)
    libc.setfsuid(NOBODY)
    try:
        yield
    finally:
        libc.setfsuid(0)
        libc.setfsgid(0)
