"""The ledger of a trial: every change of memory by name, checked against the device's meters.

At each event the meters are read, not polled: the ledger's own sum, torch's, NVML's with the
driver's, or on the host the resident bytes of the scale model's mappings. What the device holds
and neither the ledger nor torch's allocator (reserved less requested: it takes large buffers from
the driver in steps of 2 MiB, small ones in blocks of 20 MiB, and keeps what is left of them) can
name is ``unexplained_bytes``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness.sizes import MIB
from strategies.device import Device
from strategies.strategy import Strategy


class Ledger:
    """Told of every allocation (:class:`strategies.device.Observer`) and of every phase's end.

    Parameters
    ----------
    emit : callable
        Takes each timeline row, a dictionary.
    """

    def __init__(self, emit: Callable[[dict[str, Any]], None]) -> None:
        self._emit = emit
        self._began = time.perf_counter()
        self.device: Device | None = None
        self.strategy: Strategy | None = None
        self.resident_tokens = 0
        self.bytes: dict[tuple[str, str], int] = {}
        self.phase_peak_bytes: dict[str, int] = {}
        self._lent_bytes = 0  # at the last event
        self.peak_ledger_bytes = 0
        self.peak_device_bytes = 0
        self.peak_torch_bytes = 0
        self.unexplained_bytes = 0
        self.unexplained_phase = ""

    @property
    def total_bytes(self) -> int:
        """Bytes that the ledger can name now."""
        return sum(self.bytes.values())

    def event(self, phase: str, allocation: str, nbytes: int, seconds: float = 0.0) -> None:
        """``nbytes`` more (negative: fewer) are held under this name; reads every meter."""
        key = (phase, allocation)
        self.bytes[key] = self.bytes.get(key, 0) + nbytes
        self.peak_ledger_bytes = max(self.peak_ledger_bytes, self.total_bytes)
        held = sum(n for (p, _), n in self.bytes.items() if p == phase)
        self.phase_peak_bytes[phase] = max(self.phase_peak_bytes.get(phase, 0), held)
        row: dict[str, Any] = {
            "seconds": round(time.perf_counter() - self._began, 6),
            "phase": phase,
            "allocation": allocation,
            "event_bytes": nbytes,
            "event_seconds": round(seconds, 6),
            "ledger_bytes": self.total_bytes,
            "resident_tokens": self.resident_tokens,
        }
        if self.strategy is not None:
            row["kv_committed_bytes"] = self.strategy.footprint().committed_bytes
        if self.device is not None:
            row |= self._read(phase)
        self._emit(row)

    def driver_took(self, name: str) -> None:
        """The driver took memory for a CUDA graph or a stream: only the meter knows how much."""
        assert self.device is not None
        self.event("decode", name, max(0, lent_bytes(self.device) - self._lent_bytes))

    def note(self, phase: str, what: str) -> None:
        """Read the meters at a moment when nothing was allocated."""
        self.event(phase, what, 0)

    def _read(self, phase: str) -> dict[str, Any]:
        assert self.device is not None
        used, meters = self.device.used_bytes(), self.device.meters()
        self._lent_bytes = used - _cached_bytes(meters)
        self.peak_device_bytes = max(self.peak_device_bytes, used)
        self.peak_torch_bytes = max(
            self.peak_torch_bytes, meters.get("torch_peak_reserved_bytes", 0)
        )
        off = self._lent_bytes - self.total_bytes
        if abs(off) > abs(self.unexplained_bytes):
            self.unexplained_bytes, self.unexplained_phase = off, phase
        return {
            "device_used_bytes": used,
            "device_free_bytes": self.device.free_bytes(),
            **{k: v for k, v in meters.items() if k != "torch_peak_reserved_bytes"},
        }


def lent_bytes(device: Device) -> int:
    """Bytes in use on the device, without what torch keeps for itself."""
    return device.used_bytes() - _cached_bytes(device.meters())


def _cached_bytes(meters: dict[str, int]) -> int:
    return meters.get("torch_reserved_bytes", 0) - meters.get("torch_requested_bytes", 0)


def tolerance_bytes(kind: str, chunk_bytes: int) -> int:
    """How far meters and ledger may differ: one chunk, at least 64 MiB (host: 1 MiB)."""
    return max(chunk_bytes, MIB if kind == "host" else 64 * MIB)
