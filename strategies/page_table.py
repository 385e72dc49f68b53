"""Which pages hold a sequence: the host's copy of the page table of one layer group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from strategies.pages import Pages


@dataclass
class PageRow:
    """Pages of one sequence: entries ``[first, count)`` are held, those before were given back."""

    entries: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(64, np.int32))
    count: int = 0
    first: int = 0

    @property
    def held(self) -> Pages:
        """Pages that the sequence holds, in token order."""
        return self.entries[self.first : self.count].astype(np.int64)

    def append(self, pages: Pages) -> None:
        """Add pages behind the last one."""
        end = self.count + len(pages)
        if end > len(self.entries):
            grown = np.empty(max(end, 2 * len(self.entries)), np.int32)
            grown[: self.count] = self.entries[: self.count]
            self.entries = grown
        self.entries[self.count : end] = pages
        self.count = end


class PageTable:
    """Rows of one layer group, by sequence."""

    def __init__(self) -> None:
        self.rows: dict[int, PageRow] = {}

    def batch(self, sequences: Sequence[int], backed_page: int) -> npt.NDArray[np.int32]:
        """int32 ``[sequences, max_pages]`` of these sequences.

        Entries that were given back, or lie past a sequence's last page, name a page that is
        backed: one of the sequence's own, else ``backed_page``.
        """
        rows = [self.rows[s] for s in sequences]
        table = np.empty((len(rows), max((r.count for r in rows), default=0)), np.int32)
        for out, row in zip(table, rows, strict=True):
            out[: row.count] = row.entries[: row.count]
            pad = row.entries[row.count - 1] if row.count > row.first else backed_page
            out[: row.first] = pad
            out[row.count :] = pad
        return table
