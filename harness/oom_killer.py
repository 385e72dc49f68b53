"""Whether the kernel killed a process of ours for host memory: its own counters, not a guess."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")
MACHINE = Path("/proc/vmstat")


def oom_kills() -> int | None:
    """Processes killed for memory so far, in this control group or machine; None when unknown.

    The group's own counter comes first: elsewhere on the machine others may die.
    """
    for counter in _counters():
        try:
            text = counter.read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def _counters() -> Iterator[Path]:
    """Files that count, the narrowest first: cgroup v2, v1, then the machine's."""
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield GROUPS / path.strip("/") / "memory.events"
        elif "memory" in controllers.split(","):
            yield GROUPS / "memory" / path.strip("/") / "memory.oom_control"
    yield GROUPS / "memory.events"  # a container's group, whose path is the host's
    yield MACHINE
