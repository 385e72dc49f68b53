"""Every strategy and growth variant, refused at every allocation, against a plain model."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from strategies import registry, sizing
from strategies.errors import OutOfMemory, Refused
from tests.strategies.sequences import Sequences
from tests.strategies.small_models import (
    HYBRID,
    PAGE_TOKENS,
    PLAIN,
    SCALED,
    Events,
    RefusingDevice,
)

CONTEXT = 20 * PAGE_TOKENS
SEQUENCES = 4
LOW_WATER = 3 * PLAIN.groups[0].chunk_bytes
VARIANTS = {
    "static": ("static", {}),
    "static-half": ("static", {"mem_fraction": 0.5}),
    "static-pow2": ("static", {"slot_policy": "pow2", "mem_fraction": 0.6}),
    "static-exact": ("static", {"slot_policy": "exact", "mem_fraction": 0.6}),
    "static-device": ("static", {"mem_fraction_of": "device", "mem_fraction": 0.9}),
    "paged": ("paged", {}),
    "paged-committed": ("paged", {"page_policy": "committed"}),
    "paged-ahead": ("paged", {"growth": "ahead", "ahead_chunks": 2}),
    "paged-deferred": ("paged", {"release": "deferred", "low_water_bytes": LOW_WATER}),
    "paged-both": (
        "paged",
        {
            "growth": "ahead",
            "ahead_chunks": 1,
            "release": "deferred",
            "low_water_bytes": LOW_WATER,
        },
    ),
    "paged-budget": ("paged", {"mem_fraction": 0.5}),
    "eager_pages": ("eager_pages", {"mem_fraction": 0.8}),
}


def snapshot(strategy):
    """Everything that a refused call must leave as it was; reserve chunks may be given up."""
    return (
        [
            {s: (r.first, r.count, r.held.tolist()) for s, r in pool.table.rows.items()}
            for pool in strategy.pools
        ],
        [pool.allocator.free_pages for pool in strategy.pools],
        {s: strategy.resident_tokens(s) for s in strategy._open},
        strategy.footprint().live_bytes,
        strategy.footprint().tables_bytes,
        strategy.footprint().committed_bytes - reserve_bytes(strategy),
    )


def reserve_bytes(strategy):
    """Bytes of committed chunks that hold no page of a strategy that gives them back."""
    if strategy.name != "paged":
        return 0
    return sum(p.allocator.empty_chunks * p.group.chunk_bytes for p in strategy.pools)


class Requests(Sequences):
    @initialize(
        variant=st.sampled_from(list(VARIANTS)),
        model=st.sampled_from([PLAIN, HYBRID]),
        chunks=st.integers(16, 45),
    )
    def make(self, variant, model, chunks):
        name, options = VARIANTS[variant]
        self.events, self.model = Events(), model
        self.device = RefusingDevice(chunks * PLAIN.groups[0].chunk_bytes, observer=self.events)
        self.strategy = registry.build(name, self.device, model, CONTEXT, SEQUENCES, **options)
        self.tokens, self.next, self.started = {}, 0, False
        self.start()

    def start(self):
        try:
            self.strategy.start()
            self.started = True
        except (OutOfMemory, Refused) as refused:
            assert refused.phase in ("tables", "pool")
            self.nothing_is_held()

    def nothing_is_held(self):
        assert self.device.used_bytes() == 0
        assert self.device.free_bytes() == self.device.capacity_bytes
        assert self.events.held_bytes == 0

    @rule(refuse=st.none() | st.integers(0, 3))
    def restart(self, refuse):
        self.strategy.stop()
        self.tokens, self.started = {}, False
        self.nothing_is_held()
        if refuse is not None:
            self.device.refuse(refuse, forever=False)
            self.start()
            self.device.obey()
        if not self.started:
            self.start()

    @precondition(lambda self: self.started)
    @rule(tokens=st.integers(1, CONTEXT + 5) | st.just(CONTEXT))
    def open(self, tokens):
        before = snapshot(self.strategy)
        may = len(self.tokens) < SEQUENCES and tokens <= CONTEXT
        try:
            self.strategy.open(self.next, tokens)
        except Refused:
            assert not may or self.strategy.name == "static"
            assert snapshot(self.strategy) == before
            return
        assert may
        self.tokens[self.next] = (0, tokens)
        self.next += 1

    @precondition(lambda self: self.tokens)
    @rule(
        pick=st.integers(0, 9),
        more=st.integers(0, 9 * PAGE_TOKENS),
        refuse=st.none() | st.tuples(st.integers(0, 3), st.booleans()),
    )
    def extend(self, pick, more, refuse):
        self.strategy.settle()
        sequence = sorted(self.tokens)[pick % len(self.tokens)]
        held, most = self.tokens[sequence]
        admitted = self.strategy.can_admit(max(1, more)) if not held else False
        before = snapshot(self.strategy)
        if refuse is not None:
            self.device.refuse(*refuse)
        try:
            self.grow(sequence, more)
        except OutOfMemory as refused:
            assert (refused.phase, refused.allocation) == ("fill", "kv_pages")
            assert refused.tokens == held and snapshot(self.strategy) == before
            self.device.obey()
            self.again(sequence, more, refuse)
        except Refused:
            limit = getattr(self.strategy, "slot_tokens", CONTEXT)
            assert held + more > min(most, limit) and snapshot(self.strategy) == before
        self.device.obey()
        if admitted and held + more <= most and self.model is PLAIN:
            assert self.strategy.resident_tokens(sequence) == more

    def again(self, sequence, more, refuse):
        """After a refusal the same request works, unless it really does not fit."""
        try:
            self.grow(sequence, more)
        except OutOfMemory as refused:
            assert refused.requested_bytes > refused.free_bytes

    def grow(self, sequence, more):
        held, most = self.tokens[sequence]
        rows = [pool.table.rows[sequence].count for pool in self.strategy.pools]
        self.strategy.extend(sequence, more)
        self.tokens[sequence] = (held + more, most)
        for pool, count in zip(self.strategy.pools, rows, strict=True):
            row, page_bytes = pool.table.rows[sequence], pool.allocator.page_bytes
            for index in range(count, row.count):
                page = row.entries[index]
                content = pool.arena.np[page * page_bytes : (page + 1) * page_bytes]
                assert not content.any(), "a page that is handed out is not zero"
                content[:] = self.mark(sequence, index)

    @staticmethod
    def mark(sequence, index):
        return 1 + (7 * sequence + index) % 250

    @invariant()
    def pages_are_owned_once_and_keep_their_bytes(self):
        if not getattr(self, "started", False):
            return
        for pool in self.strategy.pools:
            held = [p for row in pool.table.rows.values() for p in row.held.tolist()]
            assert len(held) == len(set(held)) == pool.held_pages
            assert len(held) == pool.allocator.total_pages - pool.allocator.free_pages
            by_page = pool.arena.np.reshape(-1, pool.allocator.page_bytes)
            for sequence, row in pool.table.rows.items():
                for index in range(row.first, row.count):
                    bytes_ = by_page[row.entries[index]]
                    assert (bytes_ == self.mark(sequence, index)).all()

    @invariant()
    def what_is_committed_is_what_is_needed(self):
        if not getattr(self, "started", False):
            return
        strategy = self.strategy
        strategy.settle()
        for pool in strategy.pools:
            allocator = pool.allocator
            if strategy.name == "paged":
                kept = (
                    strategy._kept_chunks(pool)
                    if self.tokens
                    else (strategy.low_water_bytes // pool.group.chunk_bytes)
                )
                assert allocator.empty_chunks <= kept
            else:
                assert pool.arena.committed_bytes == pool.arena.reserved_bytes
        committed = strategy.footprint().committed_bytes
        tables = sizing.page_table_bytes(self.model, CONTEXT, SEQUENCES)
        assert self.device.used_bytes() == committed + -(-tables // 4096) * 4096
        assert self.device.used_bytes() + self.device.free_bytes() == self.device.capacity_bytes

    @invariant()
    def live_bytes_are_those_of_held_tokens(self):
        if not getattr(self, "started", False):
            return
        expected = 0
        for pool in self.strategy.pools:
            for sequence, (tokens, _) in self.tokens.items():
                gone = pool.table.rows[sequence].first * PAGE_TOKENS
                assert gone <= pool.group.window_start(tokens)
                expected += (tokens - gone) * pool.group.geometry.token_bytes
        assert self.strategy.footprint().live_bytes == expected

    def teardown(self):
        if getattr(self, "started", False):
            self.strategy.stop()
        if hasattr(self, "device"):
            assert self.device.used_bytes() == 0


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("model", [PLAIN, HYBRID], ids=lambda m: m.name)
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_thousand_cycles_end_where_they_began(variant, model):
    name, options = VARIANTS[variant]
    device = RefusingDevice(60 * PLAIN.groups[0].chunk_bytes)
    strategy = registry.build(name, device, model, CONTEXT, SEQUENCES, **options)
    strategy.start()
    lengths = np.random.default_rng(5).integers(1, 4 * PAGE_TOKENS, 1001)
    began = None
    for cycle, tokens in enumerate(lengths.tolist()):
        strategy.open(cycle, CONTEXT // 2)
        strategy.extend(cycle, tokens)
        strategy.extend(cycle, tokens)
        strategy.close(cycle)
        strategy.settle()
        state = (strategy.footprint(), [p.allocator.free_pages for p in strategy.pools])
        if options.get("release") != "deferred":
            began = began or state
            assert state == began
    assert device.used_bytes() + device.free_bytes() == device.capacity_bytes
    assert reserve_bytes(strategy) <= options.get("low_water_bytes", 0) * len(model.groups)
    strategy.stop()
    assert device.used_bytes() == 0


@pytest.mark.parametrize("name", ["static", "paged", "eager_pages"])
def test_the_modelled_h200_at_ten_million(name):
    """743 MiB stand for an H200: static asks for 1.28 GB, the others start."""
    device = RefusingDevice(778_945_194, scale=192)
    strategy = registry.build(name, device, SCALED, 10_000_000)
    if name == "static":
        with pytest.raises(OutOfMemory) as refused:
            strategy.start()
        assert refused.value.requested_bytes == 3552 * 360_448
        assert refused.value.free_bytes == device.capacity_bytes - 4096
        assert (refused.value.phase, refused.value.allocation) == ("pool", "kv_pool")
        assert device.used_bytes() == 0
        return
    strategy.start()
    assert strategy.footprint().tables_bytes == 1628
    most = sizing.paged_resident_tokens(SCALED, device.capacity_bytes - 4096, 10_000_000)
    assert strategy.can_admit(most) and not strategy.can_admit(most + 1)
    strategy.open(0, 10_000_000)
    strategy.extend(0, most)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, 1)
    assert refused.value.tokens == most == strategy.resident_tokens(0)
    strategy.stop()
