"""What KV memory is used for, as the PagedAttention paper counts it.

Kwon et al., SOSP 2023, figure 2 and section 3.1: of the committed K/V memory,

* *live* holds tokens;
* *reserved* is given to a sequence and will hold its later tokens;
* *internal* is given to a sequence and will never hold one (the end of a slot, or of a last page);
* *external* (and other) is given to nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.strategy import Strategy

# How figures and verdicts name the parts.
SPOKEN = {
    "live": "holds tokens",
    "reserved": "reserved for later",
    "internal": "internal fragmentation",
    "external": "external and other",
}
NAMES = tuple(SPOKEN)


@dataclass(frozen=True)
class Parts:
    """K/V bytes by their use; the four add up to what is committed."""

    live: float
    reserved: float
    internal: float
    external: float

    @property
    def committed(self) -> float:
        """All of them."""
        return self.live + self.reserved + self.internal + self.external

    def columns(self) -> dict[str, float | None]:
        """``live_share`` … of the committed bytes; None when nothing is committed."""
        whole = self.committed
        return {f"{n}_share": getattr(self, n) / whole if whole else None for n in NAMES}


def parts_of(committed: float, live: float, reserved: float, internal: float) -> Parts:
    """External is what is left of the committed bytes."""
    return Parts(live, reserved, internal, committed - live - reserved - internal)


class Uses:
    """The parts of open sequences, counted as each of them changes.

    Parameters
    ----------
    token_bytes : int
        K/V bytes of a token over all layer groups.
    """

    def __init__(self, strategy: Strategy, token_bytes: int) -> None:
        self.strategy, self.token_bytes = strategy, token_bytes
        self.totals: dict[int, int] = {}  # open sequences and the tokens that they end with
        self.room_tokens = self.resident_tokens = 0  # of all of them
        self._reserved = self._internal = 0
        self._counted: dict[int, tuple[int, int, int]] = {}  # room, total, resident

    def read(self, sequence: int, total_tokens: int) -> None:
        """Count an open sequence as it is now; it will end at so many tokens."""
        self._count(self._counted.get(sequence, (0, 0, 0)), -1)
        room = self.strategy.room_tokens(sequence)
        now = (room, total_tokens, self.strategy.resident_tokens(sequence))
        self._count(now, 1)
        self._counted[sequence], self.totals[sequence] = now, total_tokens

    def closed(self, sequence: int) -> None:
        """Count a sequence no more."""
        self._count(self._counted.pop(sequence), -1)
        del self.totals[sequence]

    @property
    def parts(self) -> Parts:
        """The parts now."""
        held, token = self.strategy.footprint(), self.token_bytes
        return parts_of(
            held.committed_bytes, held.live_bytes, self._reserved * token, self._internal * token
        )

    def _count(self, one: tuple[int, int, int], sign: int) -> None:
        room, total, resident = one
        self.room_tokens += sign * room
        self.resident_tokens += sign * resident
        self._internal += sign * max(0, room - total)
        self._reserved += sign * max(0, min(room, total) - resident)


class Means:
    """Means of the parts over time."""

    def __init__(self) -> None:
        self.steps = 0
        self._sums = dict.fromkeys(NAMES, 0.0)

    def add(self, parts: Parts, steps: int, growth: float = 0.0) -> None:
        """Count ``steps`` steps that begin with ``parts``.

        Parameters
        ----------
        growth : float
            Bytes that turn from reserved into live with each step.
        """
        self.steps += steps
        for name in NAMES:
            self._sums[name] += getattr(parts, name) * steps
        grown = growth * steps * (steps - 1) / 2
        self._sums["live"] += grown
        self._sums["reserved"] -= grown

    def parts(self) -> Parts | None:
        """The means; None before the first step."""
        if not self.steps:
            return None
        return Parts(**{n: total / self.steps for n, total in self._sums.items()})
