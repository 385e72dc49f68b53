"""From a composed configuration to :class:`harness.settings.Settings`: ranges and rules.

Types and names of keys are checked by Hydra against :mod:`harness.schema`; everything else here,
each complaint in one line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from harness.compose import compose_config, expand
from harness.engines.choose import check_engine, engine_of
from harness.engines.stand_in import stand_in
from harness.hardware import resolve
from harness.model_spec import ModelSpec, model_spec, shares
from harness.parallel import MAX_RANKS, Parallel, parallel_of
from harness.settings import Settings, TrialOptions
from harness.sizes import BadValue, parse_bytes, parse_tokens
from harness.workload_keys import ACCOUNTED, ACCOUNTED_PAGE_TOKENS, workload_keys

FAULTS = (
    "none segfault hang kill exception hidden_allocation host_oom kill_harness flipped_signs"
).split()
FAULT_PHASES = ("context", "weights", "tables", "pool", "workspace", "fill", "decode")
PAGE_TOKENS = (16, 32, 64, 128)  # of the kernels
# Keys of a strategy that are sizes of the modelled device, typed as text.
_BYTE_OPTIONS = ("low_water", "kv_cache_memory_bytes")


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
    model = _model(conf, parallel, overrides)
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
        engine=engine_of(conf, planning) if conf.experiment.start_engines else {},
    )
    if made.engine:
        check_engine(made)
        weights = stand_in(made).weights_bytes
        made = replace(made, model=replace(model, weights_bytes=weights))
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


def _model(conf: DictConfig, parallel: Parallel, overrides: Sequence[str]) -> ModelSpec:
    """The model over its ranks; where a number of ranks was typed, it is what must fit."""
    try:
        return model_spec(conf.model, parallel.tp)
    except BadValue as error:
        typed = any(w.startswith("parallel.ranks=") for w in overrides)
        if not typed or error.key not in ("model.q_heads_total", "model.kv_heads_total"):
            raise
        fitting = [tp for tp in range(1, MAX_RANKS + 1) if shares(conf.model, tp)]
        ranks = [str(tp * parallel.context_ranks) for tp in fitting]
        if not ranks:
            raise
        heads = f"{conf.model.q_heads_total} query and {conf.model.kv_heads_total} KV heads"
        allowed = f"{', '.join(ranks)} with {heads}"
        raise BadValue("parallel.ranks", parallel.ranks, allowed) from None


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
    if conf.prefill_histories != 0 and not 2 <= conf.prefill_histories <= 50:
        raise BadValue("trial.prefill_histories", conf.prefill_histories, "0, or from 2 to 50")
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
    if conf.kind == "flipped_signs":
        _choice("fault.phase", conf.phase, FAULT_PHASES[-1:])
    fault = {"kind": str(conf.kind), "phase": str(conf.phase), "bytes": nbytes}
    if conf.rank is None:
        return fault
    if isinstance(conf.rank, bool) or not isinstance(conf.rank, int) or conf.rank < 0:
        raise BadValue("fault.rank", conf.rank, "null, or the number of a rank")
    return fault | {"rank": conf.rank}
