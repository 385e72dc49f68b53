"""One validated configuration: plain numbers, no Hydra, no strings to parse.

Everything that a trial, the planner and a row need to know is in :class:`Settings`; it goes to the
trial's process as JSON, and its content is what a trial's identity is made of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from harness.compose import compose_config, expand
from harness.hardware import Hardware, resolve
from harness.model_spec import ModelSpec, model_spec, scaled
from harness.parallel import Parallel, parallel_of
from harness.ranks import all_tokens, share_tokens
from harness.sizes import BadValue, parse_bytes, parse_tokens
from harness.workload_keys import ACCOUNTED, ACCOUNTED_PAGE_TOKENS, workload_keys
from strategies.model import KVModel

FAULTS = ("none segfault hang kill exception hidden_allocation host_oom kill_harness").split()
FAULT_PHASES = ("context", "weights", "tables", "pool", "workspace", "fill", "decode")
PAGE_TOKENS = (16, 32, 64, 128)  # of the kernels
# Keys of a strategy that are sizes of the modelled device, typed as text.
_BYTE_OPTIONS = ("low_water", "kv_cache_memory_bytes")


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


def compose_settings(arguments: Sequence[str], planning: bool = False) -> Settings:
    """Compose and validate one configuration from ``key=value`` words.

    Raises
    ------
    BadValue
        One line that names key, value and what is allowed.
    """
    (overrides,) = expand(arguments, multirun=False)
    return settings_of(compose_config(overrides), overrides, planning)


def settings_of(conf: DictConfig, overrides: Sequence[str], planning: bool = False) -> Settings:
    """Validate a composed configuration; raises :class:`BadValue`."""
    hardware = resolve(conf.hardware, planning)
    on_host = hardware.kind == "scale_model"
    parallel = parallel_of(conf.parallel, on_host, hardware.index, planning)
    context = parse_tokens(_scalar(conf.context, "context"))
    model = model_spec(conf.model, parallel.tp)
    workload = workload_keys(conf.workload)
    accounted = workload["kind"] in ACCOUNTED
    _range("seed", conf.seed, 0, 2**32 - 1)
    for key, top in (("bracket_repeats", 10), ("repeats", 100)):
        _range(f"sweep.{key}", conf.sweep[key], 1, top)
    if not str(conf.results).strip():
        raise BadValue("results", conf.results, "a folder")
    earlier = _claims_from(conf.claims)
    named = _name("experiment.name", conf.experiment.name)
    made = Settings(
        experiment="claims" if earlier and named == "sweep" else named,
        strategy=str(conf.strategy.name),
        options=_strategy_options(conf.strategy),
        model=model,
        hardware=hardware,
        workload=workload,
        parallel=parallel,
        trial=_trial(conf.trial, on_host, accounted),
        context_tokens=context,
        contexts=(context,) if accounted else _contexts(conf.sweep, context),
        fills=(1.0,) if accounted else _fills(conf.fill),
        sequences=int(workload["sequences"]),
        brackets=bool(conf.sweep.brackets) and not accounted,
        bracket_repeats=int(conf.sweep.bracket_repeats),
        capacity=bool(conf.sweep.capacity) and not accounted,
        repeats=int(conf.sweep.repeats),
        one_process=bool(conf.sweep.one_process),
        seed=int(conf.seed),
        fault=_fault(conf.fault),
        claims_from=earlier,
        results=str(conf.results),
        overrides=tuple(overrides),
        arm=_name("experiment.arm", conf.experiment.arm) if conf.experiment.arm else "",
    )
    if accounted and (parallel.processes > 1 or parallel.context_ranks > 1):
        allowed = "with one process and parallel.context_ranks=1"
        raise BadValue("workload", workload["name"], allowed)
    _check_weights(made)
    step = parallel.context_ranks * made.trial.page_tokens
    if model.hybrid and model.window_tokens % step:
        raise BadValue(
            "parallel.context_ranks",
            parallel.context_ranks,
            f"ranks that share {model.window_tokens} window tokens in pages",
        )
    if made.device_bytes < 1:
        raise BadValue("hardware.capacity", conf.hardware.capacity, f"at least {made.scale} bytes")
    return made


def _check_weights(made: Settings) -> None:
    """Whether every layer has weights to read, when a step is to read them."""
    kind = made.trial.read_weights
    if kind == "none":
        return
    if made.strategy in ("sglang", "vllm"):
        raise BadValue("trial.read_weights", kind, f"none with strategy={made.strategy}: not timed")
    least = made.model.layers * made.scale * 512
    if made.model.weights_bytes < least:
        raise BadValue("trial.read_weights", kind, f"none with weights below {least} bytes")


def _name(key: str, value: object) -> str:
    """A word that is safe as a folder's name and in a table."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}", str(value)):
        raise BadValue(key, value, "up to 64 letters, digits, '_', '.', '+' or '-'")
    return str(value)


def _plain(node: DictConfig) -> dict[str, Any]:
    out = OmegaConf.to_container(node, resolve=True)
    assert isinstance(out, dict)
    return {str(k): v for k, v in out.items()}


def _scalar(value: object, key: str) -> object:
    if isinstance(value, DictConfig | ListConfig | bool) or value is None:
        raise BadValue(key, value, "one value")
    return value


def _range(key: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise BadValue(key, value, f"{low} to {high}")


def _choice(key: str, value: object, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise BadValue(key, value, ", ".join(allowed))


def _strategy_options(conf: DictConfig) -> dict[str, Any]:
    options = _plain(conf)
    options.pop("name")
    for key in _BYTE_OPTIONS:
        if options.get(key) is not None:
            options[key] = parse_bytes(options[key], f"strategy.{key}")
    if "mem_fraction" in options and not 0 < options["mem_fraction"] <= 1:
        raise BadValue("strategy.mem_fraction", options["mem_fraction"], "above 0, up to 1")
    for key, allowed in (
        ("mem_fraction_of", ("context", "device")),
        ("slot_policy", ("max", "pow2", "exact")),
        ("growth", ("sync", "ahead")),
        ("release", ("immediate", "deferred")),
        ("page_policy", ("lowest", "committed")),
    ):
        if key in options:
            _choice(f"strategy.{key}", options[key], allowed)
    if "ahead_chunks" in options:
        _range("strategy.ahead_chunks", options["ahead_chunks"], 1, 1024)
    return options


def _trial(conf: DictConfig, on_host: bool, accounted: bool) -> TrialOptions:
    _choice(
        "trial.arena", conf.arena, ("auto", "mmap") if on_host else ("auto", "mapped", "malloc")
    )
    _choice("trial.table_order", conf.table_order, ("identity", "shuffled"))
    _choice("trial.read_weights", conf.read_weights, ("none", "device", "offload"))
    pages = ACCOUNTED_PAGE_TOKENS if accounted else PAGE_TOKENS
    if conf.page_tokens not in pages:
        raise BadValue("trial.page_tokens", conf.page_tokens, ", ".join(map(str, pages)))
    _range("trial.prefill_histories", conf.prefill_histories, 2, 50)
    _range("trial.max_samples", conf.max_samples, 2, 1000)
    _range("trial.timeout_seconds", conf.timeout_seconds, 0.1, 86400)
    target = parse_bytes(conf.chunk_target, "trial.chunk_target")
    _range("trial.chunk_target", target, 1 << 20, 1 << 34)
    chunk = 16 if on_host else 2048
    if conf.prefill_chunk_tokens is not None:
        chunk = parse_tokens(conf.prefill_chunk_tokens, "trial.prefill_chunk_tokens")
        _range("trial.prefill_chunk_tokens", chunk, 1, 65536)
    return TrialOptions(
        timing=bool(conf.timing) and not accounted,
        arena=str(conf.arena),
        page_tokens=int(conf.page_tokens),
        chunk_target_bytes=target,
        table_order=str(conf.table_order),
        prefill_chunk_tokens=chunk,
        prefill_histories=int(conf.prefill_histories),
        max_samples=int(conf.max_samples),
        timeout_seconds=float(conf.timeout_seconds),
        read_weights=str(conf.read_weights),
    )


def _items(value: object, key: str) -> list[Any]:
    if isinstance(value, DictConfig):
        raise BadValue(key, value, "a value or a list")
    items = list(value) if isinstance(value, ListConfig | tuple | list) else [value]
    if not 1 <= len(items) <= 100:
        raise BadValue(key, value, "1 to 100 values")
    return items


def _numbers(value: object, key: str, low: float, allowed: str) -> list[float]:
    out = []
    for item in _items(value, key):
        number = item if isinstance(item, int | float) and not isinstance(item, bool) else None
        if number is None or not low <= number <= 1:
            raise BadValue(key, item, allowed)
        out.append(float(number))
    return out


def _contexts(conf: DictConfig, context: int) -> tuple[int, ...]:
    if conf.contexts is not None:
        found = [
            parse_tokens(_scalar(c, "sweep.contexts"), "sweep.contexts")
            for c in _items(conf.contexts, "sweep.contexts")
        ]
    else:
        shares = _numbers(conf.points, "sweep.points", 1e-9, "numbers above 0, up to 1")
        found = [max(1, math.floor(context * s)) for s in shares]
    return tuple(sorted(set(found)))


def _fills(value: object) -> tuple[float, ...] | None:
    if value is None:
        return None
    return tuple(sorted(set(_numbers(value, "fill", 0, "a number from 0 to 1, or a list of them"))))


def _claims_from(conf: DictConfig) -> tuple[str, ...]:
    if list(conf) != ["from"]:
        raise BadValue("claims", dict(conf), "claims.from=[RUN,...]")
    if conf["from"] is None:
        return ()
    folders = _items(conf["from"], "claims.from")
    if not all(isinstance(f, str) and f.strip() for f in folders):
        raise BadValue("claims.from", conf["from"], "folders of runs, such as [results/runs/X/Y]")
    return tuple(folders)


def _fault(conf: DictConfig) -> dict[str, Any]:
    _choice("fault.kind", conf.kind, FAULTS)
    _choice("fault.phase", conf.phase, FAULT_PHASES)
    if conf.kind == "none":
        return {"kind": "none"}
    nbytes = 0
    if conf.kind == "hidden_allocation":
        nbytes = parse_bytes(conf.bytes, "fault.bytes")
        _choice("fault.phase", conf.phase, FAULT_PHASES[1:])  # there is no device before
    fault = {"kind": str(conf.kind), "phase": str(conf.phase), "bytes": nbytes}
    if conf.rank is None:
        return fault
    if isinstance(conf.rank, bool) or not isinstance(conf.rank, int) or conf.rank < 0:
        raise BadValue("fault.rank", conf.rank, "null, or the number of a rank")
    return fault | {"rank": conf.rank}


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
