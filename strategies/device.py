"""What every device offers, be it a GPU or the scale model on the host.

Every allocation on a device goes through it and is told to its observer, so that a ledger sees all
of them and an out-of-memory error always says what was asked for and what was free.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Observer(Protocol):
    """Told of every change of memory; the harness's ledger is one."""

    def event(self, phase: str, allocation: str, nbytes: int, seconds: float) -> None:
        """``nbytes`` more (or, negative, fewer) bytes are held under this name."""


class Allocation(Protocol):
    """One named allocation of a device, zeroed or touched, so that it is physically there."""

    nbytes: int

    @property
    def u8(self) -> torch.Tensor:
        """The bytes as a uint8 tensor."""

    def free(self) -> None:
        """Give it back; a second call does nothing."""


class Arena(Protocol):
    """Reserved address space of which whole chunks are backed by physical memory.

    ``commit`` is all or nothing and raises :class:`strategies.errors.OutOfMemory`.
    """

    kind: str
    fresh_is_zero: bool  # whether newly committed bytes read as zero

    @property
    def reserved_bytes(self) -> int:
        """Bytes of address space."""

    @property
    def committed_bytes(self) -> int:
        """Bytes of physical memory behind it."""

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk."""

    @property
    def u8(self) -> torch.Tensor:
        """uint8 ``[reserved_bytes]``; only committed parts may be touched."""

    def commit(self, lo: int, hi: int, phase: str, allocation: str) -> int:
        """Back bytes [lo, hi) (rounded out to chunks); returns the bytes newly committed."""

    def decommit(self, lo: int, hi: int) -> int:
        """Give back the chunks that lie wholly inside [lo, hi); returns their bytes."""

    def zero(self, lo: int, hi: int) -> None:
        """Fill committed bytes [lo, hi) with zeros."""

    def close(self) -> None:
        """Give everything back, address space included."""


class Device(Protocol):
    """A GPU, or the scale model's slice of host memory."""

    kind: str  # "cuda" | "host"
    name: str
    scale: int  # bytes of the modelled device per byte here; 1 on a GPU
    capacity_bytes: int  # free before the first allocation, ballast taken off
    oom_source: str
    uuid: str  # of the GPU, as NVML writes it; empty without one
    observer: Observer | None

    def free_bytes(self) -> int:
        """Bytes that can still be had."""

    def used_bytes(self) -> int:
        """Read the device's own meter: bytes in use, whoever holds them, ballast not counted."""

    def meters(self) -> dict[str, int]:
        """Read the other meters; empty on the host.

        On CUDA ``torch_reserved_bytes``, ``torch_allocated_bytes``, ``torch_peak_reserved_bytes``
        and ``nvml_used_bytes`` at the least.
        """

    def allocate(self, phase: str, allocation: str, nbytes: int) -> Allocation:
        """``nbytes`` really backed bytes; raises ``OutOfMemory``."""

    def reserve(self, reserve_bytes: int, chunk_bytes: int, kind: str = "auto") -> Arena:
        """Make an arena; ``kind`` is ``mapped`` or ``malloc`` on CUDA and ``mmap`` on the host."""

    def tensor(self, data: Any, dtype: str) -> torch.Tensor:  # noqa: ANN401
        """Make a small tensor on the device (page tables, lengths), outside the ledger."""

    def synchronize(self) -> None:
        """Wait for the device."""

    def close(self) -> None:
        """Give everything back."""
