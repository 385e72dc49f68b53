"""Physical memory by the CUDA driver: address ranges, handles, mappings.

A thin, typed layer over ``cuda.bindings.driver`` that turns status codes into exceptions and every
handle into an ``int`` (``CUdeviceptr(5) == 5`` is False). The driver module is passed in, so that
the arena can be tested against a fake that counts handles and refuses at will.
"""

from __future__ import annotations

from typing import Any

_CUDA_SUCCESS = 0
_CUDA_ERROR_OUT_OF_MEMORY = 2


class DriverRefusal(Exception):
    """CUDA_ERROR_OUT_OF_MEMORY: not sticky, the context goes on."""


class DriverError(RuntimeError):
    """Any other status of the driver."""


def load_driver() -> Any:  # noqa: ANN401
    """Import ``cuda.bindings.driver`` (12.8 or newer)."""
    from cuda.bindings import driver

    return driver


class DriverMemory:
    """Memory calls of one device in the context that is current when this is made.

    Parameters
    ----------
    index : int
        Ordinal of the device.
    driver : module
        ``cuda.bindings.driver`` or what behaves like it.
    """

    def __init__(self, index: int, driver: Any) -> None:  # noqa: ANN401
        self._driver = driver
        self._context = self._call("cuCtxGetCurrent")
        location = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._property = driver.CUmemAllocationProp()
        self._property.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._property.location.type = location
        self._property.location.id = index
        access = driver.CUmemAccessDesc()
        access.location.type = location
        access.location.id = index
        access.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._access = [access]
        minimum = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity_bytes = int(
            self._call("cuMemGetAllocationGranularity", self._property, minimum)
        )

    def attach(self) -> None:
        """Make the context current in the calling thread."""
        self._call("cuCtxSetCurrent", self._context)

    def free_bytes(self) -> int:
        """Bytes that the driver says are free on the device."""
        return int(self._call("cuMemGetInfo")[0])

    def reserve(self, nbytes: int) -> int:
        """Reserve an address range; returns its address."""
        return int(self._call("cuMemAddressReserve", nbytes, 0, 0, 0))

    def free_range(self, address: int, nbytes: int) -> None:
        """Give an address range back; nothing may be mapped in it."""
        self._call("cuMemAddressFree", address, nbytes)

    def create(self, nbytes: int) -> int:
        """Create physical memory; raises :class:`DriverRefusal` when there is none."""
        return int(self._call("cuMemCreate", nbytes, self._property, 0))

    def release(self, handle: int) -> None:
        """Drop a handle; the memory stays as long as it is mapped."""
        self._call("cuMemRelease", handle)

    def map_new(self, address: int, nbytes: int) -> None:
        """Create physical memory and map it at ``address``, or do nothing.

        The handle is dropped at once, so that unmapping frees the memory.
        """
        handle = self.create(nbytes)
        try:
            self._call("cuMemMap", address, nbytes, 0, handle, 0)
        except BaseException:
            self.release(handle)
            raise
        try:
            self.release(handle)
        except BaseException:
            self.unmap(address, nbytes)
            raise

    def allow(self, address: int, nbytes: int) -> None:
        """Allow reads and writes of mapped bytes."""
        self._call("cuMemSetAccess", address, nbytes, self._access, 1)

    def unmap(self, address: int, nbytes: int) -> None:
        """Unmap one whole mapping. Does not wait for kernels that still read it."""
        self._call("cuMemUnmap", address, nbytes)

    def _call(self, name: str, *arguments: Any) -> Any:  # noqa: ANN401
        status, *values = getattr(self._driver, name)(*arguments)
        if int(status) == _CUDA_ERROR_OUT_OF_MEMORY:
            raise DriverRefusal(name)
        if int(status) != _CUDA_SUCCESS:
            raise DriverError(f"{name}: {status!r}")
        return values[0] if len(values) == 1 else values
