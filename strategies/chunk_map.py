"""Which chunks of a reserved range are backed: the bookkeeping that every arena shares."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def runs(indices: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Contiguous runs [lo, hi) of an ascending index array."""
    if not len(indices):
        return []
    if indices[-1] - indices[0] + 1 == len(indices):
        return [(int(indices[0]), int(indices[-1]) + 1)]
    cuts = np.flatnonzero(np.diff(indices) != 1)
    starts = np.concatenate(([0], cuts + 1))
    ends = np.concatenate((cuts, [len(indices) - 1]))
    return [(int(indices[a]), int(indices[b]) + 1) for a, b in zip(starts, ends, strict=True)]


class ChunkMap:
    """One flag a chunk.

    Parameters
    ----------
    reserve_bytes : int
        Rounded up to whole chunks.
    chunk_bytes : int
    """

    def __init__(self, reserve_bytes: int, chunk_bytes: int) -> None:
        if chunk_bytes < 1 or reserve_bytes < 0:
            raise ValueError(f"reserve_bytes={reserve_bytes}, chunk_bytes={chunk_bytes}: too small")
        self.chunk_bytes = chunk_bytes
        self.chunks = -(-reserve_bytes // chunk_bytes)
        self.reserved_bytes = self.chunks * chunk_bytes
        self.backed = np.zeros(self.chunks, bool)
        self.backed_chunks = 0

    @property
    def backed_bytes(self) -> int:
        """Physical bytes behind the range."""
        return self.backed_chunks * self.chunk_bytes

    def missing(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """List the runs of chunks that bytes [lo, hi), rounded out, still lack."""
        first, last = self._check(lo, hi)
        first, last = first // self.chunk_bytes, -(-last // self.chunk_bytes)
        return runs(np.flatnonzero(~self.backed[first:last]) + first)

    def inside(self, lo: int, hi: int) -> list[tuple[int, int]]:
        """List the runs of backed chunks that lie wholly inside bytes [lo, hi)."""
        first, last = self._check(lo, hi)
        first, last = -(-first // self.chunk_bytes), last // self.chunk_bytes
        return runs(np.flatnonzero(self.backed[first:last]) + first)

    def mark(self, chunk_runs: list[tuple[int, int]], backed: bool) -> int:
        """Set the flags of runs that all change; returns their bytes."""
        chunks = sum(hi - lo for lo, hi in chunk_runs)
        for lo, hi in chunk_runs:
            self.backed[lo:hi] = backed
        self.backed_chunks += chunks if backed else -chunks
        return chunks * self.chunk_bytes

    def _check(self, lo: int, hi: int) -> tuple[int, int]:
        if not 0 <= lo <= hi <= self.reserved_bytes:
            raise ValueError(f"bytes [{lo}, {hi}) are not inside [0, {self.reserved_bytes})")
        return lo, hi
