"""Models of a few pages, and devices that refuse on command."""

from __future__ import annotations

from kernels.view import Geometry
from strategies.device_host import HostDevice
from strategies.errors import OutOfMemory
from strategies.model import KVModel, LayerGroup

PAGE_TOKENS = 32
SMALL = Geometry(layers=1, kv_heads=1, q_heads=1, head_dim=64, page_tokens=PAGE_TOKENS)
PLAIN = KVModel("plain", (LayerGroup("full", SMALL, pages_per_chunk=3),))
HYBRID = KVModel(
    "hybrid",
    (
        LayerGroup("full", SMALL, pages_per_chunk=3),
        LayerGroup("local", SMALL, pages_per_chunk=2, window_tokens=4 * PAGE_TOKENS),
    ),
)
# The report's model as the scale model keeps it: 128 bytes a token, 352 KiB a chunk.
SCALED = KVModel("scaled", (LayerGroup("full", Geometry(1, 1, 4, 64), pages_per_chunk=22),))


class RefusingDevice(HostDevice):
    """A host device whose n-th next request for memory is refused, once or from then on."""

    def __init__(self, capacity_bytes: int, **options: object) -> None:
        super().__init__(capacity_bytes, **options)  # type: ignore[arg-type]
        self.requests = 0
        self._refuse_at = -1
        self._forever = False

    def refuse(self, after: int, forever: bool) -> None:
        """Refuse the request that follows ``after`` granted ones."""
        self.requests, self._refuse_at, self._forever = 0, after, forever

    def obey(self) -> None:
        """Refuse by budget only."""
        self._refuse_at = -1

    def take(
        self, phase: str, allocation: str, nbytes: int, requested_bytes: int | None = None
    ) -> None:
        if nbytes:
            at, self.requests = self.requests, self.requests + 1
            due = at >= self._refuse_at if self._forever else at == self._refuse_at
            if self._refuse_at >= 0 and due:
                asked = nbytes if requested_bytes is None else requested_bytes
                raise OutOfMemory(phase, allocation, asked, self.free_bytes(), source="budget")
        super().take(phase, allocation, nbytes, requested_bytes)


class Events:
    """An observer that keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, int]] = []

    def event(self, phase: str, allocation: str, nbytes: int, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append((phase, allocation, nbytes))

    @property
    def held_bytes(self) -> int:
        return sum(nbytes for _, _, nbytes in self.seen)
