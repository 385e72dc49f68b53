"""What the planner is asked, and what it answers: plain numbers, no Hydra, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from harness.torch_segments import taken_bytes
from strategies.engine_model import EngineModel, engine_total_bytes
from strategies.model import KVModel

# Granularity of a device's allocations: a page on the host, a large block on a GPU.
HOST_GRANULARITY_BYTES = 4096
CUDA_GRANULARITY_BYTES = 2 << 20


@dataclass(frozen=True)
class PlanSpec:
    """One trial, as numbers. Bytes are the device's own: those of the scale model where it is one.

    Parameters
    ----------
    strategy : str
        ``static``, ``paged``, ``eager_pages``, ``sglang`` or ``vllm``.
    options : dict
        The strategy's configured keys.
    model : KVModel or None
        What a rank stores, scaled like the device; None only for engines.
    engine_model : EngineModel or None
        The modelled rank, never scaled; needed by engines.
    context_tokens, sequences : int
        Configured maximum of one sequence on this rank, and sequences of it.
    filled_sequences : int, optional
        Sequences that are filled, one after another; all unless given.
    lengths : tuple of int, optional
        Tokens that each sequence of a batch is filled to, in order, instead of the two above.
    fill : float
        Share of the context that each of them is filled to.
    capacity_bytes : int
        Free before anything.
    weights_bytes, context_bytes, nccl_bytes : int
    workspace_items : tuple[tuple[str, int], ...]
        Buffers that are allocated once the strategy has started, in order.
    scale : int
        Bytes of the modelled device per byte here.
    device_total_bytes : int
        Of the modelled GPU, as CUDA shows it; 0: the capacity.
    hopper : bool
        Decides the engines' default attention backend.
    granularity_bytes : int
        What the device rounds an allocation up to.
    """

    strategy: str
    options: dict[str, Any] = field(default_factory=dict)
    model: KVModel | None = None
    engine_model: EngineModel | None = None
    context_tokens: int = 10_000_000
    fill: float = 1.0
    sequences: int = 1
    filled_sequences: int | None = None
    lengths: tuple[int, ...] | None = None
    capacity_bytes: int = 0
    context_bytes: int = 0
    nccl_bytes: int = 0
    weights_bytes: int = 0
    workspace_items: tuple[tuple[str, int], ...] = ()
    scale: int = 1
    device_total_bytes: int = 0
    hopper: bool = True
    granularity_bytes: int = HOST_GRANULARITY_BYTES

    @property
    def workspace_bytes(self) -> int:
        """Bytes that are allocated once the strategy has started, as the device rounds them."""
        return sum(self.workspace_taken_bytes)

    @property
    def workspace_taken_bytes(self) -> list[int]:
        """Bytes that each buffer of the workspace takes of the device, in their order."""
        unit = 0 if self.granularity_bytes == CUDA_GRANULARITY_BYTES else self.granularity_bytes
        return taken_bytes((nbytes for _, nbytes in self.workspace_items), unit)

    @property
    def modelled_total_bytes(self) -> int:
        """Of the modelled GPU: what engines take their fractions of."""
        return engine_total_bytes(self.capacity_bytes * self.scale, self.device_total_bytes)

    @property
    def target_tokens(self) -> int:
        """Tokens that each sequence is filled to, unless ``lengths`` says otherwise."""
        return int(self.context_tokens * self.fill + 1e-9)

    @property
    def growing(self) -> int:
        """How many sequences are filled."""
        return sum(count for _, count in self.targets)

    @property
    def targets(self) -> list[tuple[int, int]]:
        """Tokens that sequences are filled to, in order: (tokens, how many alike follow)."""
        if self.lengths is not None:
            return [(n, len(list(alike))) for n, alike in groupby(self.lengths)]
        alone = self.filled_sequences
        return [(self.target_tokens, self.sequences if alone is None else alone)]

    def at(self, context_tokens: int) -> PlanSpec:
        """Ask the same of another context."""
        return replace(self, context_tokens=context_tokens)

    def filled(self, fill: float) -> PlanSpec:
        """Ask the same of another fill, alike for every sequence."""
        return replace(self, fill=fill, lengths=None)

    def with_options(self, **changed: Any) -> PlanSpec:  # noqa: ANN401
        """Ask the same with other keys of the strategy."""
        return replace(self, options={**self.options, **changed})


@dataclass(frozen=True)
class PlanItem:
    """One predicted allocation, in the device's own bytes.

    ``taken_bytes`` are those of a failed one's pieces that fitted before.
    """

    phase: str
    allocation: str
    nbytes: int
    location: str = "device"
    source: str = ""
    shape: str = ""
    failed: bool = False
    taken_bytes: int = 0


@dataclass(frozen=True)
class OomPoint:
    """A bracket in tokens; ``None`` where there is no such end.

    ``limited_by`` is ``oom``, ``refused`` or ``sweep_end``; ``phase`` and ``allocation`` say what
    fails at ``not_ok``.
    """

    ok: int | None
    not_ok: int | None
    limited_by: str
    phase: str = ""
    allocation: str = ""


@dataclass(frozen=True)
class OomPoints:
    """The three points at which a strategy ends."""

    startup: OomPoint
    admit: OomPoint
    resident: OomPoint


@dataclass(frozen=True)
class Prediction:
    """How a trial would go.

    ``items`` are in order and end with the one that fails, when one does. ``outcome`` is ``ok``,
    ``oom`` or ``refused``; ``phase`` and ``allocation`` say where. ``held_bytes`` are in use at the
    end; the peak has besides what an item needed only while it was made.
    """

    items: tuple[PlanItem, ...]
    outcome: str
    phase: str = ""
    allocation: str = ""
    message: str = ""
    requested_bytes: int = 0
    free_bytes: int = 0
    predicted_tables_bytes: int = 0
    predicted_kv_bytes: int = 0
    predicted_peak_bytes: int = 0
    held_bytes: int = 0
    pool_tokens: int = 0
    max_request_tokens: int = 0
    resident_tokens: int = 0
    started: bool = False
    admits_context: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
