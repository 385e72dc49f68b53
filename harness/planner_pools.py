"""How a trial of static, paged or eager_pages goes, by the formulas of strategies.sizing."""

from __future__ import annotations

from harness.planner_fill import Pool, fill, most
from harness.planner_spec import PlanItem, PlanSpec, Prediction
from harness.planner_walk import Ended, Walk
from strategies import sizing


def predict_pool_strategy(spec: PlanSpec) -> Prediction:
    """Predict one trial of ``static``, ``paged`` or ``eager_pages``."""
    model = spec.model
    if model is None:
        raise ValueError(f"strategy={spec.strategy}: needs a KVModel")
    walk = Walk(spec)
    pool = Pool(model)
    try:
        walk.before_strategy()
        table = sizing.page_table_bytes(model, spec.context_tokens, spec.sequences)
        nbytes = sizing.scaled_bytes(table, spec.scale)
        walk.take(PlanItem("tables", "page_table", nbytes, shape="int32"))
        {"static": _start_static, "paged": _start_paged, "eager_pages": _start_eager}[
            spec.strategy
        ](spec, walk, pool)
        walk.after_strategy()
        pool.admits = pool.admitted(spec, walk)
        fill(spec, walk, pool)
    except Ended:
        pass
    return walk.prediction(
        pool_tokens=pool.tokens,
        max_request_tokens=min(pool.tokens, spec.context_tokens) if walk.started else 0,
        admits_context=pool.admits,
    )


def _commit(walk: Walk, pool: Pool) -> None:
    nbytes = pool.nbytes(pool.chunks)
    item = PlanItem("pool", "kv_pool", nbytes, shape=f"{sum(pool.chunks)} chunks")
    if nbytes > walk.free_bytes:  # all or nothing, in chunks: no rounding
        walk.fail(item, nbytes, walk.free_bytes)
    walk.free_bytes -= nbytes
    walk.held_bytes += nbytes
    walk.kv_bytes = nbytes
    walk.items.append(item)


def _start_static(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    model, fraction = pool.model, spec.options.get("mem_fraction", 1.0)
    slots = spec.sequences
    if spec.options.get("mem_fraction_of", "context") == "context":
        tokens = sizing.slot_tokens(spec.context_tokens, fraction)
    else:
        budget = sizing.static_device_budget_bytes(
            spec.capacity_bytes, walk.free_bytes, fraction, spec.workspace_bytes
        )
        tokens, slots = sizing.budget_tokens(model, budget), 1
        if tokens < 1:
            item = PlanItem("pool", "kv_pool", sizing.pool_bytes(model, 1))
            text = f"mem_fraction={fraction}: leaves no room for the KV pool; raise it"
            walk.refuse(item, item.nbytes, max(0, budget), text)
    pool.slot_tokens = min(tokens, spec.context_tokens)
    pool.tokens = pool.slot_tokens
    pool.chunks = tuple(sizing.pool_chunks(g, tokens, slots) for g in model.groups)
    pool.slots = slots * min(g.pages(tokens) // g.pages(pool.slot_tokens) for g in model.groups)
    _commit(walk, pool)


def _start_paged(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    pool.lazy = True
    pool.chunks = tuple(
        sizing.paged_reserve_chunks(g, spec.context_tokens, spec.sequences, spec.capacity_bytes)
        for g in pool.model.groups
    )
    free = max(0, walk.free_bytes - spec.workspace_bytes)
    pool.tokens = sizing.paged_resident_tokens(pool.model, free, spec.context_tokens)


def _start_eager(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    fraction = spec.options.get("mem_fraction", 1.0)
    budget = sizing.budget_bytes(walk.free_bytes, fraction, spec.workspace_bytes)
    pool.chunks = sizing.eager_pool_chunks(pool.model, budget, spec.context_tokens, spec.sequences)
    if not all(pool.chunks):
        item = PlanItem("pool", "kv_pool", sizing.pool_bytes(pool.model, 1))
        text = f"mem_fraction={fraction}: leaves no room for a chunk of every group"
        walk.refuse(item, item.nbytes, budget, text)
    _commit(walk, pool)
    pool.tokens = most(spec.context_tokens, lambda tokens: pool.fits(tokens, 1))
