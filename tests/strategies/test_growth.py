"""Growth variants of paged: mapped ahead, deferred release, a budget."""

import threading

import pytest

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
    threads_before = threading.active_count()
    strategy.stop()
    assert threading.active_count() == threads_before - 1
