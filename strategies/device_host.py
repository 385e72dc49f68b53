"""The scale model: a slice of host memory that refuses where the modelled device would."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.arena_host import HostArena
from strategies.device import Observer
from strategies.errors import OutOfMemory
from strategies.host_memory import HostMapping

if TYPE_CHECKING:
    import torch


class HostAllocation:
    """Named host memory, touched in full."""

    def __init__(self, device: HostDevice, phase: str, allocation: str, nbytes: int) -> None:
        self.phase, self.allocation, self.nbytes = phase, allocation, nbytes
        self._device = device
        self._memory = HostMapping(nbytes)
        try:
            device.take(phase, allocation, self._memory.nbytes, requested_bytes=nbytes)
        except OutOfMemory:
            self._memory.close()
            raise
        try:
            self._memory.touch(0, self._memory.nbytes)
        except MemoryError:
            device.give(self._memory.nbytes)
            self._memory.close()
            raise
        device.track(self._memory)

    @property
    def u8(self) -> torch.Tensor:
        """The bytes as a uint8 tensor ``[nbytes]``."""
        import torch

        return torch.from_numpy(self._memory.np[: self.nbytes])

    def free(self) -> None:
        """Give it back; a second call does nothing."""
        if not self._memory.nbytes:
            return
        started = time.perf_counter()
        self._device.give(self._memory.nbytes)
        self._device.forget(self._memory)
        self._memory.close()
        self._device.tell(self.phase, self.allocation, -self.nbytes, started)


class HostDevice:
    """A device of ``capacity_bytes`` made of host memory.

    Parameters
    ----------
    capacity_bytes : int
        The budget: what exceeds it is refused with ``OutOfMemory(source="budget")``.
    scale : int
        Bytes of the modelled device that one byte here stands for.
    observer : Observer, optional
        Told of every allocation.
    name : str
        What rows call the device.
    """

    kind = "host"
    oom_source = "budget"
    uuid = ""

    def __init__(
        self,
        capacity_bytes: int,
        scale: int = 1,
        observer: Observer | None = None,
        name: str = "scale model",
    ) -> None:
        if capacity_bytes < 1 or scale < 1:
            raise ValueError(
                f"capacity_bytes={capacity_bytes}, scale={scale}: each must be at least 1"
            )
        self.capacity_bytes, self.scale = capacity_bytes, scale
        self.observer, self.name = observer, name
        self._taken_bytes = 0
        self._lock = threading.Lock()  # an arena may grow in a background thread
        self._mappings: dict[int, HostMapping] = {}

    def free_bytes(self) -> int:
        """Bytes of the budget that are not taken."""
        return self.capacity_bytes - self._taken_bytes

    def used_bytes(self) -> int:
        """Resident bytes of this device's own mappings, read from the kernel."""
        return sum(mapping.resident_bytes() for mapping in list(self._mappings.values()))

    def meters(self) -> dict[str, int]:
        """Report no other meter: there is none on the host."""
        return {}

    def allocate(self, phase: str, allocation: str, nbytes: int) -> HostAllocation:
        """``nbytes`` of touched memory, rounded up to 4 KiB.

        Raises
        ------
        OutOfMemory
            The budget does not hold it.
        MemoryError
            The host itself has no memory.
        """
        started = time.perf_counter()
        made = HostAllocation(self, phase, allocation, nbytes)
        self.tell(phase, allocation, nbytes, started)
        return made

    def reserve(self, reserve_bytes: int, chunk_bytes: int, kind: str = "auto") -> HostArena:
        """Make an arena; ``kind`` is ``auto`` or ``mmap``."""
        if kind not in ("auto", HostArena.kind):
            raise ValueError(f"arena={kind}: allowed on the host are auto, {HostArena.kind}")
        return HostArena(self, reserve_bytes, chunk_bytes)

    def tensor(self, data: Any, dtype: str) -> torch.Tensor:  # noqa: ANN401
        """Make a tensor of ``data`` (anything numpy takes), outside the budget."""
        import torch

        return torch.from_numpy(np.ascontiguousarray(data, dtype=dtype))

    def synchronize(self) -> None:
        """Nothing runs asynchronously here."""

    def close(self) -> None:
        """Give everything back."""
        for mapping in list(self._mappings.values()):
            mapping.close()
        self._mappings.clear()
        self._taken_bytes = 0

    def take(
        self, phase: str, allocation: str, nbytes: int, requested_bytes: int | None = None
    ) -> None:
        """Take ``nbytes`` from the budget or raise ``OutOfMemory``."""
        with self._lock:
            free = self.free_bytes()
            if nbytes <= free:
                self._taken_bytes += nbytes
                return
        requested = nbytes if requested_bytes is None else requested_bytes
        raise OutOfMemory(phase, allocation, requested, free, source=self.oom_source)

    def give(self, nbytes: int) -> None:
        """Return ``nbytes`` to the budget."""
        with self._lock:
            self._taken_bytes -= nbytes

    def track(self, mapping: HostMapping) -> None:
        """Count this mapping's resident bytes as used."""
        self._mappings[id(mapping)] = mapping

    def forget(self, mapping: HostMapping) -> None:
        """Stop counting it."""
        self._mappings.pop(id(mapping), None)

    def tell(self, phase: str, allocation: str, nbytes: int, started: float) -> None:
        """Pass an event on to the observer."""
        if self.observer is not None:
            self.observer.event(phase, allocation, nbytes, time.perf_counter() - started)
