"""A control group with little memory, in which the kernel's OOM killer strikes for real."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.harness.command import until

ROOT = Path("/sys/fs/cgroup")
# Where a group is made, what limits its memory, and what keeps it from being swapped out.
KINDS = (
    (ROOT / "memory", "memory.limit_in_bytes", ("memory.memsw.limit_in_bytes", None)),  # v1
    (ROOT, "memory.max", ("memory.swap.max", "0")),  # v2
)


@contextlib.contextmanager
def memory_group(limit_bytes: int) -> Iterator[Callable[[], None]]:
    """Make a group; gives what a process calls to enter it. Skips where none can be made."""
    group, why = None, "no such control groups"
    for parent, limit, (swap, most) in KINDS:
        made = parent / f"kv-alloc-bench-test-{os.getpid()}"
        try:
            if not (parent / "cgroup.procs").exists():
                continue
            made.mkdir()
        except OSError as error:
            why = str(error)
            continue
        try:
            (made / limit).write_text(str(limit_bytes))
            if (made / swap).exists():
                (made / swap).write_text(most or str(limit_bytes))
            group = made
            break
        except OSError as error:
            why = str(error)
            made.rmdir()
    if group is None:
        pytest.skip(f"no control group with a limit of memory can be made here ({why})")
    procs = group / "cgroup.procs"

    def enter() -> None:
        procs.write_text(str(os.getpid()))

    try:
        yield enter
    finally:
        until(lambda: not procs.read_text().strip(), seconds=30)
        group.rmdir()
