"""How a trial of an engine's emulation goes: its own formulas, then what is free."""

from __future__ import annotations

import dataclasses
from typing import Any

from harness.planner_spec import PlanItem, PlanSpec, Prediction
from harness.planner_walk import Ended, Walk
from strategies.engine_model import EngineModel, EnginePlan, Item
from strategies.sglang_flags import SGLangFlags
from strategies.sglang_policy import sglang_plan
from strategies.sizing import most_tokens
from strategies.vllm_flags import VLLMFlags
from strategies.vllm_policy import vllm_plan

ENGINES = ("sglang", "vllm")
SLOT_NAMES = {"sglang": "kv_slots", "vllm": "kv_blocks"}


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
        _start(walk, plan, spec.scale)
        walk.after_strategy()
        admits = spec.context_tokens <= plan.max_request_tokens
        admits = admits and plan.slots_for(spec.context_tokens) <= plan.slots
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


def _start(walk: Walk, plan: EnginePlan, scale: int) -> None:
    """Take everything that the strategy allocates; all of it is given back when it fails."""
    try:
        for item in plan.items:
            _take(walk, item, scale)
        if plan.refusal is not None:
            _refuse(walk, plan, scale)
        if plan.fault:
            walk.crash(plan.fault)
    except Ended:
        walk.kv_bytes = 0
        raise


def _take(walk: Walk, item: Item, scale: int) -> None:
    pieces = scaled_pieces(item, scale)
    nbytes = sum(count * size for count, size in pieces)
    walk.take(
        PlanItem(item.phase, item.name, nbytes, item.location, item.source, item.shape),
        pieces,
        -(-item.transient_bytes // scale),
        walk.spec.weights_bytes if item.before_weights else 0,
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
    sequences = spec.growing
    token = max(1, model.token_bytes // spec.scale)
    if sequences > plan.request_limit:
        item = PlanItem("fill", "requests", 0)
        walk.refuse(item, sequences, plan.request_limit, f"{plan.request_limit} requests at most")
    left = plan.slots
    for target, count in spec.targets:
        one = min(target, plan.max_request_tokens)
        each = plan.slots_for(one)
        full = min(count, left // max(1, each)) if one == target else 0
        left -= full * each
        walk.resident_tokens += full * target
        if full == count:
            continue
        walk.resident_tokens += most_tokens(left, plan.slots_for, one)
        item = PlanItem("fill", SLOT_NAMES[plan.engine], 0)
        text = f"{plan.engine}: no free K/V slot after {walk.resident_tokens} tokens"
        asked = sum(n * alike for n, alike in spec.targets) * token
        walk.refuse(item, asked, plan.pool_tokens * token, text)
