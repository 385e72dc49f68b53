"""A strategy's configured keys, as its constructor takes them."""

from __future__ import annotations

from typing import Any

from harness.engines.stand_in import stand_in
from harness.planner_engines import ENGINES
from harness.settings import Settings
from harness.workspace import workspace_reserve_bytes
from kernels.view import DTYPE_BYTES
from strategies.engine_model import EngineModel

# Recurrent state of a request over all ranks, beside the K/V. Qwen3-Next-80B-A3B: 36 layers of 32
# heads of 128 x 128 in 32 bits, and 3 rows of 8,192 convolution channels in 16.
STATE_BYTES = {"Qwen3NextForCausalLM": 36 * (32 * 128 * 128 * 4 + 3 * 8192 * 2)}


def strategy_options(settings: Settings) -> dict[str, Any]:
    """Keyword arguments for :func:`strategies.registry.build`; sizes in the device's own bytes."""
    options = dict(settings.options)
    if settings.strategy in ENGINES:
        options["engine_model"] = engine_model(settings)
        options["device_total_bytes"] = settings.hardware.total_bytes
        return options
    options["arena_kind"] = settings.trial.arena
    if "low_water" in options:
        options["low_water_bytes"] = options.pop("low_water") // settings.scale
    by_device = options.get("mem_fraction_of") == "device"
    if settings.strategy == "eager_pages" or by_device:
        options["workspace_reserve_bytes"] = workspace_reserve_bytes(settings)
    return options


def engine_model(settings: Settings) -> EngineModel:
    """The modelled rank as the engines' formulas take it; never scaled.

    Beside an engine that is started it is the stand-in that the engine loads.
    """
    if settings.engine:
        return stand_in(settings).engine_model(settings.model.kv_dtype, settings.model.name)
    model, tp = settings.model, settings.parallel.tp
    return EngineModel(
        layers=model.layers,
        kv_heads=model.kv_heads(tp),
        q_heads=model.q_heads(tp),
        head_dim=model.head_dim,
        kv_itemsize=DTYPE_BYTES[model.kv_dtype],
        weights_bytes=model.weights_bytes,
        hidden_size=model.hidden,
        tensor_parallel=tp,
        window_layers=model.local_layers,
        window_tokens=model.window_tokens,
        rotary_dim=model.rotary_dim,
        max_position_embeddings=max(10_000_000, settings.context_tokens),
        state_bytes_per_request=-(-STATE_BYTES.get(model.architecture, 0) // tp),
        moe=model.moe,
        architecture=model.architecture,
        name=model.name,
    )
