"""Fixed slots of contiguous pages, as a pool that never lends them out keeps them."""

from __future__ import annotations

import bisect

SLOT_POLICIES = ("max", "pow2", "exact")


def slot_pages(policy: str, pages: int, max_pages: int) -> int:
    """Pages of the slot of a request that needs ``pages``.

    ``max`` gives every request the longest one's slot, ``pow2`` the next power of two (the
    longest slot at most), ``exact`` what it needs: Orca (Max), (Pow2) and (Oracle) of the
    PagedAttention paper (SOSP '23, section 6.1).
    """
    if policy == "max":
        return max_pages
    if policy == "pow2":
        return min(max_pages, 1 << (pages - 1).bit_length()) if pages else 0
    return pages


class SlotPool:
    """Contiguous runs of a fixed number of pages, the lowest that fits first.

    With slots of one size, slot i owns pages [i n, (i + 1) n).
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._gaps: list[tuple[int, int]] = [(0, pages)] if pages else []

    @property
    def largest_gap(self) -> int:
        """Pages of the longest free run."""
        return max((hi - lo for lo, hi in self._gaps), default=0)

    @property
    def free_pages(self) -> int:
        """Pages in no slot."""
        return sum(hi - lo for lo, hi in self._gaps)

    def take(self, pages: int) -> tuple[int, int] | None:
        """Take a slot [lo, hi) of this many pages, or None when no gap holds it."""
        for index, (lo, hi) in enumerate(self._gaps):
            if hi - lo >= pages:
                if hi - lo == pages:
                    del self._gaps[index]
                else:
                    self._gaps[index] = (lo + pages, hi)
                return lo, lo + pages
        return None

    def give(self, slot: tuple[int, int]) -> None:
        """Take a slot back and join it with the gaps beside it."""
        index = bisect.bisect(self._gaps, slot)
        lo, hi = slot
        if index < len(self._gaps) and self._gaps[index][0] == hi:
            hi = self._gaps.pop(index)[1]
        if index and self._gaps[index - 1][1] == lo:
            lo = self._gaps.pop(index - 1)[0]
            index -= 1
        self._gaps.insert(index, (lo, hi))
