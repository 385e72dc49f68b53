"""Paged on demand: physical memory is committed when a sequence grows into it."""

from __future__ import annotations

from strategies import sizing
from strategies.ahead import AheadMapper
from strategies.arena_pool import GroupPool
from strategies.device import Device
from strategies.errors import OutOfMemory
from strategies.growing import GrowingStrategy, check_budget
from strategies.model import KVModel

GROWTH_POLICIES = ("sync", "ahead")
RELEASE_POLICIES = ("immediate", "deferred")


class Paged(GrowingStrategy):
    """Sizing by what is free, lazy commit, pages: the policy that the report recommends.

    Parameters
    ----------
    device, model, context_tokens, sequences, arena_kind, page_policy
        As in :class:`strategies.pooled.PooledStrategy`.
    growth : str
        ``sync``: a chunk is committed when a page of it is needed. ``ahead``: a background thread
        also keeps ``ahead_chunks`` empty chunks of each group committed while a sequence is open;
        a refusal only makes it stop, and no request fails that would not fail with ``sync``.
    ahead_chunks : int
        At least 1; used with ``ahead``.
    release : str
        ``immediate``: a chunk is given back with its last page. ``deferred``: empty chunks are
        kept until they exceed ``low_water_bytes``, and given back before a request fails.
    low_water_bytes : int
        Per layer group; used with ``deferred``.
    mem_fraction : float
        (0, 1]: the share of what is free after weights and tables that may be committed. Growth
        past it is refused with ``OutOfMemory(source="budget")``; at 1.0 the device itself refuses.
    workspace_reserve_bytes : int
        Left out of that share, for what is allocated later.
    """

    name = "paged"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int = 1,
        growth: str = "sync",
        ahead_chunks: int = 4,
        release: str = "immediate",
        low_water_bytes: int = 0,
        mem_fraction: float = 1.0,
        workspace_reserve_bytes: int = 0,
        arena_kind: str = "auto",
        page_policy: str = "lowest",
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, arena_kind, page_policy)
        check_budget(mem_fraction, workspace_reserve_bytes)
        if growth not in GROWTH_POLICIES:
            raise ValueError(f"growth={growth}: allowed are {', '.join(GROWTH_POLICIES)}")
        if ahead_chunks < 1:
            raise ValueError(f"ahead_chunks={ahead_chunks}: must be at least 1")
        if release not in RELEASE_POLICIES:
            raise ValueError(f"release={release}: allowed are {', '.join(RELEASE_POLICIES)}")
        if low_water_bytes < 0:
            raise ValueError(f"low_water_bytes={low_water_bytes}: must be at least 0")
        self.growth, self.ahead_chunks = growth, ahead_chunks
        self.release, self.low_water_bytes = release, low_water_bytes
        self.mem_fraction = mem_fraction
        self.workspace_reserve_bytes = workspace_reserve_bytes
        self.budget_bytes: int | None = None
        self._ahead: AheadMapper | None = None

    def start(self) -> None:
        """Allocate the page tables and reserve address space; commit nothing."""
        super().start()
        if self.growth == "ahead":
            self._ahead = AheadMapper(self._lock, self._prepare)

    def stop(self) -> None:
        """Give everything back; the strategy can be started again."""
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None
        super().stop()

    def settle(self) -> None:
        """Wait until the background thread has nothing more to commit."""
        if self._ahead is not None:
            self._ahead.settle()

    def _pool_chunks(self) -> tuple[int, ...]:
        return tuple(
            sizing.paged_reserve_chunks(
                group, self.context_tokens, self.sequences, self.device.capacity_bytes
            )
            for group in self.model.groups
        )

    def _commit_pool(self) -> int:
        """Commit nothing; set the budget where one is asked for."""
        self.budget_bytes = None
        if self.mem_fraction < 1 or self.workspace_reserve_bytes:
            self.budget_bytes = sizing.budget_bytes(
                self.device.free_bytes(), self.mem_fraction, self.workspace_reserve_bytes
            )
            for pool in self.pools:
                pool.allocator.guard = self._guard
        return 0

    def _guard(self, phase: str, allocation: str, nbytes: int) -> None:
        free = self._free_bytes()
        if self.budget_bytes is not None and nbytes > free:
            raise OutOfMemory(phase, allocation, nbytes, free, source="budget")

    def _free_bytes(self) -> int:
        """Bytes that growth can still have, of the device and of the budget."""
        free = self.device.free_bytes()
        if self.budget_bytes is None:
            return free
        committed = sum(pool.arena.committed_bytes for pool in self.pools)
        return max(0, min(free, self.budget_bytes - committed))

    def can_admit(self, tokens: int) -> bool:
        """Whether ``tokens`` tokens fit into free committed pages and free device memory."""
        with self._lock:
            self._check_started()
            if not self._may_open(tokens):
                return False
            needed, spare = 0, 0
            for pool in self.pools:
                pages = pool.group.pages(sizing.window_tokens(pool.group, tokens))
                lacking = pool.allocator.missing_bytes(pages)
                needed += lacking
                if not lacking:
                    spare += self._spare_bytes(pool, pages)
            return needed <= self._free_bytes() + spare

    def _spare_bytes(self, pool: GroupPool, pages: int) -> int:
        """Bytes of empty chunks that the pool could give back and still hand out ``pages``."""
        allocator = pool.allocator
        in_use = (
            allocator.free_committed_pages - allocator.empty_chunks * pool.group.pages_per_chunk
        )
        from_empty = max(0, pages - in_use)
        spare = allocator.empty_chunks - -(-from_empty // pool.group.pages_per_chunk)
        return max(0, spare) * pool.group.chunk_bytes

    def _relieve(self, lacking: list[int]) -> None:
        for pool, pages in zip(self.pools, lacking, strict=True):
            spare = self._spare_bytes(pool, pages) // pool.group.chunk_bytes
            pool.allocator.trim(pool.allocator.empty_chunks - spare)

    def _kept_chunks(self, pool: GroupPool) -> int:
        """Empty chunks of a group that stay committed."""
        ahead = self.ahead_chunks if self._ahead is not None and self._open else 0
        if self.release == "immediate":
            return ahead
        return max(ahead, self.low_water_bytes // pool.group.chunk_bytes)

    def _released(self) -> None:
        for pool in self.pools:
            pool.allocator.trim(self._kept_chunks(pool))

    def open(self, sequence: int, max_tokens: int) -> None:
        """Begin a sequence; as in :meth:`PooledStrategy.open`."""
        with self._lock:
            super().open(sequence, max_tokens)
            self._poke()

    def extend(self, sequence: int, tokens: int) -> int:
        """Make room for ``tokens`` more tokens; as in :meth:`GrowingStrategy.extend`.

        What the background thread commits is not in the returned bytes, but in the footprint; with
        chunks that were kept it is in ``grown_bytes`` once a sequence uses it.
        """
        with self._lock if self._ahead is None else self._ahead.first():
            if self._ahead is not None:
                self._ahead.check()
            before = self._used_bytes()
            committed = super().extend(sequence, tokens)
            self.grown_bytes += max(committed, self._used_bytes() - before, 0)
            self._poke()
            return committed

    def _used_bytes(self) -> int:
        """Bytes of the chunks that hold a page of a sequence."""
        return sum(
            pool.arena.committed_bytes - pool.allocator.empty_chunks * pool.group.chunk_bytes
            for pool in self.pools
        )

    def close(self, sequence: int) -> None:
        """End a sequence; as in :meth:`GrowingStrategy.close`."""
        with self._lock:
            super().close(sequence)
            self._poke()

    def _poke(self) -> None:
        if self._ahead is not None:
            self._ahead.poke()

    def _prepare(self) -> bool:
        """Commit one chunk ahead in a group that lacks some; False when there is none to commit."""
        if not self._open:
            return False
        for pool in self.pools:
            if pool.allocator.empty_chunks < self.ahead_chunks:
                try:
                    if pool.allocator.prepare_chunk("fill", "kv_pages"):
                        return True
                except (OutOfMemory, MemoryError):
                    return False
        return False
