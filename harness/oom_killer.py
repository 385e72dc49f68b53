"""Whether the kernel killed a process of ours for host memory: its own counters, not a guess."""

from __future__ import annotations

from pathlib import Path

COUNTERS = ("/sys/fs/cgroup/memory.events", "/proc/vmstat")


def oom_kills() -> int | None:
    """Processes killed for memory so far, in this control group or machine; None when unknown."""
    for counter in COUNTERS:
        try:
            text = Path(counter).read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None
