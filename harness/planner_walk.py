"""A start-up on paper: allocations are taken from what is free until one does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from harness.planner_spec import PlanItem, PlanSpec, Prediction


class Ended(Exception):
    """The walk is over; its outcome is in the :class:`Walk`."""


@dataclass
class Walk:
    """Takes allocations in order and remembers what fitted.

    The peak counts what is held at once, as the device rounds it; only what an item needs while it
    is made is freed in between.
    """

    spec: PlanSpec
    free_bytes: int = 0
    items: list[PlanItem] = field(default_factory=list)
    held_bytes: int = 0
    peak_bytes: int = 0
    outcome: str = "ok"
    phase: str = ""
    allocation: str = ""
    message: str = ""
    requested_bytes: int = 0
    refused_free_bytes: int = 0
    started: bool = False
    resident_tokens: int = 0
    kv_bytes: int = 0

    def take(
        self,
        item: PlanItem,
        pieces: tuple[tuple[int, int], ...] = (),
        transient_bytes: int = 0,
        lent_bytes: int = 0,
    ) -> None:
        """Take an item, piece by piece when it has pieces; raises :class:`Ended` on OOM.

        ``transient_bytes`` must fit before it, and are free again after it; ``lent_bytes`` of them
        may lie in what is held already.
        """
        if item.location != "device":
            self.items.append(item)
            return
        before, unit = self.free_bytes, self.spec.granularity_bytes
        taken = 0
        before += lent_bytes
        beside = -(-max(0, transient_bytes - lent_bytes) // unit) * unit
        if beside > self.free_bytes:
            self._end("oom", item, item.nbytes + transient_bytes, before)
        self.free_bytes -= beside
        for count, nbytes in pieces or ((1, item.nbytes),):
            rounded = -(-nbytes // unit) * unit
            fitting = min(count, self.free_bytes // rounded) if rounded else count
            self.free_bytes -= fitting * rounded
            self.held_bytes += fitting * rounded
            taken += fitting * nbytes
            self.peak_bytes = max(self.peak_bytes, self.held_bytes + beside)
            if fitting < count:
                self._end("oom", item, item.nbytes + transient_bytes, before, taken=taken)
        self.free_bytes += beside
        self.items.append(item)

    def refuse(self, item: PlanItem, requested: int, available: int, message: str) -> None:
        """End by a strategy's own rule."""
        self._end("refused", item, requested, available, message)

    def crash(self, message: str) -> None:
        """End by a fault of the engine itself, with everything allocated."""
        self.outcome, self.phase, self.message = "crash", "workspace", message
        raise Ended

    def fail(self, item: PlanItem, requested: int, free: int) -> None:
        """End for want of memory."""
        self._end("oom", item, requested, free)

    def _end(
        self,
        outcome: str,
        item: PlanItem,
        requested: int,
        free: int,
        message: str = "",
        taken: int = 0,
    ) -> None:
        self.outcome, self.phase, self.allocation = outcome, item.phase, item.allocation
        self.requested_bytes, self.refused_free_bytes = requested, free
        self.message = message
        self.items.append(replace(item, failed=True, taken_bytes=taken))
        raise Ended

    def before_strategy(self) -> None:
        """Context, NCCL and weights."""
        spec = self.spec
        self.free_bytes = spec.capacity_bytes
        self.take(PlanItem("context", "cuda_context", spec.context_bytes))
        if spec.nccl_bytes:
            self.take(PlanItem("nccl", "nccl", spec.nccl_bytes))
        if spec.weights_bytes:
            self.take(PlanItem("weights", "weights", spec.weights_bytes))

    def after_strategy(self) -> None:
        """Take the workspace; then the process is ready."""
        taken = self.spec.workspace_taken_bytes
        for (name, nbytes), own in zip(self.spec.workspace_items, taken, strict=True):
            self.take(PlanItem("workspace", name, nbytes), ((1, own),))
        self.started = True

    def prediction(self, **known: Any) -> Prediction:  # noqa: ANN401
        """Say what came of it."""
        on_device = [i for i in self.items if i.location == "device" and not i.failed]
        failed = self.outcome != "ok"
        return Prediction(
            items=tuple(self.items),
            outcome=self.outcome,
            phase=self.phase,
            allocation=self.allocation,
            message=self.message,
            requested_bytes=self.requested_bytes,
            free_bytes=self.refused_free_bytes if failed else self.free_bytes,
            predicted_tables_bytes=sum(i.nbytes for i in on_device if i.phase == "tables"),
            predicted_kv_bytes=self.kv_bytes,
            held_bytes=self.held_bytes,
            predicted_peak_bytes=max(self.peak_bytes, self.held_bytes),
            resident_tokens=self.resident_tokens,
            started=self.started,
            **known,
        )
