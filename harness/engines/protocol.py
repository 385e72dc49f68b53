"""How a start is asked for, and what comes back: one JSON object a line.

A start takes three processes. The harness runs a *keeper* (:mod:`harness.engines.keeper`), which
runs an *adapter* (:mod:`harness.engines.adapters`) by the engine's own Python. Each reads the path
of its spec, a line of standard input, once it is ready. Keeper and adapter append records to one
file, each flushed as it happens, so that a killed start loses nothing.

**Spec of the adapter**; the keeper's has its path, the records and timeout_seconds::

    engine     sglang | vllm
    version    the version that is wanted; another one is not started
    model      folder of the stand-in's config.json
    flags      the engine's own arguments, by its own names
    gpu_uuid   the GPU to read, "" for the first
    records    the file to append to

**Records of the adapter**, each with ``type`` and ``seconds`` since it began, waiting left out::

    began      engine, version, torch, python, nvml_used_bytes (before anything)
               Only for a version that the adapter knows: this line makes a start a real one.
    phase      phase (context, weights, pool, workspace), step, and every meter at its end:
               nvml_used_bytes, device_free_bytes, device_used_bytes (CUDA's total less free),
               torch_allocated_bytes, torch_reserved_bytes, torch_peak_reserved_bytes
    item       phase (weights, tables, pool, workspace), name (as the emulation calls it), bytes
               (all of it), count (of equal tensors), shape, location (device, host, host_pinned),
               how (tensor, parameters, or graph_pools: what the driver and torch's private pools
               hold more than before)
    held       lines: live allocations of torch by source line, largest first
               (where, stack, bytes, count, name)
    ready      nvml_peak_bytes, every meter, pool_tokens, request_limit, max_request_tokens,
               settings
    failed     how (refused: the engine's own rule said no; oom: CUDA did; crash: anything else),
               error_type, message, where (file:line function of the engine), stack, allocation,
               asked_bytes and free_bytes (of the one allocation that failed), every meter

**Record of the keeper**: ``ended`` with code, timed_out, left (processes that the engine had left
behind, killed), oom_kills_before and oom_kills_after (of the machine).

A start is **ok** when it is ``ready``, **refused**, **oom** or **crash** as ``failed`` says,
**timeout** when its time was up, and **crash** with its signal when it died without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]
KINDS = ("began", "phase", "item", "held", "ready", "failed", "ended")
ENDINGS = ("refused", "oom", "crash")
READING = (
    "nvml_used_bytes device_free_bytes device_used_bytes torch_allocated_bytes "
    "torch_reserved_bytes torch_peak_reserved_bytes"
).split()
_TEXT = {
    "began": ("version",),
    "phase": ("phase", "step"),
    "item": ("phase", "name", "location"),
    "failed": ("how", "error_type", "message", "where"),
}
_NUMBERS = {
    "began": ("nvml_used_bytes",),
    "phase": READING,
    "item": ("bytes", "count"),
    "ready": (*READING, "nvml_peak_bytes", "pool_tokens", "request_limit", "max_request_tokens"),
    "ended": ("code",),
}


class BadRecord(ValueError):
    """A record that is not of the protocol: one line."""


@dataclass
class Start:
    """A start, from its records; a part that never came is None or empty."""

    began: Record | None = None
    phases: list[Record] = field(default_factory=list)
    items: list[Record] = field(default_factory=list)
    held: list[Record] = field(default_factory=list)
    ready: Record | None = None
    failed: Record | None = None
    ended: Record | None = None

    def item(self, name: str) -> Record | None:
        """The item of this name."""
        return next((i for i in self.items if i["name"] == name), None)

    def phase(self, name: str) -> Record | None:
        """The last reading of a phase."""
        return next((p for p in reversed(self.phases) if p["phase"] == name), None)

    def phase_bytes(self, *phases: str) -> int:
        """Device bytes of the items of some phases."""
        own = [i for i in self.items if i["phase"] in phases and i["location"] == "device"]
        return sum(i["bytes"] for i in own)


def read_start(path: Path) -> Start:
    """Read a start's records; half of a last line, as a kill leaves it, is left out.

    Raises
    ------
    BadRecord
        For a line that is no record of the protocol.
    """
    found = Start()
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, 1):
        record = checked(line, number)
        kind = record["type"]
        if kind in ("phase", "item"):
            getattr(found, f"{kind}s").append(record)
        elif kind == "held":
            found.held = record["lines"]
        else:
            setattr(found, kind, record)
    return found


def checked(line: bytes, number: int) -> Record:
    """One record, with every field of its kind; raises :class:`BadRecord`."""
    try:
        record = json.loads(line)
    except ValueError:
        raise BadRecord(f"record {number}: not JSON") from None
    kind = record.get("type") if isinstance(record, dict) else None
    if kind not in KINDS:
        raise BadRecord(f"record {number}: type={kind}; allowed: {', '.join(KINDS)}")
    for name in _TEXT.get(kind, ()):
        if not isinstance(record.get(name), str):
            raise BadRecord(f"record {number}: {kind}.{name} is no text")
    for name in _NUMBERS.get(kind, ()):
        value = record.get(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise BadRecord(f"record {number}: {kind}.{name} is no whole number")
    if kind == "held" and not isinstance(record.get("lines"), list):
        raise BadRecord(f"record {number}: held.lines is no list")
    if kind == "failed" and record["how"] not in ENDINGS:
        raise BadRecord(f"record {number}: failed.how={record['how']}")
    out: Record = record
    return out
