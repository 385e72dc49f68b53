"""Anonymous host memory with explicit residency: reserve, touch, give back, count.

The scale model's physical memory. A mapping reserves address space only (``MAP_NORESERVE``);
writing to its pages makes them resident, ``MADV_DONTNEED`` gives them back, and what is resident is
asked of the kernel, never of a counter.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE_BYTES = 4096
_PROT_NONE = 0x0
_PROT_READ_WRITE = 0x1 | 0x2
_MAP_PRIVATE_ANONYMOUS_NORESERVE = 0x02 | 0x20 | 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value
_MADV_DONTNEED, _MADV_NOHUGEPAGE, _MADV_POPULATE_WRITE = 4, 15, 23
# Errors by which a kernel says that it does not know an advice, as opposed to "no memory".
_UNKNOWN_ADVICE = (errno.EINVAL, errno.ENOSYS)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


def round_up(nbytes: int, unit_bytes: int = PAGE_BYTES) -> int:
    """Round up to the next multiple of ``unit_bytes``."""
    return -(-nbytes // unit_bytes) * unit_bytes


class HostMapping:
    """Reserved host address space whose pages are touched and given back on demand.

    Parameters
    ----------
    nbytes : int
        Rounded up to 4 KiB.

    Raises
    ------
    MemoryError
        The host gives no address space, or (in :meth:`touch`) no memory.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_up(max(nbytes, 1))
        # A page without access at either end keeps the kernel from merging neighbours into one
        # mapping, whose residency smaps could not tell apart.
        self._outer_bytes = self.nbytes + 2 * PAGE_BYTES
        outer = _libc.mmap(
            None, self._outer_bytes, _PROT_NONE, _MAP_PRIVATE_ANONYMOUS_NORESERVE, -1, 0
        )
        if outer is None or outer == _MAP_FAILED:
            raise MemoryError(f"mmap of {self.nbytes} bytes: {os.strerror(ctypes.get_errno())}")
        address = outer + PAGE_BYTES
        if _libc.mprotect(address, self.nbytes, _PROT_READ_WRITE):
            error = ctypes.get_errno()
            _libc.munmap(outer, self._outer_bytes)
            raise MemoryError(f"mprotect of {self.nbytes} bytes: {os.strerror(error)}")
        self.address: int = address
        # A huge page would make 2 MiB resident for one touched byte. Kernels without huge pages
        # refuse the advice, and then it is not needed.
        _libc.madvise(address, self.nbytes, _MADV_NOHUGEPAGE)
        buffer = (ctypes.c_uint8 * self.nbytes).from_address(address)
        self.np: npt.NDArray[np.uint8] = np.ctypeslib.as_array(buffer)

    def touch(self, lo: int, hi: int) -> None:
        """Make bytes [lo, hi) resident, without changing them; all or nothing."""
        if hi <= lo:
            return
        if _libc.madvise(self.address + lo, hi - lo, _MADV_POPULATE_WRITE) == 0:
            return
        error = ctypes.get_errno()
        if error not in _UNKNOWN_ADVICE:
            self.give_back(lo, hi)
            raise MemoryError(f"the host refused {hi - lo} bytes: {os.strerror(error)}")
        pages = self.np[lo:hi:PAGE_BYTES]
        np.bitwise_or(pages, 0, out=pages)

    def give_back(self, lo: int, hi: int) -> None:
        """Drop the pages of bytes [lo, hi); they read as zero afterwards."""
        if hi > lo and _libc.madvise(self.address + lo, hi - lo, _MADV_DONTNEED):
            raise OSError(ctypes.get_errno(), f"madvise(MADV_DONTNEED) of {hi - lo} bytes")

    def resident_bytes(self) -> int:
        """Bytes of this mapping that are in physical memory, by the kernel's own account."""
        if not self.nbytes:
            return 0
        if _mincore_is_honest():
            return _mincore_bytes(self.address, self.nbytes)
        return _smaps_bytes(self.address, self.address + self.nbytes)

    def close(self) -> None:
        """Unmap; a second call does nothing. Views of ``np`` must not be used afterwards."""
        if not self.nbytes:
            return
        self.np = np.empty(0, np.uint8)
        _libc.munmap(self.address - PAGE_BYTES, self._outer_bytes)
        self.nbytes = 0


def _mincore_bytes(address: int, nbytes: int) -> int:
    resident = np.zeros(nbytes // PAGE_BYTES, np.uint8)
    if _libc.mincore(address, nbytes, resident.ctypes.data):
        raise OSError(ctypes.get_errno(), f"mincore of {nbytes} bytes")
    return int(np.count_nonzero(resident & 1)) * PAGE_BYTES


def _smaps_bytes(lo: int, hi: int) -> int:
    """Resident bytes of the kernel mappings inside [lo, hi), by /proc/self/smaps."""
    resident, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            head = line.split(maxsplit=2)
            if head[0] == "Rss:" and inside:
                resident += int(head[1]) * 1024
            elif not head[0].endswith(":"):
                start, end = (int(part, 16) for part in head[0].split("-"))
                inside = lo <= start and end <= hi
    return resident


_honest: dict[str, bool] = {}


def _mincore_is_honest() -> bool:
    """Whether mincore tells untouched pages from touched ones; some sandboxed kernels do not."""
    if "mincore" not in _honest:
        probe: Any = HostMapping(4 * PAGE_BYTES)
        probe.np[PAGE_BYTES] = 1
        _honest["mincore"] = _mincore_bytes(probe.address, probe.nbytes) == PAGE_BYTES
        probe.close()
    return _honest["mincore"]
