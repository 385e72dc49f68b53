"""Ballast: physical memory that is held but never mapped, to make a device smaller."""

from __future__ import annotations

from strategies.driver_memory import DriverMemory, DriverRefusal

# One handle must be found in one piece of the physical memory; pieces of this size always are.
PIECE_BYTES = 1 << 30


class Ballast:
    """Handles of unmapped memory; what is left is all that the driver can still give.

    Parameters
    ----------
    memory : DriverMemory
    nbytes : int
        Rounded up to the driver's granularity.

    Raises
    ------
    DriverRefusal
        The device has not that much; nothing is held then.
    """

    def __init__(self, memory: DriverMemory, nbytes: int) -> None:
        self._memory = memory
        granularity = memory.granularity_bytes
        self.nbytes = -(-nbytes // granularity) * granularity
        self._handles: list[int] = []
        left = self.nbytes
        try:
            while left:
                piece = min(left, PIECE_BYTES)
                self._handles.append(memory.create(piece))
                left -= piece
        except DriverRefusal:
            self.close()
            raise

    def close(self) -> None:
        """Give it back; a second call does nothing."""
        while self._handles:
            self._memory.release(self._handles.pop())
        self.nbytes = 0
