"""How a trial of static, paged or eager_pages goes, by the formulas of strategies.sizing."""

from __future__ import annotations

from collections.abc import Callable

from harness.fill import STEP_TOKENS
from harness.planner_spec import PlanItem, PlanSpec, Prediction
from harness.planner_walk import Ended, Walk
from strategies import sizing
from strategies.model import KVModel, LayerGroup


def predict_pool_strategy(spec: PlanSpec) -> Prediction:
    """Predict one trial of ``static``, ``paged`` or ``eager_pages``."""
    model = spec.model
    if model is None:
        raise ValueError(f"strategy={spec.strategy}: needs a KVModel")
    walk = Walk(spec)
    pool = _Pool(model)
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
        _fill(spec, walk, pool)
    except Ended:
        pass
    return walk.prediction(
        pool_tokens=pool.tokens,
        max_request_tokens=min(pool.tokens, spec.context_tokens) if walk.started else 0,
        admits_context=pool.admits,
    )


class _Pool:
    """What a started strategy can hold."""

    def __init__(self, model: KVModel) -> None:
        self.model = model
        self.chunks: tuple[int, ...] = ()
        self.slot_tokens = 0  # static: of one slot
        self.slots = 0
        self.lazy = False
        self.tokens = 0  # of one sequence
        self.admits = False

    def pages(self, group: LayerGroup, tokens: int, step: int = 0) -> int:
        return group.pages(sizing.window_tokens(group, tokens, step))

    def pages_left(self, group: LayerGroup, tokens: int, last_step: int) -> int:
        """Pages of a sequence whose last step began at ``last_step``: those that it could see."""
        return group.pages(tokens) - group.window_start(last_step + 1) // group.geometry.page_tokens

    def fits(self, tokens: int, sequences: int, step: int = 0) -> bool:
        """Whether committed (or reserved) chunks have the pages for it."""
        return all(
            sequences * self.pages(g, tokens, step) <= c * g.pages_per_chunk
            for g, c in zip(self.model.groups, self.chunks, strict=True)
        )

    def bytes_of(self, tokens: int, sequences: int, step: int = 0) -> int:
        """Bytes of the chunks behind ``sequences`` sequences of ``tokens`` tokens."""
        return sum(
            sizing.pool_chunks(g, sizing.window_tokens(g, tokens, step), sequences) * g.chunk_bytes
            for g in self.model.groups
        )

    def admitted(self, spec: PlanSpec, walk: Walk) -> bool:
        if self.slot_tokens:
            return spec.context_tokens <= self.slot_tokens and self.slots > 0
        if self.lazy:
            return self.bytes_of(spec.context_tokens, 1) <= walk.free_bytes
        return self.fits(spec.context_tokens, 1)


def _commit(walk: Walk, pool: _Pool) -> None:
    nbytes = sum(c * g.chunk_bytes for g, c in zip(pool.model.groups, pool.chunks, strict=True))
    item = PlanItem("pool", "kv_pool", nbytes, shape=f"{sum(pool.chunks)} chunks")
    if nbytes > walk.free_bytes:  # all or nothing, in chunks: no rounding
        walk.fail(item, nbytes, walk.free_bytes)
    walk.free_bytes -= nbytes
    walk.held_bytes += nbytes
    walk.kv_bytes = nbytes
    walk.items.append(item)


def _start_static(spec: PlanSpec, walk: Walk, pool: _Pool) -> None:
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


def _start_paged(spec: PlanSpec, walk: Walk, pool: _Pool) -> None:
    pool.lazy = True
    pool.chunks = tuple(
        sizing.paged_reserve_chunks(g, spec.context_tokens, spec.sequences, spec.capacity_bytes)
        for g in pool.model.groups
    )
    free = max(0, walk.free_bytes - spec.workspace_bytes)
    pool.tokens = sizing.paged_resident_tokens(pool.model, free, spec.context_tokens)


def _start_eager(spec: PlanSpec, walk: Walk, pool: _Pool) -> None:
    fraction = spec.options.get("mem_fraction", 1.0)
    budget = sizing.budget_bytes(walk.free_bytes, fraction, spec.workspace_bytes)
    pool.chunks = sizing.eager_pool_chunks(pool.model, budget, spec.context_tokens, spec.sequences)
    if not all(pool.chunks):
        item = PlanItem("pool", "kv_pool", sizing.pool_bytes(pool.model, 1))
        text = f"mem_fraction={fraction}: leaves no room for a chunk of every group"
        walk.refuse(item, item.nbytes, budget, text)
    _commit(walk, pool)
    pool.tokens = _most(spec.context_tokens, lambda tokens: pool.fits(tokens, 1))


def _most(limit: int, fits: Callable[[int], bool]) -> int:
    return sizing.most_tokens(0, lambda tokens: 0 if fits(tokens) else 1, limit)


def _fill(spec: PlanSpec, walk: Walk, pool: _Pool) -> None:
    """Fill one sequence after another to the target."""
    target = spec.target_tokens
    if pool.slot_tokens:
        token = pool.model.token_bytes
        if spec.growing > pool.slots:
            item = PlanItem("fill", "kv_slot", pool.slot_tokens * token)
            walk.refuse(item, item.nbytes, 0, f"{pool.slots} slots: no slot is free for the next")
        if target > pool.slot_tokens:
            walk.resident_tokens = pool.slot_tokens
            item = PlanItem("fill", "kv_pages", (target - pool.slot_tokens) * token)
            text = f"{target} tokens: a slot holds {pool.slot_tokens} tokens"
            walk.refuse(item, target * token, pool.slot_tokens * token, text)
        walk.resident_tokens = target * spec.growing
        return

    def holds(tokens: int, sequences: int) -> bool:
        # A step that is refused is halved, down to a page.
        step = min(g.geometry.page_tokens for g in pool.model.groups)
        if pool.lazy:
            return pool.bytes_of(tokens, sequences, step) <= walk.free_bytes
        return pool.fits(tokens, sequences, step)

    full = max(n for n in range(spec.growing + 1) if not n or holds(target, n))
    if full == spec.growing:
        walk.resident_tokens = target * spec.growing
        _grow(spec, walk, pool, target, spec.growing)
        return
    # What is left after `full` whole sequences goes to the next one, down to a page.
    last = _most(target, lambda tokens: _holds_more(pool, walk, target, full, tokens))
    walk.resident_tokens = target * full + last
    before = walk.free_bytes
    _grow(spec, walk, pool, target, full, last)
    short = pool.bytes_of(target, spec.growing) - (walk.kv_bytes if pool.lazy else 0)
    item = PlanItem("fill", "kv_pages", max(0, short))
    walk.fail(item, item.nbytes, walk.free_bytes if pool.lazy else min(before, walk.free_bytes))


def _holds_more(pool: _Pool, walk: Walk, target: int, full: int, tokens: int) -> bool:
    """Whether ``full`` sequences of ``target`` tokens and one of ``tokens`` fit."""
    page = min(g.geometry.page_tokens for g in pool.model.groups)
    nbytes = 0
    for group, chunks in zip(pool.model.groups, pool.chunks, strict=True):
        pages = full * pool.pages(group, target) + pool.pages(group, tokens, page)
        if pages > chunks * group.pages_per_chunk and not pool.lazy:
            return False
        nbytes += -(-pages // group.pages_per_chunk) * group.chunk_bytes
    return not pool.lazy or nbytes <= walk.free_bytes


def _grow(spec: PlanSpec, walk: Walk, pool: _Pool, target: int, full: int, last: int = 0) -> None:
    """Commit what the sequences have grown to, and what the strategy keeps beside it.

    Most is held at the end, or right before the last window's pages are given back. A refusal,
    which leaves a sequence unfinished, makes the strategy give back what it kept. Near the capacity
    the groups of a hybrid model are served in order. A window's pages, and those of the step that
    crosses into the next, are counted as if they lay side by side.
    """
    if not pool.lazy:
        return
    growth = _Growth(spec, pool, target, full, last)
    ends, turn = growth.ends, growth.turn
    if full == spec.growing:
        free = walk.free_bytes - max(growth.nbytes(ends), growth.nbytes(turn))
        turn = growth.with_ahead(turn, free)
        ends = growth.with_kept(ends, turn, free)
    end = growth.nbytes(ends)
    walk.free_bytes -= end
    walk.held_bytes += max(end, growth.nbytes(turn))
    walk.kv_bytes = end
    walk.items.append(PlanItem("fill", "kv_pages", end))


class _Growth:
    """Chunks of each group when sequences have grown, and right before a window is given back.

    Parameters
    ----------
    full : int
        Sequences that are whole.
    last : int
        Tokens of one more, which found no room for the rest.
    """

    def __init__(self, spec: PlanSpec, pool: _Pool, target: int, full: int, last: int) -> None:
        self.spec, self.pool, self.groups = spec, pool, pool.model.groups
        refused = full < spec.growing
        self._target, self._whole = target, full if refused else full - 1
        # A step that is refused is halved, down to a page.
        self._step = min(g.geometry.page_tokens for g in self.groups) if refused else STEP_TOKENS
        tokens = last if refused else target
        began = max(0, tokens - 1) // self._step * self._step
        self.ends = self._chunks(tokens, began)
        self.turn = self.after_turn = [0] * len(self.groups)
        for window in (g.window_tokens for g in self.groups if g.window_tokens):
            if began >= window:
                at = -(-(began // window * window) // self._step) * self._step
                self.turn = self._chunks(at, at - self._step)
                self.after_turn = self._chunks(at + self._step, at)

    def _chunks(self, tokens: int, began: int) -> list[int]:
        """Of the whole sequences, and of one of ``tokens`` whose last step began at ``began``."""
        last_step = max(0, self._target - 1) // STEP_TOKENS * STEP_TOKENS
        pages = [
            self._whole * self.pool.pages_left(g, self._target, last_step)
            + self.pool.pages_left(g, tokens, began)
            for g in self.groups
        ]
        return [-(-n // g.pages_per_chunk) for n, g in zip(pages, self.groups, strict=True)]

    def nbytes(self, chunks: list[int]) -> int:
        return sum(n * g.chunk_bytes for n, g in zip(chunks, self.groups, strict=True))

    def with_kept(self, chunks: list[int], turn: list[int], free_bytes: int) -> list[int]:
        """With what is mapped ahead, or was not given back, being less than the low-water mark."""
        options = self.spec.options
        deferred = options.get("release") == "deferred"
        low_water = int(options.get("low_water", 0)) // self.spec.scale if deferred else 0
        kept = [
            max(held, min(most, left + low_water // group.chunk_bytes))
            for held, most, left, group in zip(
                chunks, turn, self.after_turn, self.groups, strict=True
            )
        ]
        return [max(pair) for pair in zip(kept, self.with_ahead(chunks, free_bytes), strict=True)]

    def with_ahead(self, chunks: list[int], free_bytes: int) -> list[int]:
        """With the chunks that a thread maps ahead while there are some to be had."""
        options = self.spec.options
        ahead = int(options.get("ahead_chunks", 0)) if options.get("growth") == "ahead" else 0
        out = []
        for held, reserve, group in zip(chunks, self.pool.chunks, self.groups, strict=True):
            more = max(0, min(ahead, reserve - held, free_bytes // group.chunk_bytes))
            free_bytes -= more * group.chunk_bytes
            out.append(held + more)
        return out
