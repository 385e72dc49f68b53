"""What growing cost: the steps into new chunks, their bytes, and how long each stalled."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from strategies.strategy import Strategy


@dataclass
class Growth:
    """Stalls of a workload.

    An event is an ``extend`` into chunks that no sequence used before, whether it mapped them,
    waited for the thread that did, or found them ready: so that growth variants are compared over
    the same steps. ``seconds`` is the whole fill, writing included.
    """

    seconds: float = 0.0
    bytes: int = 0
    stalls_us: list[float] = field(default_factory=list)

    def extend(self, strategy: Strategy, sequence: int, tokens: int) -> float:
        """Make room for ``tokens`` more tokens; returns the seconds of it, 0 where nothing grew.

        Raises
        ------
        OutOfMemory, Refused
            As the strategy does; no event then.
        """
        before = strategy.grown_bytes
        began = time.perf_counter()
        strategy.extend(sequence, tokens)
        seconds = time.perf_counter() - began
        grown = strategy.grown_bytes - before
        if not grown:
            return 0.0
        self.bytes += grown
        self.stalls_us.append(seconds * 1e6)
        return seconds

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
