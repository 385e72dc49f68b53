"""How sequences fill a started pool of static, paged or eager_pages, and what is held then."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.planner_spec import PlanItem, PlanSpec
from harness.planner_walk import Walk
from harness.steps import STEP_TOKENS, Steps
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
    filled = _Filling(pool, walk.free_bytes, target).all(spec.growing)
    refused = filled.last.tokens < target
    walk.resident_tokens = target * filled.whole + (filled.last.tokens if refused else 0)
    before = walk.free_bytes
    _grow(spec, walk, pool, filled, refused)
    if not refused:
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


@dataclass(frozen=True)
class _Grown:
    """One sequence: its tokens, and where its last step, of ``step`` tokens at most, began."""

    tokens: int = 0
    began: int = 0
    step: int = STEP_TOKENS


@dataclass(frozen=True)
class _Filled:
    """Sequences: how many are whole, the pages of those before the last, and the last one."""

    whole: int
    before: list[int]
    last: _Grown


class _Filling:
    """The steps of :mod:`harness.fill`, many at once.

    All groups have pages of one size, of which a step and a window are multiples, and there is one
    length of windows.
    """

    def __init__(self, pool: Pool, free_bytes: int, target: int) -> None:
        self.pool, self.free_bytes, self.target = pool, free_bytes, target
        self.groups = pool.model.groups
        self.grain = min(g.geometry.page_tokens for g in self.groups)
        self.window = max(g.window_tokens for g in self.groups)

    def all(self, sequences: int) -> _Filled:
        """Fill one after another, until one is refused.

        The more the others hold, the smaller are the steps of the next; those of equal steps hold
        equally much.
        """
        whole, before = 0, [0] * len(self.groups)
        while True:
            last = self.one(before)
            if last.tokens < self.target:
                return _Filled(whole, before, last)
            alike = self._alike(before, last, sequences - whole - 1)
            each = self._own(last.tokens, last.began)
            whole += 1 + alike
            if whole == sequences:
                return _Filled(whole, _with(before, each, alike), last)
            before = _with(before, each, 1 + alike)

    def _alike(self, before: list[int], grown: _Grown, sequences: int) -> int:
        """How many more sequences, of those that are left, grow by the steps of this one."""
        each = self._own(grown.tokens, grown.began)
        return most(sequences, lambda n: self.one(_with(before, each, n)) == grown)

    def one(self, before: list[int]) -> _Grown:
        """Grow one sequence beside others that hold so many pages of each group."""
        steps, grown = Steps(self.grain), _Grown()
        while grown.tokens < self.target:
            at = grown.tokens
            end = self._end(before, at, steps.tokens)
            if end > at:
                began = at + (end - at - 1) // steps.tokens * steps.tokens
                grown = _Grown(end, began, steps.tokens)
            if end < self.target and not steps.halve():
                break
        return grown

    def _end(self, before: list[int], at: int, step: int) -> int:
        """Where the first of equal steps from ``at`` on is refused, or the target."""
        count = -(-(self.target - at) // step)
        done = most(count, lambda n: self._fit(before, self._most_pages(at + n * step, step)))
        while self.window and done < count:
            began = at + done * step
            inside = min(count - done, -(-(self.window - began % self.window) // step))
            fitting = self._fitting(before, began, step, inside)
            done += fitting
            if fitting < inside:
                break
        return min(self.target, at + done * step)

    def _fitting(self, before: list[int], began: int, step: int, steps: int) -> int:
        """How many of these steps fit, which begin in one window: there it holds more and more."""

        def fits(n: int) -> bool:
            end = min(self.target, began + n * step)
            return self._fit(before, self._own(end, began + (n - 1) * step))

        return most(steps, fits)

    def _own(self, tokens: int, began: int) -> list[int]:
        return [self.pool.pages_left(g, tokens, began) for g in self.groups]

    def _most_pages(self, end: int, step: int) -> list[int]:
        """Pages that suffice for a step to ``end`` or before, wherever in a window it begins."""
        tokens = min(self.target, end)
        furthest = [g.window_tokens - math.gcd(g.window_tokens, step) for g in self.groups]
        return [
            g.pages(min(tokens, last + step) if g.window_tokens else tokens)
            for g, last in zip(self.groups, furthest, strict=True)
        ]

    def _fit(self, before: list[int], own: list[int]) -> bool:
        pages = _with(before, own, 1)
        if self.pool.lazy:
            return self.pool.nbytes(self.pool.chunks_of(pages)) <= self.free_bytes
        return self.pool.has(pages)


def _with(pages: list[int], each: list[int], sequences: int) -> list[int]:
    """Pages of each group, with those of some more sequences."""
    return [n + sequences * more for n, more in zip(pages, each, strict=True)]


def _grow(spec: PlanSpec, walk: Walk, pool: Pool, filled: _Filled, refused: bool) -> None:
    """Commit what the sequences have grown to, and what the strategy keeps beside it.

    Most is held at the end, or right before the last window's pages are given back. A refusal,
    which leaves a sequence unfinished, makes the strategy give back what it kept. Near the capacity
    the groups of a hybrid model are served in order. A window's pages, and those of the step that
    crosses into the next, are counted as if they lay side by side.
    """
    if not pool.lazy:
        return
    growth = _Growth(spec, pool, filled)
    ends, turn = growth.ends, growth.turn
    if not refused:
        free = walk.free_bytes - max(pool.nbytes(ends), pool.nbytes(turn))
        turn = growth.with_ahead(turn, free)
        ends = growth.with_kept(ends, turn, free)
    end = pool.nbytes(ends)
    walk.free_bytes -= end
    walk.held_bytes += max(end, pool.nbytes(turn))
    walk.kv_bytes = end
    walk.items.append(PlanItem("fill", "kv_pages", end))


class _Growth:
    """Chunks of each group when sequences have grown, and right before a window is given back."""

    def __init__(self, spec: PlanSpec, pool: Pool, filled: _Filled) -> None:
        self.spec, self.pool, self.groups = spec, pool, pool.model.groups
        self._before, last = filled.before, filled.last
        self.ends = self._chunks(last.tokens, last.began)
        self.turn = self.after_turn = [0] * len(self.groups)
        for window in (g.window_tokens for g in self.groups if g.window_tokens):
            if last.began >= window:
                at = -(-(last.began // window * window) // last.step) * last.step
                self.turn = self._chunks(at, at - last.step)
                self.after_turn = self._chunks(at + last.step, at)

    def _chunks(self, tokens: int, began: int) -> list[int]:
        """With one sequence of ``tokens``, whose last step began at ``began``, after the others."""
        own = [self.pool.pages_left(g, tokens, began) for g in self.groups]
        return self.pool.chunks_of(_with(self._before, own, 1))

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
