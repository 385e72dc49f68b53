"""Eager pages: a pool sized by a budget and committed at start-up, assigned page by page."""

from __future__ import annotations

from strategies import sizing
from strategies.device import Device
from strategies.growing import GrowingStrategy, check_budget
from strategies.model import KVModel


class EagerPages(GrowingStrategy):
    """Sizing by budget, eager commit, pages: the control between static and paged.

    Parameters
    ----------
    device, model, context_tokens, sequences, arena_kind, page_policy
        As in :class:`strategies.pooled.PooledStrategy`.
    mem_fraction : float
        (0, 1]: the pool's share of what is free once weights and tables are there.
    workspace_reserve_bytes : int
        Left free for what is allocated later, before the fraction is taken.
    step_tokens : int, optional
        The largest extension at once that groups with a window must hold beside a whole window;
        a window unless given (:func:`strategies.sizing.eager_pool_chunks`).
    """

    name = "eager_pages"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int = 1,
        mem_fraction: float = 1.0,
        workspace_reserve_bytes: int = 0,
        step_tokens: int | None = None,
        arena_kind: str = "auto",
        page_policy: str = "lowest",
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, arena_kind, page_policy)
        check_budget(mem_fraction, workspace_reserve_bytes)
        if step_tokens is not None and step_tokens < 1:
            raise ValueError(f"step_tokens={step_tokens}: must be at least 1")
        self.mem_fraction = mem_fraction
        self.workspace_reserve_bytes = workspace_reserve_bytes
        self.step_tokens = step_tokens

    def _pool_chunks(self) -> tuple[int, ...]:
        nbytes = sizing.budget_bytes(
            self.device.free_bytes(), self.mem_fraction, self.workspace_reserve_bytes
        )
        chunks = sizing.eager_pool_chunks(
            self.model, nbytes, self.context_tokens, self.sequences, self.step_tokens
        )
        if not all(chunks):
            raise self._no_room(
                nbytes,
                f"mem_fraction={self.mem_fraction}: leaves no room for a chunk of every group",
            )
        return chunks

    def can_admit(self, tokens: int) -> bool:
        """Whether the free pages hold ``tokens`` tokens."""
        with self._lock:
            self._check_started()
            if not self._may_open(tokens):
                return False
            return all(
                pool.group.pages(sizing.window_tokens(pool.group, tokens))
                <= pool.allocator.free_pages
                for pool in self.pools
            )
