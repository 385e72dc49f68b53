"""Paged on demand: physical memory is committed when a sequence grows into it."""

from __future__ import annotations

from strategies import sizing
from strategies.arena_pool import GroupPool
from strategies.device import Device
from strategies.errors import OutOfMemory
from strategies.growing import GrowingStrategy
from strategies.model import KVModel
from strategies.pages import Grant

RELEASE_POLICIES = ("immediate", "deferred")


class Paged(GrowingStrategy):
    """Sizing by what is free, lazy commit, pages: the policy that the report recommends.

    Parameters
    ----------
    device, model, context_tokens, sequences, arena_kind, page_policy
        As in :class:`strategies.pooled.PooledStrategy`.
    release : str
        ``immediate``: a chunk is given back with its last page. ``deferred``: empty chunks are
        kept until they exceed ``low_water_bytes``, and given back before a request fails.
    low_water_bytes : int
        Per layer group; used with ``deferred``.
    """

    name = "paged"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int = 1,
        release: str = "immediate",
        low_water_bytes: int = 0,
        arena_kind: str = "auto",
        page_policy: str = "lowest",
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, arena_kind, page_policy)
        if release not in RELEASE_POLICIES:
            raise ValueError(f"release={release}: allowed are {', '.join(RELEASE_POLICIES)}")
        if low_water_bytes < 0:
            raise ValueError(f"low_water_bytes={low_water_bytes}: must be at least 0")
        self.release, self.low_water_bytes = release, low_water_bytes

    def _pool_chunks(self) -> tuple[int, ...]:
        return tuple(
            sizing.paged_reserve_chunks(
                group, self.context_tokens, self.sequences, self.device.capacity_bytes
            )
            for group in self.model.groups
        )

    def can_admit(self, tokens: int) -> bool:
        """Whether ``tokens`` tokens fit into free committed pages and free device memory."""
        with self._lock:
            self._check_started()
            if not 1 <= tokens <= self.context_tokens or len(self._open) >= self.sequences:
                return False
            needed, spare = 0, 0
            for pool in self.pools:
                pages = pool.group.pages(sizing.window_tokens(pool.group, tokens))
                lacking = pool.allocator.missing_bytes(pages)
                needed += lacking
                if not lacking:
                    spare += self._spare_bytes(pool, pages)
            return needed <= self.device.free_bytes() + spare

    def _spare_bytes(self, pool: GroupPool, pages: int) -> int:
        """Bytes of empty chunks that the pool could give back and still hand out ``pages``."""
        allocator = pool.allocator
        in_use = (
            allocator.free_committed_pages - allocator.empty_chunks * pool.group.pages_per_chunk
        )
        from_empty = max(0, pages - in_use)
        spare = allocator.empty_chunks - -(-from_empty // pool.group.pages_per_chunk)
        return max(0, spare) * pool.group.chunk_bytes

    def _allocate_group(self, pool: GroupPool, pages: int) -> Grant:
        try:
            return super()._allocate_group(pool, pages)
        except OutOfMemory:
            others = [other for other in self.pools if other is not pool]
            if not sum(other.allocator.trim() for other in others):
                raise
            return super()._allocate_group(pool, pages)

    def _kept_chunks(self, pool: GroupPool) -> int:
        """Empty chunks of a group that stay committed."""
        if self.release == "immediate":
            return 0
        return self.low_water_bytes // pool.group.chunk_bytes

    def _released(self) -> None:
        for pool in self.pools:
            pool.allocator.trim(self._kept_chunks(pool))
