"""Paged and eager pages: growth, admission, windows."""

import pytest

from strategies.device_host import HostDevice
from strategies.eager_pages import EagerPages
from strategies.errors import OutOfMemory, Refused
from strategies.paged import Paged
from tests.strategies.pools import CHUNK, CONTEXT, LOCAL_CHUNK, filled, held, started
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN


def test_nothing_is_committed_before_a_token_and_all_is_given_back():
    strategy = started()
    assert strategy.footprint().committed_bytes == 0
    strategy.open(0, CONTEXT)
    assert strategy.footprint().committed_bytes == 0
    assert strategy.extend(0, 1) == CHUNK
    assert strategy.extend(0, 3 * PAGE_TOKENS - 1) == 0
    assert strategy.extend(0, 1) == CHUNK
    strategy.close(0)
    assert strategy.footprint().committed_bytes == 0


def test_refusal_names_the_chunks_the_extension_needs():
    strategy = started(10 * CHUNK)
    filled(strategy, 0, 28)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, 3 * PAGE_TOKENS)
    error = refused.value
    assert (error.phase, error.allocation, error.source) == ("fill", "kv_pages", "budget")
    assert (error.requested_bytes, error.free_bytes) == (CHUNK, 0)
    assert error.tokens == 28 * PAGE_TOKENS
    assert strategy.extend(0, 2 * PAGE_TOKENS) == 0


def test_free_pages_of_committed_chunks_are_used_before_a_refusal():
    """Lowest first would need a new chunk, but the holes suffice."""
    strategy = started(4 * CHUNK)
    for sequence in range(4):
        filled(strategy, sequence, 3)
    strategy.close(0)
    strategy.device.allocate("workspace", "other", CHUNK)
    strategy.close(3)
    strategy.open(5, CONTEXT)
    strategy.extend(5, PAGE_TOKENS)  # the lowest free page: chunk 0 again
    assert held(strategy, 5) == [0]
    assert strategy.device.free_bytes() == 0
    strategy.extend(5, 2 * PAGE_TOKENS)
    assert held(strategy, 5) == [0, 1, 2]


def test_holes_of_high_chunks_serve_when_a_low_chunk_cannot_be_committed():
    strategy = started(3 * CHUNK)
    filled(strategy, 0, 3)
    filled(strategy, 1, 4)
    strategy.close(0)
    other = strategy.device.allocate("workspace", "other", CHUNK)
    strategy.open(2, CONTEXT)
    assert strategy.can_admit(2 * PAGE_TOKENS) and not strategy.can_admit(3 * PAGE_TOKENS)
    assert strategy.extend(2, 2 * PAGE_TOKENS) == 0
    assert held(strategy, 2) == [7, 8]
    other.free()
    assert strategy.extend(2, PAGE_TOKENS) == CHUNK
    assert held(strategy, 2) == [7, 8, 0]


def test_committed_policy_fills_holes_first():
    strategy = started(page_policy="committed")
    filled(strategy, 0, 3)
    filled(strategy, 1, 4)
    strategy.close(0)
    assert filled(strategy, 2, 2) == 0
    assert held(strategy, 2) == [7, 8]


def test_scattered_commits_roll_back_together():
    """Free chunks 0 and 2 are two runs; the second is refused."""
    strategy = started()
    for sequence in range(4):
        filled(strategy, sequence, 3)
    strategy.close(0)
    strategy.close(2)
    strategy.open(5, CONTEXT)
    before = strategy.footprint()
    strategy.device.refuse(1, forever=True)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(5, 6 * PAGE_TOKENS)
    assert refused.value.requested_bytes == 2 * CHUNK
    assert strategy.footprint() == before
    assert strategy.device.used_bytes() == before.committed_bytes + 8192
    strategy.device.obey()
    assert strategy.extend(5, 6 * PAGE_TOKENS) == 2 * CHUNK


def test_second_group_refused_takes_the_first_group_back():
    strategy = started(model=HYBRID)
    strategy.open(0, CONTEXT)
    before = strategy.footprint()
    strategy.device.refuse(1, forever=True)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, 1)
    assert refused.value.requested_bytes == CHUNK + LOCAL_CHUNK
    assert strategy.footprint() == before
    assert [pool.held_pages for pool in strategy.pools] == [0, 0]
    strategy.device.obey()
    strategy.extend(0, 1)
    assert [held(strategy, 0, g) for g in (0, 1)] == [[0], [0]]


def test_pages_behind_the_window_come_back_and_are_used_again():
    strategy = started(model=HYBRID)
    strategy.open(0, CONTEXT)
    for page in range(40):
        strategy.extend(0, PAGE_TOKENS)
        row = strategy.pools[1].table.rows[0]
        # A query at the first new token still sees from its own window's start on.
        assert row.first == page // 4 * 4 and row.count == page + 1
        assert len(held(strategy, 0, 1)) <= 4
    assert strategy.pools[1].arena.committed_bytes <= 2 * LOCAL_CHUNK
    full = 40 * PAGE_TOKENS * PLAIN.token_bytes
    assert strategy.footprint().live_bytes == full + 4 * PAGE_TOKENS * PLAIN.token_bytes
    table = strategy.batch([0])[1].page_table.numpy()[0]
    backed = strategy.pools[1].allocator._committed
    assert all(backed[page // 2] for page in table)
    assert table[36:].tolist() == held(strategy, 0, 1)


def test_a_step_across_the_window_keeps_what_its_first_query_sees():
    strategy = started(model=HYBRID)
    strategy.open(0, CONTEXT)
    strategy.extend(0, 3 * PAGE_TOKENS)
    strategy.extend(0, 6 * PAGE_TOKENS)
    assert strategy.pools[1].table.rows[0].first == 0
    strategy.extend(0, 1)
    assert strategy.pools[1].table.rows[0].first == 8


def test_dead_pages_keep_their_bytes_when_the_extension_fails():
    strategy = started(model=HYBRID)
    strategy.open(0, CONTEXT)
    strategy.extend(0, 4 * PAGE_TOKENS)
    strategy.pools[1].arena.np[: 2 * LOCAL_CHUNK] = 9
    before = strategy.footprint()
    strategy.device.refuse(0, forever=True)
    with pytest.raises(OutOfMemory):
        strategy.extend(0, 9 * PAGE_TOKENS)
    assert strategy.footprint() == before
    assert (strategy.pools[1].arena.np[: 2 * LOCAL_CHUNK] == 9).all()
    assert held(strategy, 0, 1) == [0, 1, 2, 3]


def test_open_refuses_only_by_context_and_rows():
    strategy = started(2 * CHUNK, sequences=4)
    with pytest.raises(Refused):
        strategy.open(0, CONTEXT + 1)
    for sequence in range(4):
        strategy.open(sequence, CONTEXT)
    with pytest.raises(Refused, match="all are open"):
        strategy.open(4, 1)
    with pytest.raises(ValueError, match="sequence=0: is open already"):
        strategy.open(0, 1)
    with pytest.raises(ValueError, match="sequence=9: is not open"):
        strategy.extend(9, 1)


def test_eager_pages_commits_its_budget_and_runs_out_of_pages():
    strategy = started(
        50 * CHUNK, kind=EagerPages, mem_fraction=0.5, workspace_reserve_bytes=10 * CHUNK
    )
    assert strategy.footprint().committed_bytes == 20 * CHUNK
    assert strategy.can_admit(60 * PAGE_TOKENS) and not strategy.can_admit(60 * PAGE_TOKENS + 1)
    filled(strategy, 0, 59)
    with pytest.raises(OutOfMemory) as refused:
        strategy.extend(0, 2 * PAGE_TOKENS)
    assert refused.value.source == "pool"
    assert refused.value.requested_bytes == 2 * refused.value.free_bytes == 2 * CHUNK // 3
    strategy.close(0)
    assert strategy.footprint().committed_bytes == 20 * CHUNK
    assert strategy.footprint().live_bytes == 0


def test_eager_pages_without_room_is_refused():
    device = HostDevice(5 * CHUNK)
    strategy = EagerPages(device, PLAIN, 30, 1, workspace_reserve_bytes=5 * CHUNK)
    with pytest.raises(Refused, match="leaves no room"):
        strategy.start()
    assert device.used_bytes() == 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("growth", "async"),
        ("release", "never"),
        ("ahead_chunks", 0),
        ("low_water_bytes", -1),
        ("mem_fraction", 0),
        ("workspace_reserve_bytes", -1),
    ],
)
def test_bad_input_is_one_line(key, value):
    with pytest.raises(ValueError, match=f"^{key}={value}: [^\n]*$"):
        Paged(HostDevice(CHUNK), PLAIN, CONTEXT, 1, **{key: value})
