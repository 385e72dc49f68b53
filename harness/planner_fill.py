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


@dataclass(frozen=True)
class _Grown:
    """One sequence: its tokens, and where its last step, of ``step`` tokens at most, began."""

    tokens: int = 0
    began: int = 0
    step: int = STEP_TOKENS


class Pool:
    """What a started strategy can hold."""

    def __init__(self, model: KVModel) -> None:
        self.model, self.groups = model, model.groups
        self.chunks: tuple[int, ...] = ()
        self.slot_tokens = 0  # static: of one slot
        self.slots = 0
        self.lazy = False
        self.tokens = 0  # of one sequence
        self.admits = False

    def pages(self, group: LayerGroup, tokens: int) -> int:
        """Pages of a sequence of ``tokens`` tokens: no more than a window's, where there is one."""
        return group.pages(sizing.window_tokens(group, tokens))

    def pages_of(self, grown: _Grown) -> list[int]:
        """Pages of each group that a sequence holds: those that its last step could see."""
        return [
            g.pages(grown.tokens) - g.window_start(grown.began + 1) // g.geometry.page_tokens
            for g in self.model.groups
        ]

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
    """Fill one sequence after another to its target."""
    if pool.slot_tokens:
        _fill_slots(spec, walk, pool)
        return
    filled = _Filling(pool, walk.free_bytes).all(spec.targets)
    walk.resident_tokens = filled.tokens
    before = walk.free_bytes
    _grow(spec, walk, pool, filled)
    if not filled.refused:
        return
    wanted = [sum(n * pool.pages(g, tokens) for tokens, n in spec.targets) for g in pool.groups]
    short = pool.nbytes(pool.chunks_of(wanted)) - (walk.kv_bytes if pool.lazy else 0)
    item = PlanItem("fill", "kv_pages", max(0, short))
    walk.fail(item, item.nbytes, walk.free_bytes if pool.lazy else min(before, walk.free_bytes))


def _fill_slots(spec: PlanSpec, walk: Walk, pool: Pool) -> None:
    token = pool.model.token_bytes
    if spec.growing > pool.slots:
        item = PlanItem("fill", "kv_slot", pool.slot_tokens * token)
        walk.refuse(item, item.nbytes, 0, f"{pool.slots} slots: no slot is free for the next")
    for target, count in spec.targets:
        if target > pool.slot_tokens:
            walk.resident_tokens += pool.slot_tokens
            item = PlanItem("fill", "kv_pages", (target - pool.slot_tokens) * token)
            text = f"{target} tokens: a slot holds {pool.slot_tokens} tokens"
            walk.refuse(item, target * token, pool.slot_tokens * token, text)
        walk.resident_tokens += target * count


@dataclass(frozen=True)
class _Filled:
    """Sequences: all their tokens, the pages of those before the last, the last one, its end."""

    tokens: int
    before: list[int]
    last: _Grown
    refused: bool = False


class _Filling:
    """The steps of :mod:`harness.fill`, many at once.

    All groups have pages of one size, of which a step and a window are multiples, and there is one
    length of windows.
    """

    def __init__(self, pool: Pool, free_bytes: int) -> None:
        self.pool, self.free_bytes = pool, free_bytes
        self.groups = pool.groups
        self.grain = min(g.geometry.page_tokens for g in self.groups)
        self.window = max(g.window_tokens for g in self.groups)

    def all(self, targets: list[tuple[int, int]]) -> _Filled:
        """Fill one after another, until one is refused; ``targets`` are those of a spec.

        The more the others hold, the smaller are the steps of the next; those that end in equal
        steps hold equally much.
        """
        tokens, before, own, last = 0, [0] * len(self.groups), [0] * len(self.groups), _Grown()
        for target, left in targets:
            while left:
                before = _with(before, own)
                last = self._one(before, target)
                if last.tokens < target:
                    return _Filled(tokens + last.tokens, before, last, refused=True)
                own = self.pool.pages_of(last)
                alike = self._alike(before, last, left - 1)
                tokens += (1 + alike) * target
                before = _with(before, own, alike)
                left -= 1 + alike
        return _Filled(tokens, before, last)

    def _alike(self, before: list[int], grown: _Grown, sequences: int) -> int:
        """How many of the sequences that are left end in the steps of this one."""
        each, target = self.pool.pages_of(grown), grown.tokens
        return most(sequences, lambda n: self._one(_with(before, each, n), target) == grown)

    def _one(self, before: list[int], target: int) -> _Grown:
        """Grow one sequence beside others that hold so many pages of each group."""
        steps, grown = Steps(self.grain), _Grown()
        while True:
            grown = self._equal_steps(before, grown, steps.tokens, target)
            if grown.tokens == target or not steps.halve():
                return grown

    def _equal_steps(self, before: list[int], grown: _Grown, step: int, target: int) -> _Grown:
        """Grow it further, until the first of equal steps is refused."""
        at = grown.tokens
        count = -(-(target - at) // step)

        def after(n: int) -> _Grown:
            end = min(target, at + n * step)
            return _Grown(end, at + (n - 1) * step, step) if n else grown

        def fits(n: int) -> bool:
            return self._fits(before, after(n - 1), after(n))

        done = 1 if count and fits(1) else 0
        if not done:
            return grown
        done = _furthest(done, count, lambda n: self._surely(before, after(n)))
        while self.window and done < count and fits(done + 1):
            # Within a window it holds more and more; the step into the next one is what differs.
            left = self.window - after(done).tokens % self.window
            inside = min(count, done - (-left // step))
            done = _furthest(done + 1, inside, fits)
            if done < inside:
                break
        return after(done)

    def _surely(self, before: list[int], grown: _Grown) -> bool:
        """Whether all steps of this length up to here fit, wherever in a window each begins."""
        longest = [g.window_tokens - math.gcd(g.window_tokens, grown.step) for g in self.groups]
        own = [
            g.pages(min(grown.tokens, n + grown.step) if g.window_tokens else grown.tokens)
            for g, n in zip(self.groups, longest, strict=True)
        ]
        return self._fit(self.pool.chunks_of(_with(before, own)), _with(before, own))

    def _fits(self, before: list[int], old: _Grown, new: _Grown) -> bool:
        """Whether a step fits; chunks behind a window are not given back before it has ended."""
        pages = _with(before, self.pool.pages_of(new))
        kept = self.pool.chunks_of(_with(before, self.pool.pages_of(old)))
        held = [max(pair) for pair in zip(kept, self.pool.chunks_of(pages), strict=True)]
        return self._fit(held, pages)

    def _fit(self, chunks: list[int], pages: list[int]) -> bool:
        if self.pool.lazy:
            return self.pool.nbytes(chunks) <= self.free_bytes
        return self.pool.has(pages)


def _furthest(known: int, limit: int, fits: Callable[[int], bool]) -> int:
    """Find the most, up to a limit, that fits: no less than what is known to."""
    return known + most(limit - known, lambda more: fits(known + more))


def _with(pages: list[int], each: list[int], sequences: int = 1) -> list[int]:
    """Pages of each group, with those of some more sequences."""
    return [n + sequences * more for n, more in zip(pages, each, strict=True)]


def _grow(spec: PlanSpec, walk: Walk, pool: Pool, filled: _Filled) -> None:
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
    if not filled.refused:
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
        self.ends = self._chunks(last)
        self.turn = self.after_turn = [0] * len(self.groups)
        step = last.step
        for window in (g.window_tokens for g in self.groups if g.window_tokens):
            if last.began >= window:
                at = -(-(last.began // window * window) // step) * step
                self.turn = self._chunks(_Grown(at, at - step, step))
                self.after_turn = self._chunks(_Grown(at + step, at, step))

    def _chunks(self, last: _Grown) -> list[int]:
        """With this one behind the others."""
        return self.pool.chunks_of(_with(self._before, self.pool.pages_of(last)))

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
