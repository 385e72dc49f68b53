"""The page allocator against a set of free pages."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from strategies.errors import OutOfMemory
from strategies.pages import PAGE_POLICIES, PageAllocator
from tests.strategies.small_models import PLAIN, RefusingDevice

GROUP = PLAIN.groups[0]
PER_CHUNK = GROUP.pages_per_chunk


def allocator_of(chunks, capacity_chunks=1000, policy="lowest"):
    device = RefusingDevice(capacity_chunks * GROUP.chunk_bytes)
    arena = device.reserve(chunks * GROUP.chunk_bytes, GROUP.chunk_bytes)
    return device, PageAllocator(arena, GROUP, policy)


def take(allocator, pages):
    return allocator.allocate(pages, "fill", "kv_pages")


class Allocations(RuleBasedStateMachine):
    @initialize(
        chunks=st.integers(1, 200),
        capacity=st.integers(1, 200),
        policy=st.sampled_from(PAGE_POLICIES),
    )
    def make(self, chunks, capacity, policy):
        self.policy = policy
        self.device, self.allocator = allocator_of(chunks, capacity, policy)
        self.free = set(range(chunks * PER_CHUNK))
        self.held = []
        self.committed = set()

    def expected(self, pages):
        if self.policy == "lowest":
            return sorted(self.free)[:pages]
        inside = [p for p in sorted(self.free) if p // PER_CHUNK in self.committed]
        outside = [p for p in sorted(self.free) if p // PER_CHUNK not in self.committed]
        return (inside + outside)[:pages]

    @rule(pages=st.integers(0, 90), refuse=st.none() | st.integers(0, 4))
    def allocate(self, pages, refuse):
        expected = self.expected(pages)
        chunks = {p // PER_CHUNK for p in expected}
        fits = len(chunks - self.committed) * GROUP.chunk_bytes <= self.device.free_bytes()
        if refuse is not None:
            self.device.refuse(refuse, forever=True)
        try:
            grant = take(self.allocator, pages)
        except OutOfMemory:
            assert refuse is not None or not fits or pages > len(self.free)
            return
        finally:
            self.device.obey()
        assert pages <= len(self.free) and fits
        assert grant.pages.tolist() == expected
        assert grant.committed_bytes == len(chunks - self.committed) * GROUP.chunk_bytes
        self.free -= set(expected)
        self.committed |= chunks
        self.held.append(grant.pages)

    @rule(data=st.data(), undo=st.booleans())
    def release(self, data, undo):
        if not self.held:
            return
        pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if undo and len(pages):
            self.allocator.lend(pages)
            self.allocator.trim()
            self.allocator.retake(pages)
            self.held.append(pages)
            empty = self.committed - {p // PER_CHUNK for held in self.held for p in held}
            self.committed -= empty
            return
        self.allocator.release(pages)
        self.free |= set(pages.tolist())

    @rule(keep=st.integers(0, 5))
    def trim(self, keep):
        used = {p // PER_CHUNK for held in self.held for p in held}
        empty = sorted(self.committed - used)
        given = empty[keep:]
        assert self.allocator.trim(keep) == len(given) * GROUP.chunk_bytes
        self.committed -= set(given)

    @rule()
    def undo_an_allocation(self):
        before = set(self.committed)
        pages = min(7, len(self.free))
        try:
            grant = take(self.allocator, pages)
        except OutOfMemory:
            return
        self.allocator.undo(grant)
        assert self.committed == before

    @rule()
    def prepare(self):
        try:
            given = self.allocator.prepare_chunk("fill", "kv_pages")
        except OutOfMemory:
            assert self.device.free_bytes() < GROUP.chunk_bytes
            return
        if given:
            chunk = min(set(range(self.allocator.chunks)) - self.committed)
            self.committed.add(chunk)
        else:
            assert len(self.committed) == self.allocator.chunks

    @invariant()
    def agrees(self):
        allocator = self.allocator
        used = {p // PER_CHUNK for held in self.held for p in held}
        assert used <= self.committed
        assert allocator.free_pages == len(self.free)
        assert allocator.free_committed_pages == sum(
            p // PER_CHUNK in self.committed for p in self.free
        )
        assert allocator.empty_chunks == len(self.committed - used)
        nbytes = len(self.committed) * GROUP.chunk_bytes
        assert allocator.committed_bytes == nbytes == self.device.used_bytes()
        assert not self.committed or allocator.backed_page() // PER_CHUNK in self.committed

    def teardown(self):
        if hasattr(self, "device"):
            self.device.close()


TestAllocations = Allocations.TestCase
TestAllocations.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_a_hundred_thousand_pages_hand_out_in_order():
    _, allocator = allocator_of(40_000, 40_000)
    first = take(allocator, 100_000).pages
    assert np.array_equal(first, np.arange(100_000))
    allocator.release(first[::2])
    again = take(allocator, 50_001).pages
    assert np.array_equal(again, np.append(first[::2], 100_000))


def test_reused_pages_are_zeroed_and_others_are_not():
    _, allocator = allocator_of(4)
    grant = take(allocator, 6)
    allocator.arena.np[: 6 * allocator.page_bytes] = 255
    allocator.release(grant.pages[2:5])
    again = take(allocator, 3)
    allocator.zero(again)
    by_page = allocator.arena.np.reshape(-1, allocator.page_bytes)
    assert by_page[:6].max(axis=1).tolist() == [255, 255, 0, 0, 0, 255]


def test_double_release_and_double_take_are_refused():
    _, allocator = allocator_of(4)
    allocator.commit_all("pool", "kv_pool")
    grant = allocator.take(2, 5)
    with pytest.raises(ValueError, match="handed out already"):
        allocator.take(4, 6)
    allocator.release(grant.pages)
    with pytest.raises(ValueError, match="free already"):
        allocator.release(grant.pages[:1])


def test_more_pages_than_the_arena_has_asks_the_device_first():
    device, allocator = allocator_of(11, 10)
    with pytest.raises(OutOfMemory) as refused:
        take(allocator, 34)
    assert refused.value.source == "budget"
    device, allocator = allocator_of(10, 10)
    with pytest.raises(OutOfMemory) as refused:
        take(allocator, 31)
    assert refused.value.source == "pool" and device.used_bytes() == 0
    assert refused.value.requested_bytes == 31 * allocator.page_bytes


def test_unknown_page_policy():
    with pytest.raises(ValueError, match="page_policy=best: allowed are lowest, committed"):
        allocator_of(1, policy="best")
