"""What torch's CUDA allocator takes from the driver for buffers that are made one after another.

``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.11): buffers up to 1 MiB share segments of 2 MiB,
those below 10 MiB segments of 20 MiB, and larger ones are rounded up to 2 MiB.
"""

from __future__ import annotations

from collections.abc import Iterable

from harness.sizes import MIB

SMALL_BYTES, SMALL_SEGMENT_BYTES = MIB, 2 * MIB
LARGE_BYTES, LARGE_SEGMENT_BYTES = 10 * MIB, 20 * MIB
ROUND_BYTES = 2 * MIB
BLOCK_BYTES = 512


class TorchSegments:
    """Segments with room left; nothing is freed."""

    def __init__(self) -> None:
        self._small_left = 0
        self._large_left = 0

    def take(self, nbytes: int) -> int:
        """Bytes that the driver gives for a buffer: 0 where a segment has room for it."""
        block = -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES
        if nbytes <= SMALL_BYTES:
            if block <= self._small_left:
                self._small_left -= block
                return 0
            self._small_left = SMALL_SEGMENT_BYTES - block
            return SMALL_SEGMENT_BYTES
        if block <= self._large_left:
            self._large_left -= block
            return 0
        if nbytes < LARGE_BYTES:
            self._large_left = LARGE_SEGMENT_BYTES - block
            return LARGE_SEGMENT_BYTES
        return -(-nbytes // ROUND_BYTES) * ROUND_BYTES


def taken_bytes(sizes: Iterable[int], host_unit_bytes: int = 0) -> list[int]:
    """Bytes that each buffer takes of the device: torch's segments, or rounded up on the host.

    Parameters
    ----------
    host_unit_bytes : int
        What the scale model rounds an allocation up to; 0 on CUDA.
    """
    if host_unit_bytes:
        return [-(-n // host_unit_bytes) * host_unit_bytes for n in sizes]
    segments = TorchSegments()
    return [segments.take(n) for n in sizes]
