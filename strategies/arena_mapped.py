"""The CUDA arena: a reserved address range into which physical chunks are mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from strategies.chunked_arena import ChunkedArena
from strategies.dlpack import KDL_CUDA, u8_view
from strategies.driver_memory import DriverMemory, DriverRefusal
from strategies.errors import OutOfMemory

if TYPE_CHECKING:
    import torch


class MappedArena(ChunkedArena):
    """Chunks of ``cuMemCreate`` memory in one ``cuMemAddressReserve`` range.

    Addresses never move, so captured graphs and descriptors survive growth; unmap nothing that a
    captured graph still reads. Fresh chunks are not promised to be zero. Safe to commit from any
    thread, one at a time.

    Parameters
    ----------
    memory : DriverMemory
    reserve_bytes : int
        Rounded up to whole chunks.
    chunk_bytes : int
        A multiple of the driver's granularity (2 MiB).
    synchronize : callable
        Waits for the device: unmapping does not wait for running kernels.
    device_id, device_type : int
        Where DLPack says the view is.

    Raises
    ------
    OutOfMemory
        There is no address range of that length (``kv_address_space``).
    """

    kind = "mapped"

    def __init__(
        self,
        memory: DriverMemory,
        reserve_bytes: int,
        chunk_bytes: int,
        synchronize: Callable[[], None],
        device_id: int = 0,
        device_type: int = KDL_CUDA,
    ) -> None:
        super().__init__(reserve_bytes, chunk_bytes, memory.granularity_bytes)
        self._memory, self._synchronize = memory, synchronize
        self._device_id, self._device_type = device_id, device_type
        self._base = self._reserve_range()

    def _reserve_range(self) -> int:
        nbytes = self.reserved_bytes
        try:
            return self._memory.reserve(nbytes)
        except DriverRefusal as refusal:
            free = self._memory.free_bytes()
            raise OutOfMemory("pool", "kv_address_space", nbytes, free) from refusal

    @property
    def u8(self) -> torch.Tensor:
        """uint8 ``[reserved_bytes]``; only mapped parts may be touched."""
        if self._u8 is None:
            self._u8 = u8_view(self._base, self.reserved_bytes, self._device_id, self._device_type)
        return self._u8

    def commit(self, lo: int, hi: int, phase: str, allocation: str) -> int:
        """Map the chunks of bytes [lo, hi), rounded out; all or nothing.

        Returns
        -------
        int
            Bytes newly committed.

        Raises
        ------
        OutOfMemory
            The driver refused a chunk (``source="driver"``); those mapped before it are unmapped.
        """
        missing = self._map.missing(lo, hi)
        if not missing:
            return 0
        nbytes = sum(b - a for a, b in missing) * self.chunk_bytes
        free, mapped = 0, list[int]()
        try:
            self._memory.attach()
            free = self._memory.free_bytes()
            for a, b in missing:
                for chunk in range(a, b):
                    self._memory.map_new(self._base + chunk * self.chunk_bytes, self.chunk_bytes)
                    mapped.append(chunk)
                # One call for a contiguous run: it is the dearest of the four.
                self._memory.allow(self._base + a * self.chunk_bytes, (b - a) * self.chunk_bytes)
        except BaseException as failure:
            self._unmap(mapped)
            if isinstance(failure, DriverRefusal):
                raise OutOfMemory(
                    phase, allocation, nbytes, free, refused_bytes=self.chunk_bytes
                ) from failure
            raise
        return self._map.mark(missing, True)

    def decommit(self, lo: int, hi: int) -> int:
        """Unmap the chunks that lie wholly inside [lo, hi), after waiting for the device."""
        inside = self._map.inside(lo, hi)
        if not inside:
            return 0
        self._memory.attach()
        self._synchronize()
        for a, b in inside:
            for chunk in range(a, b):
                self._unmap([chunk])
                self._map.mark([(chunk, chunk + 1)], False)
        return sum(b - a for a, b in inside) * self.chunk_bytes

    def close(self) -> None:
        """Give everything back, address space included; a second call does nothing.

        Views of ``u8`` that are still held must not be used afterwards.
        """
        if not self._base:
            return
        self.decommit(0, self.reserved_bytes)
        self._memory.attach()
        self._memory.free_range(self._base, self.reserved_bytes)
        self._base = 0
        self._empty()

    def _unmap(self, chunks: list[int]) -> None:
        """Unmap chunks, each a whole mapping."""
        for chunk in chunks:
            self._memory.unmap(self._base + chunk * self.chunk_bytes, self.chunk_bytes)
