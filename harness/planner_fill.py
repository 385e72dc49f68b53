"""How sequences fill a started pool of static, paged or eager_pages, and what is held then."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from harness.fill import STEP_TOKENS
from harness.planner_spec import PlanItem, PlanSpec
from harness.planner_walk import Walk
from strategies import sizing
from strategies.model import KVModel, LayerGroup


class Pool:
    """What a started strategy can hold."""

    def __init__(self, model: KVModel) -> None:
        self.model = model
        self.chunks: tuple[int, ...] = ()
        self.slot_tokens = 0  # static: of one slot
        self.slots = 0
        self.lazy = False
        self.tokens = 0  # of one sequence
        self.admits = False

    def pages(self, group: LayerGroup, tokens: int) -> int:
        """Pages of a sequence of ``tokens`` tokens: no more than a window's, where there is one."""
        return group.pages(sizing.window_tokens(group, tokens))

    def pages_left(self, group: LayerGroup, tokens: int, last_step: int) -> int:
        """Pages of a sequence whose last step began at ``last_step``: those that it could see."""
        return group.pages(tokens) - group.window_start(last_step + 1) // group.geometry.page_tokens

    def fits(self, tokens: int, sequences: int) -> bool:
        """Whether committed (or reserved) chunks have the pages for it."""
        return self.has([sequences * self.pages(g, tokens) for g in self.model.groups])

    def has(self, pages: list[int]) -> bool:
        """Whether committed (or reserved) chunks have so many pages of each group."""
        groups = zip(pages, self.chunks, self.model.groups, strict=True)
        return all(n <= chunks * g.pages_per_chunk for n, chunks, g in groups)

    def bytes_of(self, tokens: int, sequences: int) -> int:
        """Bytes of the chunks behind ``sequences`` sequences of ``tokens`` tokens."""
        return sizing.live_bytes(self.model, tokens, sequences)

    def admitted(self, spec: PlanSpec, walk: Walk) -> bool:
        """Whether a request of the full context would be accepted."""
        if self.slot_tokens:
            return spec.context_tokens <= self.slot_tokens and self.slots > 0
        if self.lazy:
            return self.bytes_of(spec.context_tokens, 1) <= walk.free_bytes
        return self.fits(spec.context_tokens, 1)

    def pages_of(self, whole: int, target: int, tokens: int, began: int) -> list[int]:
        """Pages of each group that sequences hold.

        Parameters
        ----------
        whole : int
            Sequences that have grown to ``target`` tokens.
        tokens, began : int
            Of one more, and where its last step began.
        """
        last_step = max(0, target - 1) // STEP_TOKENS * STEP_TOKENS
        return [
            whole * self.pages_left(g, target, last_step) + self.pages_left(g, tokens, began)
            for g in self.model.groups
        ]

    def chunks_of(self, pages: list[int]) -> list[int]:
        """Chunks of each group for so many pages of it, side by side."""
        return [-(-n // g.pages_per_chunk) for n, g in zip(pages, self.model.groups, strict=True)]

    def nbytes(self, chunks: Sequence[int]) -> int:
        """Bytes of chunks of each group."""
        return sum(n * g.chunk_bytes for n, g in zip(chunks, self.model.groups, strict=True))


def fill(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    """Fill one sequence after another to the target."""
    if pool.slot_tokens:
        _fill_slots(spec, walk, pool)
        return
    target = spec.target_tokens
    held = _Held(pool, walk.free_bytes, target)
    full = most(spec.growing, lambda n: held.next_tokens(n - 1) == target)
    last = 0 if full == spec.growing else held.next_tokens(full)
    walk.resident_tokens = target * full + last
    before = walk.free_bytes
    _grow(spec, walk, pool, target, full, last)
    if full == spec.growing:
        return
    short = pool.bytes_of(target, spec.growing) - (walk.kv_bytes if pool.lazy else 0)
    item = PlanItem("fill", "kv_pages", max(0, short))
    walk.fail(item, item.nbytes, walk.free_bytes if pool.lazy else min(before, walk.free_bytes))


def _fill_slots(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    target, token = spec.target_tokens, pool.model.token_bytes
    if spec.growing > pool.slots:
        item = PlanItem("fill", "kv_slot", pool.slot_tokens * token)
        walk.refuse(item, item.nbytes, 0, f"{pool.slots} slots: no slot is free for the next")
    if target > pool.slot_tokens:
        walk.resident_tokens = pool.slot_tokens
        item = PlanItem("fill", "kv_pages", (target - pool.slot_tokens) * token)
        text = f"{target} tokens: a slot holds {pool.slot_tokens} tokens"
        walk.refuse(item, target * token, pool.slot_tokens * token, text)
    walk.resident_tokens = target * spec.growing


class _Held:
    """How far one more sequence grows beside whole ones, page by page: a refused step is halved."""

    def __init__(self, pool: Pool, free_bytes: int, target: int) -> None:
        self.pool, self.free_bytes, self.target = pool, free_bytes, target
        self.page = min(g.geometry.page_tokens for g in pool.model.groups)
        self.window = max(g.window_tokens for g in pool.model.groups)

    def next_tokens(self, whole: int) -> int:
        """Tokens at which the one that follows ``whole`` whole ones is refused, or the target.

        Within a window it holds more and more; behind one it gives pages back. The first window
        whose end does not fit is where it ends.
        """
        if not self.window:
            return most(self.target, lambda tokens: self._fits(whole, tokens))
        ends = self.target // self.window
        at = most(ends, lambda n: self._fits(whole, n * self.window)) * self.window
        rest = min(self.window, self.target - at)
        return at + most(rest, lambda tokens: self._fits(whole, at + tokens))

    def _fits(self, whole: int, tokens: int) -> bool:
        pages = self.pool.pages_of(whole, self.target, tokens, max(0, tokens - self.page))
        if self.pool.lazy:
            return self.pool.nbytes(self.pool.chunks_of(pages)) <= self.free_bytes
        return self.pool.has(pages)


def _grow(spec: PlanSpec, walk: Walk, pool: Pool, target: int, full: int, last: int = 0) -> None:
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
        free = walk.free_bytes - max(pool.nbytes(ends), pool.nbytes(turn))
        turn = growth.with_ahead(turn, free)
        ends = growth.with_kept(ends, turn, free)
    end = pool.nbytes(ends)
    walk.free_bytes -= end
    walk.held_bytes += max(end, pool.nbytes(turn))
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

    def __init__(self, spec: PlanSpec, pool: Pool, target: int, full: int, last: int) -> None:
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
        return self.pool.chunks_of(self.pool.pages_of(self._whole, self._target, tokens, began))

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


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """Find the most of something, up to a limit, that still fits."""
    return sizing.most_tokens(0, lambda tokens: 0 if fits(tokens) else 1, limit)
