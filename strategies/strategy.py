"""The one interface of every allocation strategy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kernels.view import View


@dataclass(frozen=True)
class Footprint:
    """Bytes of a strategy: address space, physical memory behind it, bytes that hold tokens."""

    reserved_bytes: int
    committed_bytes: int
    live_bytes: int
    tables_bytes: int


class Strategy(ABC):
    """Decides what is committed, and when. A strategy is sizing x commit x assignment.

    Every method that can run out of memory is all or nothing: when it raises
    :class:`strategies.errors.OutOfMemory` or :class:`strategies.errors.Refused`, the state is as
    it was and the next call works.
    """

    name: str
    # Of all growth so far: bytes of chunks that sequences came to use, mapped for them or ready.
    grown_bytes = 0

    @abstractmethod
    def start(self) -> None:
        """Commit what the strategy commits at start-up: phases ``tables``, then ``pool``."""

    @abstractmethod
    def can_admit(self, tokens: int) -> bool:
        """Whether a request of ``tokens`` tokens would be accepted now."""

    @abstractmethod
    def open(self, sequence: int, max_tokens: int) -> None:
        """Begin a sequence that may grow to ``max_tokens``; raises ``Refused`` when none fits."""

    @abstractmethod
    def extend(self, sequence: int, tokens: int) -> int:
        """Make room for ``tokens`` more tokens; returns the bytes newly committed."""

    @abstractmethod
    def close(self, sequence: int) -> None:
        """End a sequence and take its pages back."""

    @abstractmethod
    def resident_tokens(self, sequence: int) -> int:
        """Tokens that the sequence holds."""

    def room_tokens(self, sequence: int) -> int:
        """Tokens that fit into what the sequence was given: its slot, or its pages so far."""
        return self.resident_tokens(sequence)

    @abstractmethod
    def batch(self, sequences: Sequence[int]) -> list[View]:
        """Show the kernels what to read, a view per layer group."""

    @abstractmethod
    def footprint(self) -> Footprint:
        """Reserved, committed, live and table bytes now."""

    def settle(self) -> None:  # noqa: B027  (most strategies have nothing to wait for)
        """Wait for growth that goes on in the background, before a graph is captured, say."""

    @abstractmethod
    def stop(self) -> None:
        """Give everything back."""
