"""How a trial ended that was not ok: the columns of its row that say so."""

from __future__ import annotations

from harness.rows import Row
from harness.sizes import printable
from strategies.device import Device
from strategies.errors import EngineCrash, OutOfMemory, Refused


def oom_end(refused: OutOfMemory) -> Row:
    """A device, or its budget, refused an allocation."""
    return {
        "status": "oom",
        "oom_phase": refused.phase,
        "oom_allocation": refused.allocation,
        "oom_source": refused.source,
        "oom_requested_bytes": refused.requested_bytes,
        "oom_free_bytes": refused.free_bytes,
        "resident_limited_by": "oom",
    }


def refused_end(refused: Refused, strategy: str) -> Row:
    """The strategy's own rule refused a request, or its own start."""
    return {
        "status": "refused",
        "oom_phase": refused.phase,
        "oom_allocation": refused.allocation,
        "oom_source": strategy,
        "oom_requested_bytes": refused.requested_bytes,
        "oom_free_bytes": refused.free_bytes,
        "resident_limited_by": "refused",
        "error": str(refused),
    }


def crash_end(crash: EngineCrash) -> Row:
    """An emulated engine ended as the engine itself does: by a fault of its own."""
    return {"status": "crash", "oom_phase": "workspace", "error": str(crash)}


def memory_end(error: Exception, phase: str, device: Device | None) -> Row | None:
    """Torch, or the host, had no memory in this phase; None for other errors."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return {"status": "oom_host", "error": printable(error) or "host memory"}
    if type(error).__name__ != "OutOfMemoryError":  # torch's, not imported for its name
        return None
    return {
        "status": "oom",
        "oom_phase": phase,
        "oom_allocation": "torch",
        "oom_source": "torch",
        "oom_free_bytes": device.free_bytes() if device else None,
        "resident_limited_by": "oom",
        "error": printable(error)[:300],
    }
