"""The mapped arena against a driver that counts and refuses."""

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.arena_mapped import MappedArena
from strategies.ballast import PIECE_BYTES, Ballast
from strategies.device_host import HostDevice
from strategies.dlpack import KDL_CPU
from strategies.driver_memory import DriverError, DriverMemory, DriverRefusal
from strategies.errors import OutOfMemory
from strategies.paged import Paged
from strategies.static import Static
from tests.strategies.fake_driver import INVALID_VALUE, OUT_OF_MEMORY, FakeDriver
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN

CHUNK = 8192


def arena_of(driver, chunks=16, chunk_bytes=CHUNK):
    return MappedArena(
        DriverMemory(0, driver),
        chunks * chunk_bytes,
        chunk_bytes,
        lambda: driver.log.append("synchronize"),
        device_type=KDL_CPU,
    )


def commit(arena, lo, hi):
    return arena.commit(lo * CHUNK, hi * CHUNK, "fill", "kv_pages")


def state_of(driver, arena):
    return sorted(driver.mappings), sorted(driver.readable), arena.committed_bytes


def test_commit_maps_once_and_drops_its_handles():
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    assert (arena.kind, arena.fresh_is_zero, driver.physical_bytes) == ("mapped", False, 0)
    assert commit(arena, 2, 4) == 2 * CHUNK
    assert arena.commit(CHUNK + 1, 5 * CHUNK - 1, "fill", "kv_pages") == 2 * CHUNK
    assert commit(arena, 1, 5) == 0
    assert driver.physical_bytes == arena.committed_bytes == 4 * CHUNK
    assert not driver.handles and len(driver.readable) == 4
    # chunks 2-3 are one run; 1 and 4 are two
    assert driver.log.count("cuMemSetAccess") == 3


def test_bytes_are_readable_through_torch():
    arena = arena_of(FakeDriver(100 * CHUNK))
    commit(arena, 1, 3)
    assert arena.u8.shape == (16 * CHUNK,) and arena.u8.element_size() == 1
    arena.u8[CHUNK : 3 * CHUNK] = 7
    arena.zero(2 * CHUNK, 3 * CHUNK)
    assert int(arena.u8[CHUNK : 3 * CHUNK].sum()) == 7 * CHUNK


def test_the_view_outlives_garbage_collection():
    import gc

    arena = arena_of(FakeDriver(100 * CHUNK))
    commit(arena, 0, 1)
    part = arena.u8[:10]
    gc.collect()
    part.fill_(3)
    assert int(arena.u8[:10].sum()) == 30


def test_decommit_waits_for_the_device_and_unmaps_whole_chunks():
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    commit(arena, 0, 6)
    del driver.log[:]
    assert arena.decommit(1, 4 * CHUNK + 1) == 3 * CHUNK
    assert driver.log.index("synchronize") < driver.log.index("cuMemUnmap")
    assert driver.physical_bytes == arena.committed_bytes == 3 * CHUNK
    del driver.log[:]
    assert arena.decommit(1, 4 * CHUNK) == 0
    assert "synchronize" not in driver.log


def test_close_gives_back_memory_and_addresses():
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    commit(arena, 3, 6)
    arena.close()
    arena.close()
    assert driver.physical_bytes == 0 and not driver.ranges
    assert arena.committed_bytes == arena.reserved_bytes == 0


def test_refusal_by_capacity_is_all_or_nothing_and_not_sticky():
    driver = FakeDriver(5 * CHUNK)
    arena = arena_of(driver)
    commit(arena, 1, 2)
    before = state_of(driver, arena)
    with pytest.raises(OutOfMemory) as refused:
        arena.commit(0, 9 * CHUNK, "pool", "kv_pool")
    error = refused.value
    assert (error.phase, error.allocation, error.source) == ("pool", "kv_pool", "driver")
    assert (error.requested_bytes, error.free_bytes) == (8 * CHUNK, 4 * CHUNK)
    assert error.refused_bytes == CHUNK
    assert state_of(driver, arena) == before and not driver.handles
    assert commit(arena, 0, 5) == 4 * CHUNK


def calls_of_a_commit():
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    commit(arena, 3, 4)
    before = len(driver.log)
    commit(arena, 1, 6)
    return driver.log[before:]


@pytest.mark.parametrize("status", [OUT_OF_MEMORY, INVALID_VALUE])
@pytest.mark.parametrize("call", range(len(calls_of_a_commit())))
def test_any_call_of_a_commit_may_fail(call, status):
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    commit(arena, 3, 4)
    before = state_of(driver, arena)
    driver.refuse(call, status)
    with pytest.raises((OutOfMemory, DriverError)) as failed:
        commit(arena, 1, 6)
    assert isinstance(failed.value, OutOfMemory) == (status == OUT_OF_MEMORY)
    assert state_of(driver, arena) == before
    # A handle whose release failed is still held: the driver said so.
    failed_release = status != OUT_OF_MEMORY and calls_of_a_commit()[call] == "cuMemRelease"
    held = int(failed_release)
    assert len(driver.handles) == held
    assert commit(arena, 1, 6) == 4 * CHUNK
    arena.close()
    assert driver.physical_bytes == held * CHUNK


def test_a_failing_unmap_leaves_the_account_true():
    for call in range(6):
        driver = FakeDriver(100 * CHUNK)
        arena = arena_of(driver)
        commit(arena, 0, 4)
        driver.refuse(call, INVALID_VALUE)
        try:
            arena.decommit(0, 4 * CHUNK)
        except DriverError:
            assert call < 6
        assert driver.physical_bytes == arena.committed_bytes
        arena.close()
        assert driver.physical_bytes == 0 and not driver.ranges


steps = st.lists(
    st.tuples(st.booleans(), st.integers(0, 16), st.integers(0, 16), st.integers(0, 12)),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(steps, st.integers(0, 20))
def test_any_sequence_keeps_the_account(steps, capacity):
    driver = FakeDriver(capacity * CHUNK)
    arena = arena_of(driver)
    backed = set()
    for grow, a, b, refuse in steps:
        lo, hi = min(a, b), max(a, b)
        wanted = set(range(lo, hi))
        if not grow:
            assert arena.decommit(lo * CHUNK, hi * CHUNK) == len(backed & wanted) * CHUNK
            backed -= wanted
        else:
            driver.refuse(refuse)
            try:
                assert commit(arena, lo, hi) == len(wanted - backed) * CHUNK
                backed |= wanted
            except OutOfMemory as refused:
                assert refused.requested_bytes == len(wanted - backed) * CHUNK
            driver.obey()
        assert not driver.handles and driver.physical_bytes == len(backed) * CHUNK
        assert arena.committed_bytes == len(backed) * CHUNK == len(driver.readable) * CHUNK
    arena.close()
    assert not driver.mappings and not driver.ranges


def test_a_thread_without_a_context_can_commit():
    driver = FakeDriver(100 * CHUNK)
    arena = arena_of(driver)
    failures = []

    def grow():
        try:
            commit(arena, 0, 2)
            arena.decommit(0, CHUNK)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=grow)
    thread.start()
    thread.join()
    assert not failures and arena.committed_bytes == CHUNK


def test_chunk_must_fit_the_granularity():
    driver = FakeDriver(100 * CHUNK, granularity_bytes=2 << 20)
    with pytest.raises(ValueError, match="chunk_bytes=8192: must be a multiple of 2097152"):
        arena_of(driver)


def test_ballast_makes_the_driver_refuse():
    driver = FakeDriver(10 * PIECE_BYTES, granularity_bytes=2 << 20)
    memory = DriverMemory(0, driver)
    ballast = Ballast(memory, 3 * PIECE_BYTES + 1)
    assert ballast.nbytes == driver.physical_bytes == 3 * PIECE_BYTES + (2 << 20)
    assert not driver.mappings
    with pytest.raises(DriverRefusal):
        Ballast(memory, 7 * PIECE_BYTES)
    assert driver.physical_bytes == ballast.nbytes
    ballast.close()
    ballast.close()
    assert driver.physical_bytes == 0


class FakeCuda(HostDevice):
    """A host device whose arenas are mapped by the fake driver, which alone refuses growth."""

    def __init__(self, driver):
        super().__init__(1 << 40)
        self.driver, self.capacity_bytes = driver, driver.capacity_bytes

    def free_bytes(self):
        return self.driver.capacity_bytes - self.driver.physical_bytes

    def reserve(self, reserve_bytes, chunk_bytes, kind="auto"):
        return arena_of(self.driver, -(-reserve_bytes // chunk_bytes), chunk_bytes)


@pytest.mark.parametrize("model", [PLAIN, HYBRID], ids=lambda m: m.name)
@pytest.mark.parametrize("growth", ["sync", "ahead"])
def test_paged_on_a_mapped_arena(model, growth):
    driver = FakeDriver(60 * 12288)
    strategy = Paged(FakeCuda(driver), model, 40 * PAGE_TOKENS, 4, growth=growth)
    strategy.start()
    for cycle in range(200):
        strategy.open(cycle, 40 * PAGE_TOKENS)
        strategy.extend(cycle, (1 + cycle % 20) * PAGE_TOKENS)
        for pool in strategy.pools:
            row = pool.table.rows[cycle]
            for page in row.held.tolist():
                nbytes = pool.allocator.page_bytes
                content = pool.arena.u8[page * nbytes : (page + 1) * nbytes]
                assert not content.any(), "fresh and reused pages are zeroed"
                content.fill_(255)
        strategy.extend(cycle, PAGE_TOKENS)
        strategy.close(cycle)
        strategy.settle()
        assert driver.physical_bytes == 0
    strategy.stop()
    assert not driver.ranges and not driver.handles


@pytest.mark.parametrize("kind", [Paged, Static])
def test_a_refused_chunk_anywhere_leaves_the_strategy_as_it_was(kind):
    for after in range(40):
        driver = FakeDriver(30 * 12288)
        strategy = kind(FakeCuda(driver), PLAIN, 20 * PAGE_TOKENS, 1)
        driver.refuse(after)
        try:
            strategy.start()
        except OutOfMemory as refused:
            assert refused.requested_bytes == 7 * 12288
            assert driver.physical_bytes == 0 and not driver.ranges
            driver.obey()
            strategy.start()
        strategy.open(0, 20 * PAGE_TOKENS)
        strategy.extend(0, 20 * PAGE_TOKENS)  # one refusal is answered by a second try
        driver.obey()
        assert strategy.footprint().live_bytes == 20 * PAGE_TOKENS * PLAIN.token_bytes
        assert driver.physical_bytes == 7 * 12288 and not driver.handles
        strategy.stop()
        assert driver.physical_bytes == 0 and not driver.ranges
