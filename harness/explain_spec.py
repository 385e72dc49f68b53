"""From a launch, a config and a GPU to the planner's question, with what the log already knows."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from harness.explain_launch import Launch
from harness.explain_log import LogFacts
from harness.gpus import Gpu
from harness.hf_config import HFConfig
from harness.planner_spec import CUDA_GRANULARITY_BYTES, PlanSpec
from harness.sizes import GIB
from strategies import sglang_tables, vllm_tables
from strategies.engine_model import EngineModel

# What CUDA and libraries take before the weights, read off starts on an H200 with one rank:
# SGLang 0.5.12.post1 had 139.13 of 139.80 GiB left, vLLM 0.23.0 at least 138.84.
CONTEXT_BYTES = {"sglang": round(0.67 * GIB), "vllm": round(0.96 * GIB)}
VERSIONS = {"sglang": sglang_tables.VERSIONS, "vllm": vllm_tables.VERSIONS}
DEFAULTS = {"sglang": "0.5.12.post1", "vllm": "0.23.0"}
ROPE_ITEMSIZE = {"sglang": 4, "vllm": 2}


@dataclass(frozen=True)
class Question:
    """What the planner is asked, and what had to be assumed for it."""

    spec: PlanSpec
    notes: tuple[str, ...]


def known_version(engine: str, version: str) -> tuple[str, str]:
    """The modelled release nearest below ``version``, and a note when it is not that one."""
    known = VERSIONS[engine]
    if not version:
        return DEFAULTS[engine], f"version unknown: formulas of {engine} {DEFAULTS[engine]}"
    if version in known:
        return version, ""
    parts = _numbers(version)
    older = [name for name in known if _numbers(name) <= parts]
    chosen = older[-1] if older else known[0]
    return chosen, f"{engine} {version} is not modelled: formulas of {chosen}"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:4])


def question(launch: Launch, config: HFConfig, gpu: Gpu, facts: LogFacts | None = None) -> Question:
    """Put a launch to the planner.

    Raises
    ------
    BadValue
        When the launch cannot be of this model.
    """
    engine = launch.engine
    version, note = known_version(engine, launch.version)
    notes = [*launch.notes, *([note] if note else [])]
    model = config.engine_model(launch.tensor_parallel, launch.kv_itemsize)
    context = launch.context_tokens or config.max_positions
    options: dict[str, Any] = {"version": version, **launch.flags}
    options = {k: v for k, v in options.items() if v is not None}
    context_bytes = CONTEXT_BYTES[engine]
    if facts is not None:
        model = _with_measured_weights(model, engine, context, facts)
        if facts.free_before_bytes:
            context_bytes = gpu.total_bytes - facts.free_before_bytes
    spec = PlanSpec(
        strategy=engine,
        options=options,
        engine_model=model,
        context_tokens=context,
        fill=0.0,
        capacity_bytes=gpu.total_bytes,
        context_bytes=max(0, context_bytes),
        weights_bytes=model.weights_bytes,
        device_total_bytes=gpu.total_bytes,
        hopper=gpu.hopper,
        granularity_bytes=CUDA_GRANULARITY_BYTES,
    )
    if config.vision and engine == "sglang":
        notes.append(
            "SGLang lowers mem_fraction_static for a vision tower and captures no piecewise graphs "
            "there: not modelled, its pool is smaller than below"
        )
    if launch.kv_dtype == "auto":
        notes.append("kv_cache_dtype=auto: K/V in 16 bits")
    return Question(spec, tuple(notes))


def _with_measured_weights(
    model: EngineModel, engine: str, context: int, facts: LogFacts
) -> EngineModel:
    """Weights as the log says them; the rotary table is in that figure."""
    if not facts.weights_bytes:
        return model
    rope = model.rope_bytes(context, ROPE_ITEMSIZE[engine])
    return replace(model, weights_bytes=max(0, facts.weights_bytes - rope))


def engine_flag(engine: str, key: str, value: str) -> str:
    """A flag as the engine's command line takes it."""
    if key == "hybrid_kv_cache_manager":
        return f"--{'no-' if value == 'true' else ''}disable-hybrid-kv-cache-manager"
    name = f"--{key.replace('_', '-')}"
    if value == "true":
        return name
    if value == "null":
        return f"without {name}"
    if engine == "vllm" and key == "kv_cache_dtype":
        return f"{name} fp8"
    return f"{name} {value}"
