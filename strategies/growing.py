"""Growth of a sequence by pages, all groups or none: shared by paged and eager_pages."""

from __future__ import annotations

from strategies.errors import OutOfMemory
from strategies.pages import Grant, Pages
from strategies.pooled import PooledStrategy


def check_budget(mem_fraction: float, workspace_reserve_bytes: int) -> None:
    """Raise ``ValueError`` unless the keys of a memory budget make sense."""
    if not 0 < mem_fraction <= 1:
        raise ValueError(f"mem_fraction={mem_fraction}: must be above 0 and at most 1")
    if workspace_reserve_bytes < 0:
        raise ValueError(f"workspace_reserve_bytes={workspace_reserve_bytes}: must be at least 0")


class GrowingStrategy(PooledStrategy):
    """A strategy that assigns pages on demand and takes back those behind a window."""

    def _may_open(self, tokens: int) -> bool:
        """Whether a request is no longer than the context, and the tables have a row for it."""
        return 1 <= tokens <= self.context_tokens and len(self._open) < self.sequences

    def extend(self, sequence: int, tokens: int) -> int:
        """Make room for ``tokens`` more tokens; returns the bytes newly committed.

        In a group with a window, pages that no query from the first new token on can see are
        taken back first, and may be handed out again at once.

        Raises
        ------
        OutOfMemory
            Phase ``fill``, allocation ``kv_pages``; the state, and the bytes of every page that
            the sequence holds, are as before.
        Refused
            The sequence was opened for fewer tokens.
        """
        with self._lock:
            state = self._check_extend(sequence, tokens, self._state(sequence).max_tokens)
            goal = state.tokens + tokens
            dead = [pool.behind_window(sequence, state.tokens) for pool in self.pools]
            lacking = [max(0, pool.lacking(sequence, goal)) for pool in self.pools]
            committed = 0
            if any(lacking) or self._can_drop(sequence, dead):
                committed = self._exchange(sequence, dead, lacking)
            self._grow(state, tokens)
            return committed

    def _can_drop(self, sequence: int, dead: list[int]) -> bool:
        return any(
            first > pool.table.rows[sequence].first
            for pool, first in zip(self.pools, dead, strict=True)
        )

    def _exchange(self, sequence: int, dead: list[int], lacking: list[int]) -> int:
        """Release dead pages and take the lacking ones, in every group or in none."""
        rows = [pool.table.rows[sequence] for pool in self.pools]
        dropped = [
            row.entries[row.first : first].astype(int)
            for row, first in zip(rows, dead, strict=True)
        ]
        for pool, pages in zip(self.pools, dropped, strict=True):
            pool.allocator.lend(pages)
        try:
            grants = self._allocate(sequence, lacking)
        except BaseException:
            for pool, pages in zip(self.pools, dropped, strict=True):
                pool.allocator.retake(pages)
            raise
        self._apply(sequence, grants, dropped, dead)
        return sum(grant.committed_bytes for grant in grants)

    def _apply(
        self, sequence: int, grants: list[Grant], dropped: list[Pages], dead: list[int]
    ) -> None:
        for index, pool in enumerate(self.pools):
            pool.allocator.settle()
            pool.append(sequence, grants[index])
            if len(dropped[index]):
                pool.drop_front(sequence, dead[index])
                page_tokens = pool.group.geometry.page_tokens
                self._live_tokens[index] -= len(dropped[index]) * page_tokens
        self._released()

    def _allocate(self, sequence: int, lacking: list[int]) -> list[Grant]:
        """Pages of every group, or of none.

        When a commit is refused, what the policy keeps in reserve is given up and committed pages
        are used first, so that no request fails that fits.
        """
        try:
            return self._allocate_groups(lacking, None)
        except OutOfMemory as refusal:
            if refusal.source == "pool":
                raise self._whole(refusal, sequence, refusal.free_bytes, lacking) from refusal
        self._relieve(lacking)
        free = self._free_bytes()
        try:
            return self._allocate_groups(lacking, "committed")
        except OutOfMemory as refusal:
            raise self._whole(refusal, sequence, free, lacking) from refusal

    def _allocate_groups(self, lacking: list[int], policy: str | None) -> list[Grant]:
        grants: list[Grant] = []
        try:
            for pool, pages in zip(self.pools, lacking, strict=True):
                grants.append(pool.allocator.allocate(pages, "fill", "kv_pages", policy))
        except BaseException:
            for pool, grant in zip(self.pools, grants, strict=False):
                pool.allocator.undo(grant)
            raise
        return grants

    def _free_bytes(self) -> int:
        """Bytes that growth can still have."""
        return self.device.free_bytes()

    def _relieve(self, lacking: list[int]) -> None:
        """Give back what is kept in reserve and not lacking. Nothing unless overridden."""

    def _whole(
        self, refusal: OutOfMemory, sequence: int, free_bytes: int, lacking: list[int]
    ) -> OutOfMemory:
        """Tell the refusal of one commit as that of the whole extension."""
        if refusal.source == "pool":
            requested = refusal.requested_bytes
        else:
            requested = sum(
                pool.allocator.missing_bytes(pages)
                for pool, pages in zip(self.pools, lacking, strict=True)
            )
        return OutOfMemory(
            "fill",
            "kv_pages",
            requested,
            free_bytes,
            tokens=self._open[sequence].tokens,
            source=refusal.source,
            refused_bytes=refusal.refused_bytes,
        )

    def _released(self) -> None:
        """Pages came back: give back what the strategy's policy does not keep."""

    def close(self, sequence: int) -> None:
        """End a sequence, take its pages back, and give back what the policy does not keep."""
        with self._lock:
            super().close(sequence)
            self._released()
