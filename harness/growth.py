"""What growing cost: the events that committed memory, their bytes, and how long each stalled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Growth:
    """``seconds`` is the whole fill, writing included; a stall is one growing ``extend``."""

    seconds: float = 0.0
    bytes: int = 0
    stalls_us: list[float] = field(default_factory=list)

    def add(self, nbytes: int, seconds: float) -> None:
        """An ``extend`` that committed ``nbytes``."""
        self.bytes += nbytes
        self.stalls_us.append(seconds * 1e6)

    def columns(self) -> dict[str, Any]:
        """``fill_seconds`` and ``grow_*`` of a row."""
        stalls = sorted(self.stalls_us)
        row: dict[str, Any] = {
            "fill_seconds": round(self.seconds, 4),
            "grow_events": len(stalls),
        }
        if stalls:
            row |= {
                "grow_stall_us_p50": stalls[len(stalls) // 2],
                "grow_stall_us_p99": stalls[min(len(stalls) - 1, len(stalls) * 99 // 100)],
                "grow_bytes_per_second": self.bytes / (sum(stalls) / 1e6),
            }
        return row
