"""Growth variants of paged: mapped ahead, deferred release, a budget."""

import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.ahead import AheadMapper
from strategies.errors import OutOfMemory
from tests.strategies.pools import CHUNK, CONTEXT, LOCAL_CHUNK, filled, started
from tests.strategies.small_models import HYBRID, PAGE_TOKENS


def test_deferred_release_keeps_up_to_the_low_water_mark():
    strategy = started(release="deferred", low_water_bytes=2 * CHUNK + 1)
    filled(strategy, 0, 12)
    filled(strategy, 1, 3)
    strategy.close(0)
    assert strategy.footprint().committed_bytes == 3 * CHUNK
    assert filled(strategy, 2, 6) == 0
    strategy.close(1)
    strategy.close(2)
    assert strategy.footprint().committed_bytes == 2 * CHUNK


def test_reserve_of_one_group_is_given_up_for_another():
    """Local chunks that are kept for later go back so that the full group can grow."""
    strategy = started(model=HYBRID, release="deferred", low_water_bytes=100 * CHUNK)
    strategy.open(0, CONTEXT)
    for _ in range(8):
        strategy.extend(0, PAGE_TOKENS)
    filled(strategy, 1, 4)
    strategy.close(1)
    assert [pool.allocator.empty_chunks for pool in strategy.pools] == [1, 2]
    strategy.device.allocate("workspace", "other", strategy.device.free_bytes())
    for _ in range(4):
        assert strategy.extend(0, PAGE_TOKENS) == 0
    assert not strategy.can_admit(PAGE_TOKENS)  # one local chunk would be left to give
    assert strategy.extend(0, PAGE_TOKENS) == CHUNK
    assert [pool.allocator.empty_chunks for pool in strategy.pools] == [0, 1]  # two went, one came
    strategy.extend(0, 2 * PAGE_TOKENS)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, PAGE_TOKENS)
    assert refused.value.requested_bytes == CHUNK
    assert refused.value.free_bytes == 2 * LOCAL_CHUNK - CHUNK


def test_a_request_is_admitted_on_what_another_group_keeps_in_reserve():
    strategy = started(model=HYBRID, release="deferred", low_water_bytes=100 * CHUNK)
    strategy.open(0, CONTEXT)
    for pages in (9, 1, 2):  # the second step leaves eight local pages behind its window
        strategy.extend(0, pages * PAGE_TOKENS)
    full, local = strategy.pools
    assert (full.allocator.free_committed_pages, local.allocator.empty_chunks) == (0, 2)
    strategy.device.allocate("workspace", "other", strategy.device.free_bytes())
    # One page, and a second, fit into holes: two empty local chunks make room for a full one.
    assert strategy._spare_bytes(local, 1) == 2 * LOCAL_CHUNK >= CHUNK
    assert strategy.can_admit(PAGE_TOKENS)
    assert not strategy.can_admit(3 * PAGE_TOKENS)  # takes one of them: the other is too small
    assert filled(strategy, 1, 1) == CHUNK


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3),
    st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(0, 3 * CHUNK // 4096),
    st.integers(1, 4),
)
def test_what_is_admitted_is_what_can_be_had(lengths, closed, left_host_pages, pages):
    """Beside any holes and reserves, with any amount left: asked, and then really tried."""
    strategy = started(model=HYBRID, release="deferred", low_water_bytes=100 * CHUNK)
    for sequence, held in enumerate(lengths):
        filled(strategy, sequence, held)
        strategy.extend(sequence, PAGE_TOKENS)  # local pages behind the window are kept for later
    for sequence in range(len(lengths)):
        if closed[sequence]:
            strategy.close(sequence)
    free = strategy.device.free_bytes() // 4096
    strategy.device.allocate("workspace", "other", (free - min(left_host_pages, free)) * 4096)
    asked = strategy.can_admit(pages * PAGE_TOKENS)
    spare = [_trimmed_one_by_one(pool.allocator, pages) for pool in strategy.pools]
    assert [strategy._spare_bytes(pool, pages) for pool in strategy.pools] == spare
    try:
        filled(strategy, 9, pages)
    except OutOfMemory:
        assert not asked
    else:
        assert asked


def _trimmed_one_by_one(allocator, pages):
    """Bytes of empty chunks that can go while ``pages`` pages stay, tried one after another."""
    size = allocator.pages_per_chunk
    free, gone = allocator.free_committed_pages, 0
    while gone < allocator.empty_chunks and free - size >= pages:
        free, gone = free - size, gone + 1
    return gone * size * allocator.page_bytes


def test_budget_refuses_before_the_device():
    strategy = started(100 * CHUNK, mem_fraction=0.25, workspace_reserve_bytes=20 * CHUNK)
    assert strategy.budget_bytes == 20 * CHUNK
    assert strategy.can_admit(60 * PAGE_TOKENS) and not strategy.can_admit(60 * PAGE_TOKENS + 1)
    filled(strategy, 0, 59)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, 2 * PAGE_TOKENS)
    assert (refused.value.source, refused.value.free_bytes) == ("budget", 0)
    assert strategy.extend(0, PAGE_TOKENS) == 0


def test_mapped_ahead_growth_finds_chunks_ready():
    strategy = started(growth="ahead", ahead_chunks=3)
    strategy.open(0, CONTEXT)
    strategy.settle()
    assert strategy.footprint().committed_bytes == 3 * CHUNK
    for _ in range(20):
        assert strategy.extend(0, 3 * PAGE_TOKENS) == 0
        strategy.settle()
        assert strategy.pools[0].allocator.empty_chunks == 3
    strategy.close(0)
    strategy.settle()
    assert strategy.footprint().committed_bytes == 0


@pytest.mark.parametrize("growth", ["sync", "ahead"])
def test_growth_is_counted_alike_whoever_maps(growth):
    strategy = started(growth=growth, ahead_chunks=3)
    strategy.open(0, CONTEXT)
    grown = []
    for _ in range(21):
        strategy.settle()
        before = strategy.grown_bytes
        strategy.extend(0, 2 * PAGE_TOKENS)
        grown.append((strategy.grown_bytes - before) // CHUNK)
    assert grown == [1, 1, 0] * 7  # three pages a chunk


def test_a_chunk_that_was_kept_is_grown_into_again():
    strategy = started(release="deferred", low_water_bytes=100 * CHUNK)
    assert filled(strategy, 0, 6) == strategy.grown_bytes == 2 * CHUNK
    strategy.close(0)
    assert filled(strategy, 1, 6) == 0 and strategy.grown_bytes == 4 * CHUNK


def test_what_a_window_gives_back_and_takes_again_is_no_growth():
    strategy = started(model=HYBRID)
    strategy.open(0, CONTEXT)
    strategy.extend(0, 4 * PAGE_TOKENS)
    before = strategy.grown_bytes
    strategy.extend(0, 2 * PAGE_TOKENS)  # two local pages of four that were given back
    assert strategy.grown_bytes == before


def test_mapped_ahead_never_costs_a_request():
    strategy = started(10 * CHUNK, HYBRID, growth="ahead", ahead_chunks=4)
    plain = started(10 * CHUNK, HYBRID)
    for chosen in (strategy, plain):
        chosen.open(0, CONTEXT)
        chosen.settle()
        with pytest.raises(OutOfMemory):
            while True:
                chosen.extend(0, PAGE_TOKENS)
                chosen.settle()
    assert strategy.resident_tokens(0) == plain.resident_tokens(0) > 0


def test_mapped_ahead_goes_on_when_memory_comes_back():
    strategy = started(4 * CHUNK, growth="ahead", ahead_chunks=3)
    other = strategy.device.allocate("workspace", "other", 3 * CHUNK)
    strategy.open(0, CONTEXT)
    strategy.settle()
    assert strategy.footprint().committed_bytes == CHUNK
    other.free()
    strategy.extend(0, 1)
    strategy.settle()
    assert strategy.footprint().committed_bytes == 4 * CHUNK


def test_mapped_ahead_failure_is_told_at_the_next_extension():
    strategy = started(growth="ahead")

    def fail(*_):
        raise OSError("driver lost")

    strategy.pools[0].allocator.prepare_chunk = fail
    strategy.open(0, CONTEXT)
    strategy.settle()
    with pytest.raises(RuntimeError, match="mapping ahead has failed"):
        strategy.extend(0, 1)
    assert strategy.resident_tokens(0) == 0
    strategy.stop()


def test_a_request_that_waits_for_a_chunk_does_not_wait_for_another():
    asked, served, late = 0, 0, 0
    go = threading.Semaphore(0)

    def requests():
        nonlocal served
        while asked < 100:
            go.acquire()
            with mapper.first():
                served += 1

    def prepare():
        nonlocal asked, late
        late += served < asked
        asked += 1
        go.release()
        while not mapper._waiting:  # for the lock, which is held here
            time.sleep(1e-4)
        return asked < 100

    lock = threading.RLock()
    mapper = AheadMapper(lock, prepare)
    requester = threading.Thread(target=requests)
    requester.start()
    with lock:
        mapper.poke()
    requester.join()
    mapper.stop()
    assert (asked, served, late) == (100, 100, 0)


def test_mapped_ahead_under_many_threads_of_requests():
    strategy = started(growth="ahead", ahead_chunks=2, release="deferred", low_water_bytes=CHUNK)
    errors = []

    def requests(sequence):
        try:
            for _ in range(100):
                strategy.open(sequence, CONTEXT)
                strategy.extend(sequence, 5 * PAGE_TOKENS)
                strategy.extend(sequence, 1)
                strategy.close(sequence)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=requests, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    strategy.settle()
    assert not errors
    assert strategy.footprint().committed_bytes <= CHUNK
    assert strategy.pools[0].held_pages == 0
    mapper = strategy._ahead._thread
    assert mapper.is_alive()
    strategy.stop()
    assert not mapper.is_alive()
