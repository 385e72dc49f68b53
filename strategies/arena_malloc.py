"""An arena of one ordinary allocation: the control that shows what mapping itself costs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from strategies.chunked_arena import ChunkedArena

if TYPE_CHECKING:
    import torch


class MallocArena(ChunkedArena):
    """Backed in one piece by ``torch.empty`` at the first commit of anything.

    Nothing is committed before that, everything from then on: ``commit`` is bookkeeping, and
    ``decommit`` gives nothing back before :meth:`close`.

    Parameters
    ----------
    allocate : callable
        ``(phase, allocation, nbytes) -> uint8 tensor``; raises ``OutOfMemory``.
    reserve_bytes : int
        Rounded up to whole chunks.
    chunk_bytes : int
    released : callable
        Called once the tensor is dropped, to empty the allocator's cache.
    """

    kind = "malloc"

    def __init__(
        self,
        allocate: Callable[[str, str, int], torch.Tensor],
        reserve_bytes: int,
        chunk_bytes: int,
        released: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(reserve_bytes, chunk_bytes)
        self._allocate, self._released = allocate, released

    @property
    def u8(self) -> torch.Tensor:
        """uint8 ``[reserved_bytes]``; there is none before the first commit."""
        if self._u8 is None:
            raise RuntimeError("a malloc arena has no bytes before its first commit")
        return self._u8

    def commit(self, lo: int, hi: int, phase: str, allocation: str) -> int:
        """Allocate the whole arena if that is not done; returns the bytes newly committed.

        Raises
        ------
        OutOfMemory
            The allocator refused it.
        """
        if self._u8 is not None or not self._map.missing(lo, hi):
            return 0
        self._u8 = self._allocate(phase, allocation, self.reserved_bytes)
        return self._map.mark([(0, self._map.chunks)], True)

    def decommit(self, lo: int, hi: int) -> int:
        """Give nothing back: one allocation cannot shrink. Returns 0."""
        return 0

    def close(self) -> None:
        """Give everything back; a second call does nothing."""
        if self._u8 is not None:
            self._u8 = None
            self._released()
        self._empty()
