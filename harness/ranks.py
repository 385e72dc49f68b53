"""Which rank a process plays: its place among tensor- and context-parallel ranks, and its share.

Rank = tensor index + tensor ranks x context index, so that the ranks that reduce an attention
output follow each other (and sit on one machine when there are several).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from harness.sizes import BadValue


@dataclass(frozen=True)
class Place:
    """One rank of those that run.

    Parameters
    ----------
    rank, world_size : int
        Of the processes that really run.
    tensor_ranks, context_ranks : int
        That the model is shaped for; their product may exceed ``world_size``, and then the ranks
        that do not run are emulated by none.
    """

    rank: int
    world_size: int
    tensor_ranks: int = 1
    context_ranks: int = 1

    @property
    def tensor_index(self) -> int:
        """Which heads this rank has."""
        return self.rank % self.tensor_ranks

    @property
    def context_index(self) -> int:
        """Which pages of each sequence this rank has."""
        return self.rank // self.tensor_ranks % self.context_ranks

    def kv_heads(self, total: int) -> range:
        """Which of a model's KV heads this rank has: its part, or one that other ranks copy."""
        first = self.tensor_index * total // self.tensor_ranks
        return range(first, first + max(1, total // self.tensor_ranks))

    @property
    def tensor_group(self) -> tuple[int, ...]:
        """Running ranks whose attention outputs are reduced with this one's."""
        return tuple(r for r in range(self.world_size) if self._at(r).same_pages(self))

    @property
    def context_group(self) -> tuple[int, ...]:
        """Running ranks whose partial outputs are merged with this one's, by context index."""
        return tuple(r for r in range(self.world_size) if self._at(r).same_heads(self))

    def _at(self, rank: int) -> Place:
        return Place(rank, self.world_size, self.tensor_ranks, self.context_ranks)

    def same_pages(self, other: Place) -> bool:
        """Whether two ranks hold the same tokens (of different heads)."""
        return self.context_index == other.context_index

    def same_heads(self, other: Place) -> bool:
        """Whether two ranks hold the same heads (of different tokens)."""
        return self.tensor_index == other.tensor_index


def share_tokens(tokens: int, page_tokens: int, context_ranks: int, index: int = 0) -> int:
    """Tokens of a sequence that one context-parallel rank keeps.

    Pages are dealt out in turn: page p of the sequence is page ``p // context_ranks`` of rank
    ``p % context_ranks``. So the shares stay equal, to a page, at every length of a sequence that
    grows; contiguous shares would fill one rank after another. Rank 0 never has less than another.
    """
    full, rest = divmod(tokens, page_tokens)
    own = (full - index + context_ranks - 1) // context_ranks * page_tokens
    return own + (rest if full % context_ranks == index else 0)


def all_tokens(local_tokens: int, page_tokens: int, context_ranks: int) -> int:
    """The longest sequence of which rank 0 keeps at most ``local_tokens``."""
    pages, rest = divmod(local_tokens, page_tokens)
    return pages * page_tokens * context_ranks + rest


@dataclass(frozen=True)
class Launched:
    """What a launcher (``torchrun``, ``srun``) says about this process."""

    rank: int
    world_size: int
    local_rank: int


class BadLaunch(BadValue):
    """What a launcher says of a process makes no sense: a matter of its own, not of all ranks."""


def launched(environment: Mapping[str, str] = os.environ) -> Launched | None:
    """Read RANK, WORLD_SIZE and LOCAL_RANK; None when no launcher set them.

    Raises
    ------
    BadLaunch
        When they contradict each other, one is missing, or MASTER_ADDR and MASTER_PORT are no
        address and port.
    """
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name, environment["RANK"] if name == "LOCAL_RANK" else "")
        if not text.isdecimal():
            raise BadLaunch(name, text, "a whole number; RANK and WORLD_SIZE are set together")
        numbers.append(int(text))
    found = Launched(*numbers)
    if not found.world_size:
        raise BadLaunch("WORLD_SIZE", 0, "1 or more")
    if not found.rank < found.world_size:
        raise BadLaunch("RANK", found.rank, f"0 to {found.world_size - 1}, below WORLD_SIZE")
    if not environment.get("MASTER_ADDR"):
        raise BadLaunch("MASTER_ADDR", "", "the address of rank 0's machine, when RANK is set")
    port = environment.get("MASTER_PORT", "")
    if not (port.isdecimal() and len(port) < 6 and 0 < int(port) < 1 << 16):
        raise BadLaunch("MASTER_PORT", port, "a port, 1 to 65535, when RANK is set")
    return found
