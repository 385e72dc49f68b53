"""How a trial of an engine's emulation goes: its own formulas, then what is free."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.planner_spec import PlanItem, PlanSpec, Prediction
from harness.planner_walk import Ended, Walk
from strategies.engine_model import EngineModel, EnginePlan, Item
from strategies.sglang_flags import SGLangFlags
from strategies.sglang_policy import sglang_plan
from strategies.vllm_flags import VLLMFlags
from strategies.vllm_policy import vllm_plan

ENGINES = ("sglang", "vllm")


def engine_flags(strategy: str, options: dict[str, Any]) -> SGLangFlags | VLLMFlags:
    """Build the engine's flags from configured keys; those that are no flag are left out.

    Raises
    ------
    ValueError
        One line that names the flag, its value and what is allowed.
    """
    if strategy == "sglang":
        return SGLangFlags(**_known(SGLangFlags, options))
    return VLLMFlags(**_known(VLLMFlags, options))


def _known(flags: type, options: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in dataclasses.fields(flags)}
    out = {k: v for k, v in options.items() if k in names}
    if out.get("version") is None:
        out.pop("version", None)
    return out


def engine_plan(spec: PlanSpec, free_before_bytes: int) -> EnginePlan:
    """Ask the engine's formulas; ``free_before_bytes`` is modelled, before the weights."""
    model = spec.engine_model
    if model is None:
        raise ValueError(f"strategy={spec.strategy}: needs the engine's model")
    flags = engine_flags(spec.strategy, spec.options)
    rest = (spec.context_tokens, spec.modelled_total_bytes, free_before_bytes, spec.hopper)
    if isinstance(flags, SGLangFlags):
        return sglang_plan(model, flags, *rest)
    return vllm_plan(model, flags, *rest)


def scaled_pieces(item: Item, scale: int) -> tuple[tuple[int, int], ...]:
    """Express an item's pieces in the device's own bytes, rounded up."""
    return tuple((count, -(-nbytes // scale)) for count, nbytes in item.pieces)


def predict_engine(spec: PlanSpec) -> Prediction:
    """Predict one trial of ``sglang`` or ``vllm``."""
    model = spec.engine_model
    if model is None:
        raise ValueError(f"strategy={spec.strategy}: needs the engine's model")
    walk = Walk(spec)
    plan: EnginePlan | None = None
    admits = False
    try:
        walk.before_strategy()
        plan = engine_plan(spec, walk.free_bytes * spec.scale + model.weights_bytes)
        for item in plan.items:
            _take(walk, item, spec.scale)
        if plan.refusal is not None:
            _refuse(walk, plan, spec.scale)
        walk.after_strategy()
        admits = spec.context_tokens <= plan.max_request_tokens <= plan.pool_tokens
        _fill(spec, walk, plan, model)
    except Ended:
        pass
    return walk.prediction(
        pool_tokens=plan.pool_tokens if plan else 0,
        max_request_tokens=plan.max_request_tokens if plan and walk.started else 0,
        admits_context=admits,
        settings=plan.settings if plan else {},
        notes=plan.notes if plan and walk.started else (),
    )


def _take(walk: Walk, item: Item, scale: int) -> None:
    pieces = scaled_pieces(item, scale)
    nbytes = sum(count * size for count, size in pieces)
    walk.take(
        PlanItem(item.phase, item.name, nbytes, item.location, item.source, item.shape), pieces
    )
    if item.name == "kv_pool":
        walk.kv_bytes = nbytes


def _refuse(walk: Walk, plan: EnginePlan, scale: int) -> None:
    refusal = plan.refusal
    assert refusal is not None
    needed, available = refusal.needed_bytes // scale, refusal.available_bytes // scale
    item = PlanItem(refusal.phase, refusal.name, needed)
    walk.refuse(item, needed, available, refusal.message)


def _fill(spec: PlanSpec, walk: Walk, plan: EnginePlan, model: EngineModel) -> None:
    """Fill by index accounting: the pool is there already."""
    slot, target = plan.slot_tokens, spec.target_tokens
    limit = min(plan.max_request_tokens, plan.pool_tokens)
    pool_slots = plan.pool_tokens // slot
    each = -(-target // slot)
    if target <= limit and each * spec.sequences <= pool_slots:
        walk.resident_tokens = target * spec.sequences
        return
    if target > limit:
        walk.resident_tokens = limit
    else:
        full = pool_slots // each
        walk.resident_tokens = full * target + (pool_slots - full * each) * slot
    token = max(1, model.token_bytes // spec.scale)
    item = PlanItem("fill", "kv_slots" if plan.engine == "sglang" else "kv_blocks", 0)
    text = f"{plan.engine}: no free K/V slot after {walk.resident_tokens} tokens"
    walk.refuse(item, target * spec.sequences * token, plan.pool_tokens * token, text)
