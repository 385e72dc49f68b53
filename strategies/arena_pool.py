"""One layer group's share of a strategy: its arena, its pages and its page table."""

from __future__ import annotations

from strategies.device import Device
from strategies.model import LayerGroup
from strategies.page_table import PageRow, PageTable
from strategies.pages import Grant, PageAllocator


class GroupPool:
    """Arena, allocator and page table of one layer group.

    Parameters
    ----------
    device : Device
    group : LayerGroup
    reserve_chunks : int
        Chunks of address space.
    arena_kind, page_policy : str
        As in :meth:`strategies.device.Device.reserve` and :class:`strategies.pages.PageAllocator`.
    """

    def __init__(
        self,
        device: Device,
        group: LayerGroup,
        reserve_chunks: int,
        arena_kind: str = "auto",
        page_policy: str = "lowest",
    ) -> None:
        self.group = group
        nbytes = reserve_chunks * group.chunk_bytes
        self.arena = device.reserve(nbytes, group.chunk_bytes, arena_kind)
        self.allocator = PageAllocator(self.arena, group, page_policy)
        self.table = PageTable()
        self.held_pages = 0

    def open(self, sequence: int) -> None:
        """Begin an empty row."""
        self.table.rows[sequence] = PageRow()

    def lacking(self, sequence: int, tokens: int) -> int:
        """Pages that a sequence of ``tokens`` tokens needs beyond those in its row."""
        return self.group.pages(tokens) - self.table.rows[sequence].count

    def behind_window(self, sequence: int, tokens: int) -> int:
        """Leading table entries that no query at position ``tokens`` or later can see."""
        first_token = self.group.window_start(tokens + 1)
        return min(first_token // self.group.geometry.page_tokens, self.table.rows[sequence].count)

    def append(self, sequence: int, grant: Grant) -> None:
        """Zero granted pages where needed and add them to the sequence."""
        self.allocator.zero(grant)
        self.table.rows[sequence].append(grant.pages)
        self.held_pages += len(grant.pages)

    def drop_front(self, sequence: int, first: int) -> None:
        """Forget the entries before ``first``; their pages were released."""
        row = self.table.rows[sequence]
        self.held_pages -= first - row.first
        row.first = first

    def close(self, sequence: int) -> None:
        """Release the sequence's pages; their chunks stay committed until trimmed."""
        row = self.table.rows.pop(sequence)
        self.allocator.release(row.held)
        self.held_pages -= row.count - row.first

    def first_token(self, sequence: int) -> int:
        """First token whose page the sequence still holds."""
        return self.table.rows[sequence].first * self.group.geometry.page_tokens
