"""Churn: sequences of mixed lengths open, grow and close, seeded.

What is lost to fragmentation, and does memory come back?

Occupancy follows a triangular wave between ``LOW`` and 1 of what the strategy can hold, so that
memory is filled, and then drained by closing sequences at random, several times. The last operation
closes everything.

A clock of decode steps tells how long that would have been: what a sequence is opened with is its
prompt, what it grows by it has generated, and in a step every open sequence generates a token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from harness.admission import longest_admissible
from harness.growth import Growth
from harness.shares import Means, Parts, Uses
from strategies.errors import OutOfMemory, Refused
from strategies.strategy import Strategy

WAVES = 4
LOW = 0.15
FIRST_SHARE = 0.5  # of its length that a sequence is opened with; the rest comes in steps
GROWTH_STEPS = 4


@dataclass
class Admissible:
    """How long a sequence could be admitted, beside the memory that no sequence holds."""

    longest_tokens: list[int] = field(default_factory=list)
    of_free: list[float] = field(default_factory=list)

    def add(self, longest_tokens: int, free_tokens: int, limit_tokens: int) -> None:
        """Note a moment at which at least one token is free."""
        self.longest_tokens.append(longest_tokens)
        self.of_free.append(longest_tokens / min(free_tokens, limit_tokens))


class Churn:
    """Opens, grows and closes.

    Parameters
    ----------
    strategy : Strategy
        Started, with nothing open.
    token_bytes : int
        K/V bytes of a token over all layer groups.
    capacity_bytes : int
        K/V bytes that the strategy can have committed at most.
    lengths : list of int
        A length for each operation; tokens.
    context_tokens : int
        The longest sequence that the strategy was made for.
    seed : int
    observe : callable
        Called with this object about ``observations`` times.
    """

    def __init__(
        self,
        strategy: Strategy,
        token_bytes: int,
        capacity_bytes: int,
        lengths: list[int],
        context_tokens: int,
        seed: int,
        observe: Callable[[Churn], None] = lambda churn: None,
        observations: int = 200,
    ) -> None:
        self.strategy, self.token_bytes = strategy, token_bytes
        self.capacity_bytes, self.lengths = capacity_bytes, lengths
        self.context_tokens = context_tokens
        self.means, self.growth, self.admissible = Means(), Growth(), Admissible()
        self.opened = self.refused = self.refused_while_free = self.cut_short = 0
        self.operation = self.peak_open = 0
        self.decode_steps = 0.0
        self._uses = Uses(strategy, token_bytes)
        self._open_operations = 0
        self._chance = random.Random(f"churn/{seed}")
        self._observe, self._every = observe, max(1, len(lengths) // observations)

    def run(self) -> None:
        """Every operation, then close what is open."""
        for operation, tokens in enumerate(self.lengths):
            self.operation = operation
            if self._held_bytes() < self._wanted_share() * self.capacity_bytes:
                self._open(tokens)
            else:
                self._close_one()
            self._grow_some()
            self._count()
        while self.totals:
            self._close_one()
        self.operation = len(self.lengths)
        self._observe(self)

    @property
    def totals(self) -> dict[int, int]:
        """Open sequences and the tokens that they end with."""
        return self._uses.totals

    @property
    def resident_tokens(self) -> int:
        """Tokens of all open sequences."""
        return self._uses.resident_tokens

    @property
    def mean_open(self) -> float:
        """Sequences that were open at once, over the operations."""
        return self._open_operations / max(1, len(self.lengths))

    @property
    def parts(self) -> Parts:
        """K/V bytes by their use, now."""
        return self._uses.parts

    def free_tokens(self) -> int:
        """Tokens that would fit if every byte that no sequence was given could be used."""
        return max(0, self.capacity_bytes - self._held_bytes()) // self.token_bytes

    def longest_tokens(self) -> int:
        """The longest sequence that would be admitted now."""
        return longest_admissible(self.strategy, self.context_tokens)

    def _wanted_share(self) -> float:
        position = self.operation / len(self.lengths) * WAVES % 1.0
        return LOW + (1 - LOW) * (1 - abs(2 * position - 1)) * 1.05

    def _held_bytes(self) -> int:
        """Bytes that sequences were given, used or not."""
        return self._uses.room_tokens * self.token_bytes

    def _open(self, tokens: int) -> None:
        tokens = min(tokens, self.context_tokens)
        if not self.strategy.can_admit(tokens):
            self.refused += 1
            self.refused_while_free += tokens <= self.free_tokens()
            self._close_one()
            return
        sequence = self.operation
        self.strategy.open(sequence, tokens)
        self._uses.read(sequence, tokens)
        self.opened += 1
        self.peak_open = max(self.peak_open, len(self.totals))
        self._extend(sequence, max(1, math.floor(tokens * FIRST_SHARE)))

    def _grow_some(self) -> None:
        """One open sequence that is not whole yet grows by a step."""
        if not self.totals:
            return
        sequence = self._chance.choice(tuple(self.totals))
        total = self.totals[sequence]
        lacking = total - self.strategy.resident_tokens(sequence)
        if lacking:
            tokens = min(lacking, -(-total // (2 * GROWTH_STEPS)))
            self.decode_steps += tokens / len(self.totals)
            self._extend(sequence, tokens)

    def _extend(self, sequence: int, tokens: int) -> None:
        """Grow; a sequence that finds no memory ends there."""
        try:
            self.growth.extend(self.strategy, sequence, tokens)
            self._uses.read(sequence, self.totals[sequence])
        except (OutOfMemory, Refused):
            self.cut_short += 1
            self._close(sequence)

    def _close_one(self) -> None:
        if self.totals:
            self._close(self._chance.choice(tuple(self.totals)))

    def _close(self, sequence: int) -> None:
        self.strategy.close(sequence)
        self._uses.closed(sequence)

    def _count(self) -> None:
        self.means.add(self.parts, 1)
        self._open_operations += len(self.totals)
        if self.operation % self._every:
            return
        free = self.free_tokens()
        if free:
            self.admissible.add(self.longest_tokens(), free, self.context_tokens)
        self._observe(self)
