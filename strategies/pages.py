"""The page allocator: which pages of an arena are free, and which chunks back them.

Pages are numbered from 0 and lie ``pages_per_chunk`` to a chunk. A chunk is committed when its
first page is handed out; once its last page is back it is *empty* and may be given back
(:meth:`PageAllocator.trim`). All state is a byte a page and a few a chunk, and every operation on
n pages is a handful of numpy calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from strategies.chunk_map import runs
from strategies.device import Arena
from strategies.errors import OutOfMemory
from strategies.model import LayerGroup

Pages = npt.NDArray[np.int64]
PAGE_POLICIES = ("lowest", "committed")
TAKEN_TWICE = "a page that is handed out already was to be handed out again"


@dataclass(frozen=True)
class Grant:
    """Pages that were handed out together, and what was committed for them."""

    pages: Pages
    chunk_runs: tuple[tuple[int, int], ...] = ()
    committed_bytes: int = 0


class PageAllocator:
    """Hands out the pages of one arena.

    Parameters
    ----------
    arena : Arena
        Its chunks are those of ``group``.
    group : LayerGroup
    page_policy : str
        ``lowest``: the lowest free page, whether its chunk is committed or not (which drains high
        chunks); ``committed``: the lowest free page of committed chunks first, which commits the
        least.
    """

    def __init__(self, arena: Arena, group: LayerGroup, page_policy: str = "lowest") -> None:
        if page_policy not in PAGE_POLICIES:
            raise ValueError(f"page_policy={page_policy}: allowed are {', '.join(PAGE_POLICIES)}")
        self.arena, self.group, self.page_policy = arena, group, page_policy
        # Asked before each commit with (phase, allocation, bytes); may raise ``OutOfMemory``.
        self.guard: Callable[[str, str, int], None] | None = None
        self.page_bytes = group.geometry.page_bytes
        self.pages_per_chunk = group.pages_per_chunk
        self.chunks = arena.reserved_bytes // group.chunk_bytes
        self.total_pages = self.chunks * self.pages_per_chunk
        self._free = np.ones((self.chunks, self.pages_per_chunk), bool)
        self._free_flat = self._free.reshape(-1)
        self._dirty = np.zeros(self.total_pages, bool)
        self._chunk_free = np.full(self.chunks, self.pages_per_chunk, np.int64)
        self._committed = np.zeros(self.chunks, bool)
        self._lent = np.empty(0, np.int64)  # chunks of pages that may be retaken
        self._first = 0  # no chunk below this one has a free page
        self.free_pages = self.total_pages
        self.free_committed_pages = 0
        self.empty_chunks = 0

    @property
    def committed_bytes(self) -> int:
        """Physical bytes behind the pages."""
        return self.arena.committed_bytes

    def missing_bytes(self, pages: int) -> int:
        """Bytes of the chunks that handing out ``pages`` more pages needs at the least."""
        lacking = max(0, pages - self.free_committed_pages)
        return -(-lacking // self.pages_per_chunk) * self.group.chunk_bytes

    def backed_page(self) -> int:
        """Name a page that is backed, for padding; 0 when none is."""
        return int(self._committed.argmax()) * self.pages_per_chunk if self.chunks else 0

    def commit_all(self, phase: str, allocation: str) -> int:
        """Commit every chunk; returns the bytes. Raises ``OutOfMemory`` and then commits none."""
        nbytes = self.arena.commit(0, self.arena.reserved_bytes, phase, allocation)
        self._set_committed([(0, self.chunks)])
        return nbytes

    def allocate(self, pages: int, phase: str, allocation: str, policy: str | None = None) -> Grant:
        """Hand out ``pages`` pages and commit the chunks they need; all or nothing.

        Parameters
        ----------
        policy : str, optional
            Instead of the allocator's own ``page_policy``.

        Raises
        ------
        OutOfMemory
            A commit was refused, or (``source="pool"``) the arena has no such number of pages.
        """
        if pages > self.free_pages:
            return self._overflow(pages, phase, allocation)
        return self._grant(self._choose(pages, policy or self.page_policy), phase, allocation)

    def take(self, lo: int, hi: int) -> Grant:
        """Hand out exactly pages [lo, hi), which must be free and committed."""
        return self._mark_taken(np.arange(lo, hi))

    def release(self, pages: Pages) -> None:
        """Take pages back; their chunks stay committed until :meth:`trim`."""
        self._mark_free(pages)
        self._dirty[pages] = True

    def lend(self, pages: Pages) -> None:
        """Release pages so that :meth:`retake` can undo it: :meth:`trim` spares their chunks."""
        if len(pages):
            self.release(pages)
            self._lent = np.unique(pages // self.pages_per_chunk)

    def retake(self, pages: Pages) -> None:
        """Undo a :meth:`lend`; nothing was allocated in between that was not undone."""
        self._mark_taken(pages)
        self.settle()

    def settle(self) -> None:
        """Make a :meth:`lend` final."""
        self._lent = np.empty(0, np.int64)

    def undo(self, grant: Grant) -> None:
        """Undo an :meth:`allocate`, its commits included."""
        self._mark_free(grant.pages)
        for run in grant.chunk_runs:
            self._decommit(run)

    def zero(self, grant: Grant) -> None:
        """Zero the pages of a grant that may hold something, so that no tail is NaN.

        The last tile of a sequence is read past its end with probability 0, and 0 x NaN is NaN.
        Zeroed are reused pages and, unless the arena promises zeros, fresh ones.
        """
        used = grant.pages[self._dirty[grant.pages]]
        if not len(used):
            return
        for lo, hi in runs(np.sort(used)):
            self.arena.zero(lo * self.page_bytes, hi * self.page_bytes)
        self._dirty[used] = False

    def trim(self, keep_chunks: int = 0) -> int:
        """Give back empty chunks, the highest first, but for ``keep_chunks``; returns the bytes."""
        spare = self.empty_chunks - keep_chunks
        if spare <= 0:
            return 0
        empty = np.flatnonzero(self._committed & (self._chunk_free == self.pages_per_chunk))
        empty = np.setdiff1d(empty, self._lent, assume_unique=True)
        return sum(self._decommit(run) for run in runs(empty[-spare:]))

    def prepare_chunk(self, phase: str, allocation: str) -> int:
        """Commit the lowest chunk that is not; returns its bytes, 0 when all are committed."""
        if not self.chunks or self._committed.all():
            return 0
        chunk = int(self._committed.argmin())
        return self._commit([(chunk, chunk + 1)], phase, allocation)

    def _overflow(self, pages: int, phase: str, allocation: str) -> Grant:
        """More pages than the arena has: let the device refuse, if it was sized beyond it."""
        if not self._committed.all():
            self.undo(self.allocate(self.free_pages, phase, allocation))
        raise OutOfMemory(
            phase,
            allocation,
            pages * self.page_bytes,
            self.free_pages * self.page_bytes,
            source="pool",
        )

    def _choose(self, pages: int, policy: str) -> Pages:
        if policy == "lowest":
            return self._lowest(pages, committed_only=False)
        held = min(pages, self.free_committed_pages)
        chosen = self._lowest(held, committed_only=True)
        if held == pages:
            return chosen
        open_chunks = ~self._committed
        rest = self._lowest_of(np.flatnonzero(open_chunks), pages - held)
        return np.concatenate((chosen, rest))

    def _lowest(self, pages: int, committed_only: bool) -> Pages:
        """Find the lowest free pages in a growing range of chunks."""
        if pages == 1 and not committed_only:
            first = int(self._free[self._first].argmax())
            return np.array([self._first * self.pages_per_chunk + first])
        span = pages // self.pages_per_chunk + 64
        while True:
            counts = self._chunk_free[self._first : self._first + span]
            usable = counts > 0
            if committed_only:
                usable &= self._committed[self._first : self._first + span]
            if int(counts[usable].sum()) >= pages:
                return self._lowest_of(np.flatnonzero(usable) + self._first, pages)
            if self._first + span >= self.chunks:
                raise RuntimeError(f"fewer than {pages} pages are free, against the count")
            span *= 4

    def _lowest_of(self, chunks: npt.NDArray[np.int64], pages: int) -> Pages:
        """Find the lowest ``pages`` free pages of these (ascending) chunks."""
        needed = int(np.searchsorted(np.cumsum(self._chunk_free[chunks]), pages)) + 1
        rows, columns = np.nonzero(self._free[chunks[:needed]])
        found: Pages = chunks[rows[:pages]] * self.pages_per_chunk + columns[:pages]
        return found

    def _grant(self, pages: Pages, phase: str, allocation: str) -> Grant:
        if len(pages) == 1 and self._committed[pages[0] // self.pages_per_chunk]:
            return self._mark_taken(pages)
        chunks, _ = self._chunks_of(pages)
        wanted = runs(chunks[~self._committed[chunks]])
        nbytes = self._commit(wanted, phase, allocation)
        self._mark_taken(pages)
        return Grant(pages, tuple(wanted), nbytes)

    def _commit(self, wanted: list[tuple[int, int]], phase: str, allocation: str) -> int:
        """Commit runs of chunks, or none of them."""
        nbytes = 0
        for done, (lo, hi) in enumerate(wanted):
            try:
                nbytes += self._commit_run(lo, hi, phase, allocation)
            except BaseException:
                for run in wanted[:done]:
                    self._decommit(run)
                raise
            self._set_committed([(lo, hi)])
        return nbytes

    def _commit_run(self, lo: int, hi: int, phase: str, allocation: str) -> int:
        chunk_bytes = self.group.chunk_bytes
        if self.guard is not None:
            self.guard(phase, allocation, (hi - lo) * chunk_bytes)
        nbytes = self.arena.commit(lo * chunk_bytes, hi * chunk_bytes, phase, allocation)
        if nbytes > (hi - lo) * chunk_bytes:  # a malloc arena backs all of itself at once
            self._set_committed([(0, self.chunks)])
        return nbytes

    def _decommit(self, run: tuple[int, int]) -> int:
        lo, hi = run
        nbytes = self.arena.decommit(lo * self.group.chunk_bytes, hi * self.group.chunk_bytes)
        if nbytes:  # a malloc arena keeps everything
            self._committed[lo:hi] = False
            self._dirty[lo * self.pages_per_chunk : hi * self.pages_per_chunk] = False
            self.empty_chunks -= hi - lo
            self.free_committed_pages -= (hi - lo) * self.pages_per_chunk
        return nbytes

    def _set_committed(self, chunk_runs: list[tuple[int, int]]) -> None:
        for lo, hi in chunk_runs:
            fresh = int((~self._committed[lo:hi]).sum())
            self._committed[lo:hi] = True
            if not self.arena.fresh_is_zero:
                self._dirty[lo * self.pages_per_chunk : hi * self.pages_per_chunk] = True
            # A chunk that was not committed had no page handed out.
            self.empty_chunks += fresh
            self.free_committed_pages += fresh * self.pages_per_chunk

    def _mark_taken(self, pages: Pages) -> Grant:
        if not len(pages):
            return Grant(pages)
        if len(pages) == 1:  # as each sequence grows where a page holds few tokens: no arrays
            self._take_one(int(pages[0]))
        else:
            self._take_several(pages)
        self.free_pages -= len(pages)
        self.free_committed_pages -= len(pages)
        self._first = self._next_free_chunk()
        return Grant(pages)

    def _take_one(self, page: int) -> None:
        if not self._free_flat[page]:
            raise ValueError(TAKEN_TWICE)
        chunk = page // self.pages_per_chunk
        self._free_flat[page] = False
        self.empty_chunks -= int(self._chunk_free[chunk] == self.pages_per_chunk)
        self._chunk_free[chunk] -= 1

    def _take_several(self, pages: Pages) -> None:
        if not self._free_flat[pages].all():
            raise ValueError(TAKEN_TWICE)
        self._free_flat[pages] = False
        chunks, counts = self._chunks_of(pages)
        self.empty_chunks -= self._count_empty(chunks)
        self._chunk_free[chunks] -= counts

    def _mark_free(self, pages: Pages) -> None:
        if not len(pages):
            return
        if self._free_flat[pages].any():
            raise ValueError("a page that is free already was to be released")
        self._free_flat[pages] = True
        chunks, counts = self._chunks_of(pages)
        self._chunk_free[chunks] += counts
        self.empty_chunks += self._count_empty(chunks)
        self.free_pages += len(pages)
        self.free_committed_pages += len(pages)
        self._first = min(self._first, int(chunks[0]))

    def _chunks_of(self, pages: Pages) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the (ascending) chunks of pages, and how many pages lie in each."""
        chunks = pages // self.pages_per_chunk
        if len(pages) == 1:
            return chunks, np.ones(1, np.int64)
        lowest = int(chunks.min()) if len(chunks) else 0
        counts = np.bincount(chunks - lowest)
        touched = np.flatnonzero(counts)
        return touched + lowest, counts[touched]

    def _count_empty(self, chunks: npt.NDArray[np.int64]) -> int:
        return int((self._chunk_free[chunks] == self.pages_per_chunk).sum())

    def _next_free_chunk(self) -> int:
        if self._first < self.chunks and self._chunk_free[self._first]:
            return self._first
        for lo, hi in self._spans():
            found = np.flatnonzero(self._chunk_free[lo:hi])
            if len(found):
                return lo + int(found[0])
        return self.chunks

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Ranges of chunks from the first that may have a free page on, doubling in length."""
        lo, length = self._first, 64
        while lo < self.chunks:
            yield lo, min(lo + length, self.chunks)
            lo, length = lo + length, 2 * length
