"""The scale model's arena: reserved host addresses, committed by touching, given back by advice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from strategies.chunked_arena import ChunkedArena
from strategies.host_memory import PAGE_BYTES, HostMapping

if TYPE_CHECKING:
    import torch

    from strategies.device_host import HostDevice


class HostArena(ChunkedArena):
    """Anonymous host memory of which whole chunks are resident.

    Parameters
    ----------
    device : HostDevice
        Its budget refuses; its meter counts what is resident here.
    reserve_bytes : int
        Rounded up to whole chunks.
    chunk_bytes : int
        A multiple of 4 KiB.
    """

    kind = "mmap"
    fresh_is_zero = True

    def __init__(self, device: HostDevice, reserve_bytes: int, chunk_bytes: int) -> None:
        super().__init__(reserve_bytes, chunk_bytes, PAGE_BYTES)
        self._device = device
        self._memory = HostMapping(self.reserved_bytes)
        device.track(self._memory)

    @property
    def np(self) -> npt.NDArray[np.uint8]:
        """uint8 ``[reserved_bytes]``; only committed parts may be touched."""
        return self._memory.np[: self.reserved_bytes]

    @property
    def u8(self) -> torch.Tensor:
        """The same bytes as a tensor."""
        if self._u8 is None:
            import torch

            self._u8 = torch.from_numpy(self.np)
        return self._u8

    def commit(self, lo: int, hi: int, phase: str, allocation: str) -> int:
        """Touch the chunks of bytes [lo, hi), rounded out; all or nothing.

        Returns
        -------
        int
            Bytes newly committed.

        Raises
        ------
        OutOfMemory
            The device's budget does not hold them (``source="budget"``).
        MemoryError
            The host itself has no memory.
        """
        missing = self._map.missing(lo, hi)
        nbytes = sum(b - a for a, b in missing) * self.chunk_bytes
        self._device.take(phase, allocation, nbytes)
        touched: list[tuple[int, int]] = []
        try:
            for a, b in missing:
                self._memory.touch(a * self.chunk_bytes, b * self.chunk_bytes)
                touched.append((a, b))
        except MemoryError:
            for a, b in touched:
                self._memory.give_back(a * self.chunk_bytes, b * self.chunk_bytes)
            self._device.give(nbytes)
            raise
        return self._map.mark(missing, True)

    def decommit(self, lo: int, hi: int) -> int:
        """Give back the chunks that lie wholly inside [lo, hi); returns their bytes."""
        inside = self._map.inside(lo, hi)
        for a, b in inside:
            self._memory.give_back(a * self.chunk_bytes, b * self.chunk_bytes)
        nbytes = self._map.mark(inside, False)
        self._device.give(nbytes)
        return nbytes

    def zero(self, lo: int, hi: int) -> None:
        """Fill committed bytes [lo, hi) with zeros."""
        self._memory.np[lo:hi] = 0

    def resident_bytes(self) -> int:
        """Bytes of this arena that are in physical memory, by the kernel's account."""
        return self._memory.resident_bytes()

    def close(self) -> None:
        """Give everything back, address space included; a second call does nothing."""
        if not self._memory.nbytes:
            return
        self._device.give(self.committed_bytes)
        self._empty()
        self._device.forget(self._memory)
        self._memory.close()
