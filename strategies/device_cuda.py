"""A CUDA GPU as the strategies see it: torch's allocations, mapped arenas, the driver's meters."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from strategies.arena_malloc import MallocArena
from strategies.arena_mapped import MappedArena
from strategies.ballast import Ballast
from strategies.device import Arena, Observer
from strategies.driver_memory import DriverMemory, DriverRefusal, load_driver
from strategies.errors import OutOfMemory
from strategies.nvml import NvmlMemory, NvmlMeter

if TYPE_CHECKING:
    import torch

ARENA_KINDS = ("auto", "mapped", "malloc")


class CudaAllocation:
    """Named device memory from torch, zeroed."""

    def __init__(
        self, device: CudaDevice, phase: str, allocation: str, tensor: torch.Tensor
    ) -> None:
        self.phase, self.allocation = phase, allocation
        self.nbytes = int(tensor.numel())
        self._device = device
        self._tensor: torch.Tensor | None = tensor

    @property
    def u8(self) -> torch.Tensor:
        """The bytes as a uint8 tensor ``[nbytes]``."""
        if self._tensor is None:
            raise RuntimeError(f"{self.allocation} is freed")
        return self._tensor

    def free(self) -> None:
        """Give it back, from torch's cache to the driver; a second call does nothing."""
        if self._tensor is None:
            return
        started = time.perf_counter()
        self._tensor = None
        self._device.empty_cache()
        self._device.tell(self.phase, self.allocation, -self.nbytes, started)


class CudaDevice:
    """One GPU, from before its context on.

    Make it before anything else touches the GPU: its capacity is what is free then.

    Parameters
    ----------
    index : int
        Ordinal, as CUDA counts visible devices.
    capacity_bytes : int, optional
        Make the device smaller: the rest is held as ballast, so that the driver itself refuses.
        It is rounded down to the driver's granularity.
    observer : Observer, optional
        Told of every allocation.

    Attributes
    ----------
    capacity_bytes : int
        Free before the context, ballast taken off.
    meter : str
        ``nvml``; or ``mem_get_info`` where NVML does not show the device, and then the context's
        bytes are not seen.
    uuid : str
        As NVML writes it; empty without NVML.

    Raises
    ------
    ValueError
        ``capacity_bytes`` exceeds what is free.
    """

    kind = "cuda"
    scale = 1
    oom_source = "driver"

    def __init__(
        self,
        index: int = 0,
        capacity_bytes: int | None = None,
        observer: Observer | None = None,
    ) -> None:
        import torch

        self._torch: Any = torch
        self.index, self.observer = index, observer
        driver = load_driver()
        self._nvml = _nvml_meter(driver, index)
        before = self._nvml.read() if self._nvml else None
        torch.cuda.set_device(index)
        torch.cuda.init()
        torch.zeros(1, device=f"cuda:{index}")
        self._memory = DriverMemory(index, driver)
        self.meter = "nvml" if self._nvml else "mem_get_info"
        self.uuid = self._nvml.uuid if self._nvml else ""
        self.name = str(torch.cuda.get_device_name(index))
        self._used_before_bytes = before.used_bytes if before else self._occupied_bytes()
        free_bytes = before.free_bytes if before else self.free_bytes()
        self._ballast = self._hold(free_bytes, capacity_bytes)
        self.capacity_bytes = free_bytes - self._ballast.nbytes

    def _hold(self, free_bytes: int, capacity_bytes: int | None) -> Ballast:
        """Ballast that leaves ``capacity_bytes`` of what was free."""
        wanted = free_bytes if capacity_bytes is None else capacity_bytes
        problem = ValueError(
            f"capacity_bytes={wanted}: must be at least 1 and at most the {free_bytes} bytes "
            f"free on {self.name}"
        )
        if not 1 <= wanted <= free_bytes:
            raise problem
        try:
            return Ballast(self._memory, free_bytes - wanted)
        except DriverRefusal as refusal:  # the context alone takes more than the wanted capacity
            raise problem from refusal

    @property
    def ballast_bytes(self) -> int:
        """Bytes held to make the device smaller."""
        return self._ballast.nbytes

    def free_bytes(self) -> int:
        """Bytes that the driver can still give (``cuMemGetInfo``)."""
        return int(self._torch.cuda.mem_get_info(self.index)[0])

    def used_bytes(self) -> int:
        """Bytes in use since before the context, ballast not counted."""
        used = self._nvml.read().used_bytes if self._nvml else self._occupied_bytes()
        return used - self._used_before_bytes - self._ballast.nbytes

    def _occupied_bytes(self) -> int:
        free, total = self._torch.cuda.mem_get_info(self.index)
        return int(total - free)

    def nvml_memory(self) -> NvmlMemory | None:
        """NVML's figures of the whole GPU, ballast and other processes included."""
        return self._nvml.read() if self._nvml else None

    def meters(self) -> dict[str, int]:
        """Torch's, NVML's and the driver's figures, in bytes."""
        cuda = self._torch.cuda
        readings = {
            "torch_allocated_bytes": int(cuda.memory_allocated(self.index)),
            "torch_reserved_bytes": int(cuda.memory_reserved(self.index)),
            "torch_requested_bytes": int(
                cuda.memory_stats(self.index).get("requested_bytes.all.current", 0)
            ),
            "torch_peak_allocated_bytes": int(cuda.max_memory_allocated(self.index)),
            "torch_peak_reserved_bytes": int(cuda.max_memory_reserved(self.index)),
            "driver_free_bytes": self.free_bytes(),
            "ballast_bytes": self.ballast_bytes,
        }
        nvml = self.nvml_memory()
        if nvml is not None:
            readings["nvml_used_bytes"] = nvml.used_bytes
            readings["nvml_reserved_bytes"] = nvml.reserved_bytes
        return readings

    def allocate(self, phase: str, allocation: str, nbytes: int) -> CudaAllocation:
        """``nbytes`` of device memory by torch, zeroed.

        Raises
        ------
        OutOfMemory
            Torch's allocator refused (``source="torch"``).
        """
        started = time.perf_counter()
        tensor = self._empty(phase, allocation, nbytes).zero_()
        made = CudaAllocation(self, phase, allocation, tensor)
        self.tell(phase, allocation, nbytes, started)
        return made

    def _empty(self, phase: str, allocation: str, nbytes: int) -> torch.Tensor:
        import torch

        free = self.free_bytes()
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=f"cuda:{self.index}")
        except torch.OutOfMemoryError as refusal:
            raise OutOfMemory(phase, allocation, nbytes, free, source="torch") from refusal

    def reserve(self, reserve_bytes: int, chunk_bytes: int, kind: str = "auto") -> Arena:
        """Make an arena; ``kind`` is ``auto`` (mapped), ``mapped`` or ``malloc``."""
        if kind not in ARENA_KINDS:
            raise ValueError(f"arena={kind}: allowed on CUDA are {', '.join(ARENA_KINDS)}")
        if kind == "malloc":
            return MallocArena(self._empty, reserve_bytes, chunk_bytes, self.empty_cache)
        return MappedArena(
            self._memory, reserve_bytes, chunk_bytes, self.synchronize, device_id=self.index
        )

    def tensor(self, data: Any, dtype: str) -> torch.Tensor:  # noqa: ANN401
        """Copy ``data`` (anything numpy takes) to the device, outside the ledger."""
        host = self._torch.from_numpy(np.ascontiguousarray(data, dtype=dtype))
        moved: torch.Tensor = host.to(f"cuda:{self.index}")
        return moved

    def synchronize(self) -> None:
        """Wait for everything that runs on the device."""
        self._torch.cuda.synchronize(self.index)

    def empty_cache(self) -> None:
        """Let torch give unused cached memory back to the driver."""
        self._torch.cuda.empty_cache()

    def close(self) -> None:
        """Give the ballast back; allocations and arenas are their owners'."""
        self._ballast.close()

    def tell(self, phase: str, allocation: str, nbytes: int, started: float) -> None:
        """Pass an event on to the observer."""
        if self.observer is not None:
            self.observer.event(phase, allocation, nbytes, time.perf_counter() - started)


def _nvml_meter(driver: Any, index: int) -> NvmlMeter | None:  # noqa: ANN401
    """NVML's meter of a CUDA device, found without making a context; None without NVML."""
    driver.cuInit(0)
    status, device = driver.cuDeviceGet(index)
    if int(status):
        raise RuntimeError(f"there is no CUDA device {index}: {status!r}")
    uuid = driver.cuDeviceGetUuid(device)[1]
    try:
        return NvmlMeter(bytes(uuid.bytes))
    except (ImportError, RuntimeError):
        return None
