"""An engine's start-up, really allocated: what the emulations of SGLang and vLLM share.

The plan comes from the engine's formulas and from what the device has free; every tensor of it is
then allocated in the engine's order, so that a start fails where the engine fails. Sizes are the
modelled GPU's divided by ``device.scale``. K/V are accounted by slot or block, not laid out for
our kernels: an emulation is measured in memory, never in time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from strategies.device import Allocation, Device
from strategies.engine_model import EngineModel, EnginePlan, Item, engine_total_bytes
from strategies.errors import EngineCrash, OutOfMemory, Refused
from strategies.model import KVModel
from strategies.strategy import Footprint, Strategy

if TYPE_CHECKING:
    from kernels.view import View


class EngineStrategy(Strategy):
    """Budget-sized, eager, assigned by slots; index tables as the engine has them.

    Parameters
    ----------
    device : Device
        Its ``scale`` divides every size.
    model : KVModel
        What the harness stores of the model; only its bytes a token are used.
    context_tokens, sequences : int
    engine_model : EngineModel
        The modelled rank.
    device_total_bytes : int
        Of the modelled GPU, as CUDA shows it (:func:`strategies.engine_model.engine_total_bytes`).
    """

    slot_name = "kv_slots"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int,
        engine_model: EngineModel,
        device_total_bytes: int = 0,
    ) -> None:
        if context_tokens < 1 or sequences < 1:
            raise ValueError(
                f"context_tokens={context_tokens}, sequences={sequences}: each must be at least 1"
            )
        self.device, self.model, self.engine_model = device, model, engine_model
        self.context_tokens, self.sequences = context_tokens, sequences
        capacity = device.capacity_bytes * device.scale
        self.total_bytes = engine_total_bytes(capacity, device_total_bytes)
        self.plan: EnginePlan | None = None
        self._held: list[tuple[Item, Allocation]] = []
        self._open: dict[int, int] = {}
        self._limits: dict[int, int] = {}
        self._used_slots = 0

    @abstractmethod
    def _make_plan(self, free_before_bytes: int) -> EnginePlan:
        """Plan with so much free (modelled) before the engine's weights."""

    def start(self) -> None:
        """Allocate everything that the engine allocates at start-up, in its order.

        Raises
        ------
        OutOfMemory
            Names the engine's own allocation; nothing is left allocated.
        Refused
            The engine declines, in its own words; nothing is left allocated.
        EngineCrash
            The engine would crash, all allocated; nothing is left allocated.
        """
        if self.plan is not None:
            raise RuntimeError("the strategy is started already")
        scale = self.device.scale
        free_before = self.device.free_bytes() * scale + self.engine_model.weights_bytes
        plan = self._make_plan(free_before)
        try:
            for item in plan.items:
                if item.location == "device":
                    self._allocate(item)
            if plan.refusal is not None:
                refusal = plan.refusal
                raise Refused(
                    refusal.phase,
                    refusal.name,
                    refusal.needed_bytes // scale,
                    refusal.available_bytes // scale,
                    refusal.message,
                )
            if plan.fault:
                raise EngineCrash(plan.fault)
        except BaseException:
            self._release()
            raise
        self.plan = plan

    def _allocate(self, item: Item) -> None:
        free, scale = self.device.free_bytes(), self.device.scale
        beside = -(-item.transient_bytes // scale)
        sizes = [(count, -(-nbytes // scale)) for count, nbytes in item.pieces]
        requested = beside + sum(count * nbytes for count, nbytes in sizes)
        if item.before_weights:
            weights = self.engine_model.weights_bytes // scale
            free, beside = free + weights, max(0, beside - weights)

        def allocated(nbytes: int, name: str = item.name) -> Allocation:
            try:
                return self.device.allocate(item.phase, name, nbytes)
            except OutOfMemory as refusal:
                raise OutOfMemory(
                    item.phase,
                    item.name,
                    requested,
                    free,
                    source=refusal.source,
                    refused_bytes=nbytes,
                ) from refusal

        transient = allocated(beside, f"{item.name}_transient") if beside else None
        try:
            for count, nbytes in sizes:
                for _ in range(count):
                    self._held.append((item, allocated(nbytes)))
        finally:
            if transient is not None:
                transient.free()

    def _release(self) -> None:
        while self._held:
            self._held.pop()[1].free()

    def _started(self) -> EnginePlan:
        if self.plan is None:
            raise RuntimeError("the strategy is not started")
        return self.plan

    def _free_slots(self, plan: EnginePlan) -> int:
        return plan.slots - self._used_slots

    def can_admit(self, tokens: int) -> bool:
        """Whether the engine would accept a request that grows to ``tokens`` tokens."""
        plan = self._started()
        return (
            1 <= tokens <= plan.max_request_tokens
            and len(self._open) < plan.request_limit
            and plan.slots_for(tokens) <= self._free_slots(plan)
        )

    def open(self, sequence: int, max_tokens: int) -> None:
        """Begin a sequence; slots are assigned as it grows.

        A request longer than the pool (``can_admit`` says so) is refused when it outgrows it.

        Raises
        ------
        Refused
            ``max_tokens`` exceeds the context, or as many requests run as the engine allows.
        """
        plan = self._started()
        if sequence in self._open:
            raise ValueError(f"sequence={sequence}: is open already")
        if not 1 <= max_tokens <= self.context_tokens:
            text = f"{max_tokens} tokens: the context is {self.context_tokens} tokens"
            raise self._refused(max_tokens, self.context_tokens, text)
        if len(self._open) >= plan.request_limit:
            raise Refused(
                "fill",
                "requests",
                len(self._open) + 1,
                plan.request_limit,
                f"{plan.engine} runs {plan.request_limit} requests at most",
            )
        self._open[sequence], self._limits[sequence] = 0, max_tokens

    def _refused(self, tokens: int, limit_tokens: int, text: str) -> Refused:
        token = self.model.token_bytes
        return Refused("fill", self.slot_name, tokens * token, limit_tokens * token, text)

    def extend(self, sequence: int, tokens: int) -> int:
        """Assign slots for ``tokens`` more tokens; commits nothing, the pool is there already.

        Raises
        ------
        Refused
            No slot is free (the engine would retract or preempt a request), or the request is at
            its limit. The state is as before.
        """
        plan, held = self._started(), self.resident_tokens(sequence)
        if tokens < 0:
            raise ValueError(f"tokens={tokens}: must be at least 0")
        goal = held + tokens
        limit = min(self._limits[sequence], plan.max_request_tokens)
        if goal > limit:
            raise self._refused(goal, limit, f"{goal} tokens: the request ends at {limit} tokens")
        free = self._free_slots(plan)
        before = plan.slots_for(held) if held else 0
        more = (plan.slots_for(goal) if goal else 0) - before
        if more > free:
            text = f"no free K/V slot: {more} of {plan.slot_tokens} tokens asked, {free} free"
            raise self._refused(more * plan.slot_tokens, free * plan.slot_tokens, text)
        self._open[sequence] = goal
        self._used_slots += more
        return 0

    def close(self, sequence: int) -> None:
        """End a sequence; its slots are free for the next one."""
        held = self.resident_tokens(sequence)
        if held:
            self._used_slots -= self._started().slots_for(held)
        del self._open[sequence], self._limits[sequence]

    def resident_tokens(self, sequence: int) -> int:
        """Tokens that the sequence holds."""
        if sequence not in self._open:
            raise ValueError(f"sequence={sequence}: is not open")
        return self._open[sequence]

    def room_tokens(self, sequence: int) -> int:
        """Tokens that fit into the request's slots of full attention."""
        unit = self._started().slot_tokens
        return -(-self.resident_tokens(sequence) // unit) * unit

    def batch(self, sequences: Sequence[int]) -> list[View]:
        """Refuse: an engine's pool is not in our layout, and emulations are never timed.

        Raises
        ------
        NotImplementedError
            Always.
        """
        raise NotImplementedError(
            f"strategy={self.name}: its pool is not in our kernels' layout; it is measured in "
            "memory, not in time"
        )

    def footprint(self) -> Footprint:
        """Bytes of the K/V pool, of the tokens in it, and of everything else that was allocated."""
        pool = sum(made.nbytes for item, made in self._held if item.name == "kv_pool")
        everything = sum(made.nbytes for _, made in self._held)
        live = sum(self._open.values()) * self.model.token_bytes
        return Footprint(pool, pool, live, everything - pool)

    def stop(self) -> None:
        """Give everything back; the strategy can be started again."""
        self._open.clear()
        self._limits.clear()
        self._used_slots = 0
        self._release()
        self.plan = None
