"""What the arenas share: a reserved range of whole chunks, some of which are backed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from strategies.chunk_map import ChunkMap

if TYPE_CHECKING:
    import torch


class ChunkedArena(ABC):
    """An arena (:class:`strategies.device.Arena`) whose chunks a map keeps count of.

    Parameters
    ----------
    reserve_bytes : int
        Rounded up to whole chunks.
    chunk_bytes : int
        A multiple of ``unit_bytes``, below which the memory behind the arena cannot be divided.
    """

    kind: str
    fresh_is_zero = False

    def __init__(self, reserve_bytes: int, chunk_bytes: int, unit_bytes: int = 1) -> None:
        if chunk_bytes % unit_bytes:
            raise ValueError(f"chunk_bytes={chunk_bytes}: must be a multiple of {unit_bytes}")
        self._map = ChunkMap(reserve_bytes, chunk_bytes)
        self._u8: torch.Tensor | None = None

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space."""
        return self._map.reserved_bytes

    @property
    def committed_bytes(self) -> int:
        """Bytes of chunks that are committed."""
        return self._map.backed_bytes

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""
        return self._map.chunk_bytes

    @property
    @abstractmethod
    def u8(self) -> torch.Tensor:
        """uint8 ``[reserved_bytes]``; only committed parts may be touched."""

    def zero(self, lo: int, hi: int) -> None:
        """Fill committed bytes [lo, hi) with zeros, on torch's current stream."""
        self.u8[lo:hi].zero_()

    def _empty(self) -> None:
        """Reserve nothing any more."""
        self._u8 = None
        self._map = ChunkMap(0, self.chunk_bytes)
