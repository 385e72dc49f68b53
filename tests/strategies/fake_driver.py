"""A stand-in for ``cuda.bindings.driver`` that counts memory, checks rules and refuses at will.

Address ranges are real host memory, so that views can be read and written; access rights are
tracked, not enforced. Rules checked: every handle and address is an ``int``, whole mappings are
unmapped, access is set only where something is mapped, ranges are freed empty, and every call is
made with a current context.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

from strategies.host_memory import HostMapping

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY = 0, 1, 2
MAY_REFUSE = ("cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess")


class FakeDriver:
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)

    def __init__(self, capacity_bytes: int, granularity_bytes: int = 4096) -> None:
        self.capacity_bytes, self.granularity_bytes = capacity_bytes, granularity_bytes
        self.handles: dict[int, int] = {}  # handle -> bytes, until released
        self.mappings: dict[int, tuple[int, int]] = {}  # address -> (bytes, handle)
        self.readable: set[int] = set()  # addresses of mappings with access
        self.ranges: dict[int, HostMapping] = {}
        self.log: list[str] = []
        self._sizes: dict[int, int] = {}
        self._refuse = (-1, SUCCESS)
        self._local = threading.local()
        self._local.context = "primary"

    @staticmethod
    def CUmemAllocationProp() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    @staticmethod
    def CUmemAccessDesc() -> SimpleNamespace:
        return SimpleNamespace(location=SimpleNamespace())

    @property
    def physical_bytes(self) -> int:
        """A handle's memory lives until it is neither held nor mapped."""
        held = set(self.handles) | {handle for _, handle in self.mappings.values()}
        return sum(self._sizes[handle] for handle in held)

    def refuse(self, after: int, status: int = OUT_OF_MEMORY) -> None:
        """Fail the call that follows ``after`` further calls, without doing it.

        Out of memory comes from the first call from there on that can say so.
        """
        self._refuse = (len(self.log) + after, status)

    def obey(self) -> None:
        """Refuse by capacity only."""
        self._refuse = (-1, SUCCESS)

    def _enter(self, name: str, *numbers: object) -> int:
        assert getattr(self._local, "context", None) == "primary", f"{name} without a context"
        assert all(type(n) is int for n in numbers), f"{name}{numbers}"
        self.log.append(name)
        after, status = self._refuse
        due = len(self.log) - 1 >= after and (status != OUT_OF_MEMORY or name in MAY_REFUSE)
        if after < 0 or not due:
            return SUCCESS
        self.obey()
        return status

    def cuCtxGetCurrent(self):
        return SUCCESS, self._local.context

    def cuCtxSetCurrent(self, context):
        self._local.context = context
        return (self._enter("cuCtxSetCurrent"),)

    def cuMemGetAllocationGranularity(self, prop, flag):
        return SUCCESS, self.granularity_bytes

    def cuMemGetInfo(self):
        status = self._enter("cuMemGetInfo")
        return status, self.capacity_bytes - self.physical_bytes, self.capacity_bytes

    def cuMemAddressReserve(self, nbytes, alignment, address, flags):
        status = self._enter("cuMemAddressReserve", nbytes)
        if status:
            return status, 0
        made = HostMapping(nbytes)
        self.ranges[made.address] = made
        return SUCCESS, made.address

    def cuMemAddressFree(self, address, nbytes):
        status = self._enter("cuMemAddressFree", address, nbytes)
        inside = any(address <= a < address + nbytes for a in self.mappings)
        if status or inside or self.ranges[address].nbytes != nbytes:
            return (status or INVALID_VALUE,)
        self.ranges.pop(address).close()
        return (SUCCESS,)

    def cuMemCreate(self, nbytes, prop, flags):
        status = self._enter("cuMemCreate", nbytes)
        if not status and nbytes % self.granularity_bytes:
            status = INVALID_VALUE
        if not status and nbytes > self.capacity_bytes - self.physical_bytes:
            status = OUT_OF_MEMORY
        if status:
            return status, 0
        handle = len(self._sizes) + 1
        self._sizes[handle] = self.handles[handle] = nbytes
        return SUCCESS, handle

    def cuMemRelease(self, handle):
        status = self._enter("cuMemRelease", handle)
        if not status and handle not in self.handles:
            status = INVALID_VALUE
        if not status:
            del self.handles[handle]
        return (status,)

    def cuMemMap(self, address, nbytes, offset, handle, flags):
        status = self._enter("cuMemMap", address, nbytes, handle)
        taken = any(a < address + nbytes and address < a + n for a, (n, _) in self.mappings.items())
        if not status and (taken or self.handles.get(handle) != nbytes):
            status = INVALID_VALUE
        if not status:
            self.mappings[address] = (nbytes, handle)
        return (status,)

    def cuMemSetAccess(self, address, nbytes, descriptors, count):
        status = self._enter("cuMemSetAccess", address, nbytes, count)
        inside = [a for a in self.mappings if address <= a < address + nbytes]
        if not status and sum(self.mappings[a][0] for a in inside) != nbytes:
            status = INVALID_VALUE
        if not status:
            self.readable |= set(inside)
        return (status,)

    def cuMemUnmap(self, address, nbytes):
        status = self._enter("cuMemUnmap", address, nbytes)
        if not status and self.mappings.get(address, (0, 0))[0] != nbytes:
            status = INVALID_VALUE
        if not status:
            del self.mappings[address]
            self.readable.discard(address)
        return (status,)
