"""What static, paged and eager_pages share: start, batch, footprint and stop over group pools."""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kernels.view import View
from strategies import sizing
from strategies.arena_pool import GroupPool
from strategies.device import Allocation, Device
from strategies.errors import OutOfMemory, Refused
from strategies.model import KVModel
from strategies.strategy import Footprint, Strategy

if TYPE_CHECKING:
    import torch


@dataclass
class OpenSequence:
    """A sequence that is open: what it holds and what it may grow to."""

    max_tokens: int
    tokens: int = 0


class PooledStrategy(Strategy):
    """A strategy whose K/V live in one arena per layer group.

    Parameters
    ----------
    device : Device
    model : KVModel
    context_tokens : int
        The configured maximum of one sequence.
    sequences : int
        Sequences that can be open at once: rows of the page table.
    arena_kind : str
        As in :meth:`strategies.device.Device.reserve`.
    page_policy : str
        As in :class:`strategies.pages.PageAllocator`.
    """

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int,
        arena_kind: str = "auto",
        page_policy: str = "lowest",
    ) -> None:
        if context_tokens < 1 or sequences < 1:
            raise ValueError(
                f"context_tokens={context_tokens}, sequences={sequences}: each must be at least 1"
            )
        self.device, self.model = device, model
        self.context_tokens, self.sequences = context_tokens, sequences
        self.arena_kind, self.page_policy = arena_kind, page_policy
        self.pools: list[GroupPool] = []
        self._open: dict[int, OpenSequence] = {}
        self._live_tokens: list[int] = []
        self._tables: Allocation | None = None
        self._start_bytes = 0
        self._scales: dict[int, torch.Tensor] = {}
        self._lock = threading.RLock()

    @abstractmethod
    def _pool_chunks(self) -> tuple[int, ...]:
        """Chunks of address space per layer group; may raise ``Refused``."""

    def _commit_pool(self) -> int:
        """Commit what is committed at start-up; returns the bytes. All unless overridden."""
        return self._commit_all()

    def start(self) -> None:
        """Allocate the page tables (phase ``tables``), then the pool (phase ``pool``).

        Raises
        ------
        OutOfMemory
            ``page_table`` or ``kv_pool`` did not fit; nothing is left allocated.
        Refused
            The pool's own sizing rule leaves no room for a page.
        """
        if self.pools:
            raise RuntimeError("the strategy is started already")
        try:
            nbytes = sizing.page_table_bytes(self.model, self.context_tokens, self.sequences)
            scaled = sizing.scaled_bytes(nbytes, self.device.scale)
            self._tables = self.device.allocate("tables", "page_table", scaled)
            started = time.perf_counter()
            for group, chunks in zip(self.model.groups, self._pool_chunks(), strict=True):
                self.pools.append(
                    GroupPool(self.device, group, chunks, self.arena_kind, self.page_policy)
                )
            self._live_tokens = [0] * len(self.pools)
            self._start_bytes = self._commit_pool()
            self._tell("pool", "kv_pool", self._start_bytes, started)
        except BaseException:
            self._tear_down()
            raise

    def _commit_all(self) -> int:
        """Commit every arena in full, as one allocation ``kv_pool``; all or nothing."""
        free = self.device.free_bytes()
        requested = sum(pool.arena.reserved_bytes for pool in self.pools)
        try:
            return sum(pool.allocator.commit_all("pool", "kv_pool") for pool in self.pools)
        except OutOfMemory as refusal:
            raise OutOfMemory(
                "pool",
                "kv_pool",
                requested,
                free,
                source=refusal.source,
                refused_bytes=refusal.refused_bytes,
            ) from refusal

    def _no_room(self, free_bytes: int, why: str) -> Refused:
        """The sizing rule leaves no room for the pool; ``why`` names its key."""
        return Refused("pool", "kv_pool", sizing.pool_bytes(self.model, 1), free_bytes, why)

    def open(self, sequence: int, max_tokens: int) -> None:
        """Begin a sequence; nothing is committed.

        Raises
        ------
        Refused
            ``max_tokens`` exceeds the context, or as many sequences are open as tables have rows.
        """
        with self._lock:
            self._check_open(sequence, max_tokens)
            self._open[sequence] = OpenSequence(max_tokens)
            for pool in self.pools:
                pool.open(sequence)

    def _check_open(self, sequence: int, max_tokens: int) -> None:
        self._check_started()
        if sequence in self._open:
            raise ValueError(f"sequence={sequence}: is open already")
        if not 1 <= max_tokens <= self.context_tokens:
            raise self._refusal(max_tokens, self.context_tokens, "the context")
        if len(self._open) >= self.sequences:
            raise Refused(
                "fill",
                "page_table",
                len(self._open) + 1,
                self.sequences,
                f"sequences={self.sequences}: all are open",
            )

    def _check_started(self) -> None:
        if not self.pools:
            raise RuntimeError("the strategy is not started")

    def _check_extend(self, sequence: int, tokens: int, limit_tokens: int) -> OpenSequence:
        state = self._state(sequence)
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: must be at least 0")
        if state.tokens + tokens > limit_tokens:
            raise self._refusal(
                state.tokens + tokens, limit_tokens, "what the sequence may grow to"
            )
        return state

    def _refusal(self, tokens: int, limit_tokens: int, rule: str) -> Refused:
        return Refused(
            "fill",
            "kv_pages",
            tokens * self.model.token_bytes,
            limit_tokens * self.model.token_bytes,
            f"{tokens} tokens: {rule} is {limit_tokens} tokens",
        )

    def _state(self, sequence: int) -> OpenSequence:
        if sequence not in self._open:
            raise ValueError(f"sequence={sequence}: is not open")
        return self._open[sequence]

    def _grow(self, state: OpenSequence, tokens: int) -> None:
        """Count ``tokens`` more tokens as live in every group."""
        state.tokens += tokens
        for index in range(len(self._live_tokens)):
            self._live_tokens[index] += tokens

    def close(self, sequence: int) -> None:
        """End a sequence and take its pages back."""
        with self._lock:
            state = self._state(sequence)
            for index, pool in enumerate(self.pools):
                self._live_tokens[index] -= state.tokens - pool.first_token(sequence)
                pool.close(sequence)
            del self._open[sequence]

    def resident_tokens(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        with self._lock:
            return self._state(sequence).tokens

    def room_tokens(self, sequence: int) -> int:
        """Tokens that fit into the sequence's pages."""
        with self._lock:
            self._state(sequence)
            return min(
                pool.table.rows[sequence].count * pool.group.geometry.page_tokens
                for pool in self.pools
            )

    def batch(self, sequences: Sequence[int]) -> list[View]:
        """Show the kernels what to read: a view per layer group, in the model's order."""
        with self._lock:
            lengths = tuple(self._state(s).tokens for s in sequences)
            lengths_tensor = self.device.tensor(lengths, "int64")
            views = []
            for index, pool in enumerate(self.pools):
                table = pool.table.batch(sequences, pool.allocator.backed_page())
                scale = self._ones(index)
                views.append(
                    View(
                        arena=pool.arena.u8,
                        page_table=self.device.tensor(table, "int32"),
                        lengths=lengths_tensor,
                        lengths_host=lengths,
                        geometry=pool.group.geometry,
                        k_scale=scale,
                        v_scale=scale,
                        starts_host=tuple(pool.group.window_start(n) for n in lengths),
                    )
                )
            return views

    def _ones(self, index: int) -> torch.Tensor:
        """Scales of K and of V of a group: float32 ``[kv_heads]``, all one; copied once."""
        if index not in self._scales:
            heads = self.pools[index].group.geometry.kv_heads
            self._scales[index] = self.device.tensor([1.0] * heads, "float32")
        return self._scales[index]

    def footprint(self) -> Footprint:
        """Bytes reserved, committed, live and of tables; live counts no page behind a window."""
        with self._lock:
            return Footprint(
                reserved_bytes=sum(pool.arena.reserved_bytes for pool in self.pools),
                committed_bytes=sum(pool.arena.committed_bytes for pool in self.pools),
                live_bytes=sum(
                    tokens * pool.group.geometry.token_bytes
                    for tokens, pool in zip(self._live_tokens, self.pools, strict=True)
                ),
                tables_bytes=self._tables.nbytes if self._tables else 0,
            )

    def stop(self) -> None:
        """Give everything back; the strategy can be started again."""
        with self._lock:
            started = time.perf_counter()
            was_started = bool(self.pools)
            self._tear_down()
            if was_started:
                self._tell("pool", "kv_pool", -self._start_bytes, started)
                self._start_bytes = 0

    def _tear_down(self) -> None:
        self._open.clear()
        self._scales.clear()
        for pool in self.pools:
            pool.arena.close()
        self.pools, self._live_tokens = [], []
        if self._tables is not None:
            self._tables.free()
            self._tables = None

    def _tell(self, phase: str, allocation: str, nbytes: int, started: float) -> None:
        if self.device.observer is not None:
            self.device.observer.event(phase, allocation, nbytes, time.perf_counter() - started)
