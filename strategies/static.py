"""Static pre-allocation: every sequence's longest context is committed at start-up."""

from __future__ import annotations

from strategies import sizing
from strategies.device import Device
from strategies.errors import Refused
from strategies.model import KVModel
from strategies.pooled import PooledStrategy
from strategies.slots import SLOT_POLICIES, SlotPool, slot_pages

MEM_FRACTION_OF = ("context", "device")


class Static(PooledStrategy):
    """Sizing by context, eager commit, fixed slots: the policy that the report blames.

    Slot i owns pages [i n, (i + 1) n) of every layer group for good; nothing is lent, and no
    window is known, so a local layer costs as much as a full one.

    Parameters
    ----------
    device, model, context_tokens, sequences, arena_kind
        As in :class:`strategies.pooled.PooledStrategy`.
    mem_fraction : float
        (0, 1]. What it is a fraction of, ``mem_fraction_of`` says.
    mem_fraction_of : str
        ``context``: a slot holds ``ceil(context * mem_fraction)`` tokens, and there are
        ``sequences`` slots. ``device``: the pool is ``mem_fraction * capacity`` less what is used
        when it starts, and no more than what is free less ``workspace_reserve_bytes``; it is cut
        into as many slots as fit (``sequences`` at most), or is one smaller slot when none fits.
    slot_policy : str
        ``max``, ``pow2`` or ``exact`` (:func:`strategies.slots.slot_pages`).
    workspace_reserve_bytes : int
        Left free for what is allocated later, where the pool is sized by the device.
    """

    name = "static"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int = 1,
        mem_fraction: float = 1.0,
        mem_fraction_of: str = "context",
        slot_policy: str = "max",
        arena_kind: str = "auto",
        workspace_reserve_bytes: int = 0,
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, arena_kind)
        if not 0 < mem_fraction <= 1:
            raise ValueError(f"mem_fraction={mem_fraction}: must be above 0 and at most 1")
        if mem_fraction_of not in MEM_FRACTION_OF:
            raise ValueError(
                f"mem_fraction_of={mem_fraction_of}: allowed are {', '.join(MEM_FRACTION_OF)}"
            )
        if slot_policy not in SLOT_POLICIES:
            raise ValueError(f"slot_policy={slot_policy}: allowed are {', '.join(SLOT_POLICIES)}")
        self.mem_fraction, self.mem_fraction_of = mem_fraction, mem_fraction_of
        self.slot_policy = slot_policy
        self.workspace_reserve_bytes = workspace_reserve_bytes
        self.slot_tokens = 0
        self._slots: list[SlotPool] = []
        self._owned: dict[int, list[tuple[int, int]]] = {}

    def _pool_chunks(self) -> tuple[int, ...]:
        if self.mem_fraction_of == "context":
            self.slot_tokens = sizing.slot_tokens(self.context_tokens, self.mem_fraction)
            pool_tokens, slots = self.slot_tokens, self.sequences
        else:
            pool_tokens, slots = self._device_pool_tokens(), 1
            self.slot_tokens = min(pool_tokens, self.context_tokens)
        groups = self.model.groups
        self._slots = [SlotPool(slots * group.pages(pool_tokens)) for group in groups]
        self._owned.clear()
        return tuple(sizing.pool_chunks(group, pool_tokens, slots) for group in groups)

    def _device_pool_tokens(self) -> int:
        device = self.device
        nbytes = sizing.static_device_budget_bytes(
            device.capacity_bytes,
            device.free_bytes(),
            self.mem_fraction,
            self.workspace_reserve_bytes,
        )
        tokens = sizing.budget_tokens(self.model, nbytes)
        if tokens < 1:
            raise self._no_room(
                max(0, nbytes),
                f"mem_fraction={self.mem_fraction}: leaves no room for the KV pool; raise it",
            )
        return tokens

    def can_admit(self, tokens: int) -> bool:
        """Whether a slot that holds ``tokens`` tokens is free."""
        with self._lock:
            self._check_started()
            return (
                1 <= tokens <= self.slot_tokens
                and len(self._open) < self.sequences
                and all(
                    slots.largest_gap >= pages
                    for slots, pages in zip(self._slots, self._request_pages(tokens), strict=True)
                )
            )

    def _request_pages(self, max_tokens: int) -> list[int]:
        return [
            slot_pages(self.slot_policy, group.pages(max_tokens), group.pages(self.slot_tokens))
            for group in self.model.groups
        ]

    def open(self, sequence: int, max_tokens: int) -> None:
        """Give the sequence a slot.

        A request longer than a slot (``can_admit`` says so) gets the longest one and is refused
        when it outgrows it.

        Raises
        ------
        Refused
            ``max_tokens`` exceeds the context, or no slot is free.
        """
        with self._lock:
            self._check_open(sequence, max_tokens)
            wanted = self._request_pages(min(max_tokens, self.slot_tokens))
            taken: list[tuple[int, int]] = []
            for slots, pages in zip(self._slots, wanted, strict=True):
                slot = slots.take(pages)
                if slot is None:
                    for owner, held in zip(self._slots, taken, strict=False):
                        owner.give(held)
                    raise self._no_slot(pages, slots)
                taken.append(slot)
            super().open(sequence, max_tokens)
            self._owned[sequence] = taken

    def _no_slot(self, pages: int, slots: SlotPool) -> Refused:
        page_bytes = self.model.groups[0].geometry.page_bytes
        return Refused(
            "fill",
            "kv_slot",
            pages * page_bytes,
            slots.largest_gap * page_bytes,
            f"no slot of {pages} pages is free; the longest free run is {slots.largest_gap}",
        )

    def extend(self, sequence: int, tokens: int) -> int:
        """Make room for more tokens in the slot; commits nothing.

        Raises
        ------
        Refused
            The slot, or what the sequence was opened for, does not hold them.
        """
        with self._lock:
            limit = min(self._state(sequence).max_tokens, self.slot_tokens)
            state = self._check_extend(sequence, tokens, limit)
            for pool, (lo, _) in zip(self.pools, self._owned[sequence], strict=True):
                count = pool.table.rows[sequence].count
                more = pool.lacking(sequence, state.tokens + tokens)
                if more > 0:
                    grant = pool.allocator.take(lo + count, lo + count + more)
                    pool.append(sequence, grant)
            self._grow(state, tokens)
            return 0

    def room_tokens(self, sequence: int) -> int:
        """Tokens that fit into the sequence's slot."""
        with self._lock:
            self._state(sequence)
            return min(
                (hi - lo) * pool.group.geometry.page_tokens
                for pool, (lo, hi) in zip(self.pools, self._owned[sequence], strict=True)
            )

    def close(self, sequence: int) -> None:
        """End a sequence; its slot is free for the next one."""
        with self._lock:
            super().close(sequence)
            for slots, slot in zip(self._slots, self._owned.pop(sequence), strict=True):
                slots.give(slot)
