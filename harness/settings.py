"""One validated configuration: plain numbers, no strings to parse, and no Hydra to import.

Everything that a trial, the planner and a row need to know is in :class:`Settings`; it goes to the
trial's process as JSON, and its content is what a trial's identity is made of.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from harness.hardware import Hardware
from harness.model_spec import ModelSpec, scaled
from harness.parallel import Parallel
from harness.ranks import all_tokens, share_tokens
from harness.workload_keys import ACCOUNTED
from strategies.model import KVModel


@dataclass(frozen=True)
class TrialOptions:
    """How a trial is run and timed (conf: ``trial``), with its defaults filled in."""

    timing: bool
    arena: str
    page_tokens: int
    chunk_target_bytes: int
    table_order: str
    prefill_chunk_tokens: int
    prefill_histories: int
    max_samples: int
    timeout_seconds: float
    read_weights: str


@dataclass(frozen=True)
class Settings:
    """A configuration that can be run or planned."""

    experiment: str
    strategy: str
    options: dict[str, Any]
    model: ModelSpec
    hardware: Hardware
    workload: dict[str, Any]
    parallel: Parallel
    trial: TrialOptions
    context_tokens: int
    contexts: tuple[int, ...]
    fills: tuple[float, ...] | None
    sequences: int
    brackets: bool
    bracket_repeats: int
    capacity: bool
    repeats: int
    one_process: bool
    seed: int
    fault: dict[str, Any]
    claims_from: tuple[str, ...]
    results: str
    overrides: tuple[str, ...] = ()
    arm: str = ""
    # Of an engine that is to be started: {"python": path, or None where it is not installed}.
    engine: dict[str, Any] = field(default_factory=dict)

    @property
    def on_host(self) -> bool:
        """Whether this is the scale model."""
        return self.hardware.kind == "scale_model"

    @property
    def scale(self) -> int:
        """Modelled bytes per byte that is really held: 1 on a GPU."""
        return self.model.scale(self.parallel.tp) if self.on_host else 1

    @property
    def accounts_only(self) -> bool:
        """Whether tokens are accounted, neither written nor read by a kernel."""
        return self.workload["kind"] in ACCOUNTED

    @property
    def basis(self) -> str:
        """What a row of these settings rests on."""
        if self.parallel.planned:
            return "planned"
        return "scale_model" if self.on_host else "measured"

    @property
    def device_bytes(self) -> int:
        """Capacity in the bytes that a trial really uses."""
        return self.hardware.capacity_bytes // self.scale

    @property
    def grain_tokens(self) -> int:
        """Tokens that a sequence is given room for at once: an engine's block or page, or ours."""
        own = self.options.get("block_size") or self.options.get("page_size")
        return int(own or self.trial.page_tokens)

    def full_model(self) -> KVModel:
        """What a rank of the modelled device stores."""
        model = self.model.kv_model(
            self.parallel.tp, self.trial.page_tokens, self.trial.chunk_target_bytes
        )
        ranks = self.parallel.context_ranks
        if ranks == 1:
            return model
        # A rank's share of a window is a window of its own tokens: pages are dealt out in turn.
        groups = [replace(g, window_tokens=g.window_tokens // ranks) for g in model.groups]
        return replace(model, groups=tuple(groups))

    def kv_model(self) -> KVModel:
        """What a rank really stores here: full size on a GPU, scaled on the host."""
        full = self.full_model()
        return scaled(full) if self.on_host else full

    def local_tokens(self, tokens: int, context_index: int = 0) -> int:
        """Tokens of a sequence that one rank keeps: all, or its share under context parallelism."""
        ranks = self.parallel.context_ranks
        return share_tokens(tokens, self.trial.page_tokens, ranks, context_index)

    def all_tokens(self, local_tokens: int) -> int:
        """The longest sequence of which a rank keeps at most ``local_tokens``."""
        return all_tokens(local_tokens, self.trial.page_tokens, self.parallel.context_ranks)


def to_json(settings: Settings) -> dict[str, Any]:
    """A plain dictionary for a trial's process."""
    return asdict(settings)


def from_json(data: dict[str, Any]) -> Settings:
    """The inverse of :func:`to_json`."""
    made = Settings(**{**data, "contexts": tuple(data["contexts"])})
    return replace(
        made,
        model=ModelSpec(**data["model"]),
        hardware=Hardware(**data["hardware"]),
        parallel=Parallel(**data["parallel"]),
        trial=TrialOptions(**data["trial"]),
        fills=None if data["fills"] is None else tuple(data["fills"]),
        claims_from=tuple(data["claims_from"]),
        overrides=tuple(data["overrides"]),
    )
