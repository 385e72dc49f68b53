"""Static: sizes, slots and refusals."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.view import Geometry
from strategies import sizing
from strategies.device_host import HostDevice
from strategies.errors import OutOfMemory, Refused
from strategies.model import KVModel, LayerGroup
from strategies.slots import SlotPool, slot_pages
from strategies.static import Static
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN, Events

CHUNK = PLAIN.groups[0].chunk_bytes


def started(capacity_chunks=100, model=PLAIN, context=20 * PAGE_TOKENS, sequences=3, **options):
    device = HostDevice(capacity_chunks * CHUNK, observer=Events())
    strategy = Static(device, model, context, sequences, **options)
    strategy.start()
    return strategy


def pages_of(strategy, sequence, group=0):
    return strategy.pools[group].table.rows[sequence].held.tolist()


def test_pool_is_committed_at_start_and_told():
    strategy = started()
    nbytes = sizing.pool_bytes(PLAIN, 20 * PAGE_TOKENS, 3)
    assert nbytes == 20 * CHUNK
    assert strategy.device.observer.seen == [
        ("tables", "page_table", 3 * 20 * 4),
        ("pool", "kv_pool", nbytes),
    ]
    assert strategy.device.used_bytes() == nbytes + 4096
    strategy.open(7, 10)
    assert strategy.extend(7, 10) == 0
    assert strategy.device.used_bytes() == nbytes + 4096


def test_slot_i_owns_its_pages_for_good():
    strategy = started()
    for sequence in (5, 6, 7):
        strategy.open(sequence, 20 * PAGE_TOKENS)
        strategy.extend(sequence, 3 * PAGE_TOKENS)
    assert [pages_of(strategy, s) for s in (5, 6, 7)] == [
        [0, 1, 2],
        [20, 21, 22],
        [40, 41, 42],
    ]
    assert not strategy.can_admit(1)
    strategy.close(6)
    assert strategy.can_admit(20 * PAGE_TOKENS)
    strategy.open(8, 1)
    strategy.extend(8, 1)
    assert pages_of(strategy, 8) == [20]
    assert strategy.footprint().live_bytes == (6 * PAGE_TOKENS + 1) * PLAIN.token_bytes


def test_a_fraction_below_one_admits_and_holds_less():
    strategy = started(mem_fraction=0.55)
    slot = 11 * PAGE_TOKENS
    assert strategy.slot_tokens == slot
    assert strategy.can_admit(slot) and not strategy.can_admit(slot + 1)
    strategy.open(0, 20 * PAGE_TOKENS)
    strategy.extend(0, slot)
    with pytest.raises(Refused) as refused:
        strategy.extend(0, 1)
    assert refused.value.requested_bytes == (slot + 1) * PLAIN.token_bytes
    assert refused.value.free_bytes == slot * PLAIN.token_bytes
    assert strategy.resident_tokens(0) == slot


def test_fraction_of_the_device_leaves_the_rest_free():
    device = HostDevice(100 * CHUNK)
    device.allocate("weights", "weights", 30 * CHUNK)
    strategy = Static(device, PLAIN, 20 * PAGE_TOKENS, 8, 0.8, "device")
    strategy.start()
    assert strategy.footprint().committed_bytes == 49 * CHUNK  # 80 - 30, less the page table
    for sequence in range(7):
        strategy.open(sequence, 20 * PAGE_TOKENS)
    with pytest.raises(Refused):
        strategy.open(7, 20 * PAGE_TOKENS)
    assert pages_of(strategy, 6) == [] and strategy.resident_tokens(6) == 0


def test_fraction_of_the_device_below_one_context_is_one_smaller_slot():
    strategy = started(10, mem_fraction=0.6, mem_fraction_of="device")
    assert strategy.slot_tokens == 15 * PAGE_TOKENS
    assert strategy.can_admit(15 * PAGE_TOKENS) and not strategy.can_admit(15 * PAGE_TOKENS + 1)


def test_fraction_of_the_device_that_weights_have_used_up_is_refused():
    device = HostDevice(100 * CHUNK)
    device.allocate("weights", "weights", 80 * CHUNK)
    strategy = Static(device, PLAIN, 20 * PAGE_TOKENS, 1, 0.8, "device")
    with pytest.raises(Refused, match="leaves no room for the KV pool"):
        strategy.start()
    assert device.used_bytes() == 80 * CHUNK


def test_a_static_pool_knows_no_window():
    strategy = started(model=HYBRID, sequences=1)
    strategy.open(0, 20 * PAGE_TOKENS)
    strategy.extend(0, 20 * PAGE_TOKENS)
    assert len(pages_of(strategy, 0, 1)) == 20
    assert strategy.batch([0])[1].starts_host == (16 * PAGE_TOKENS,)


def test_pow2_and_exact_slots_admit_more_and_fragment():
    context, budget = 16 * PAGE_TOKENS, 16
    admitted = {}
    for policy in ("max", "pow2", "exact"):
        strategy = started(
            context=context, sequences=budget, slot_policy=policy, mem_fraction=1 / budget
        )
        strategy.slot_tokens = context
        strategy._slots = [SlotPool(budget)]
        count = 0
        while strategy.can_admit(3 * PAGE_TOKENS):
            strategy.open(count, 3 * PAGE_TOKENS)
            count += 1
        admitted[policy] = count
        strategy.stop()
    assert admitted == {"max": 1, "pow2": 4, "exact": 5}


def test_refusal_in_the_second_group_gives_the_first_slot_back():
    pages = [Geometry(1, 1, 1, 64, page_tokens=tokens) for tokens in (64, 32)]
    groups = tuple(LayerGroup(f"g{i}", page, 1) for i, page in enumerate(pages))
    device = HostDevice(100_000)
    model = KVModel("uneven", groups)
    strategy = Static(device, model, 96, 4, 0.51, "device", slot_policy="exact")
    strategy.start()
    free = [slots.free_pages for slots in strategy._slots]
    opened = 0
    with pytest.raises(Refused, match="no slot of 2 pages"):
        while True:
            strategy.open(opened, 33)
            opened += 1
    assert opened == 2
    after = [slots.free_pages for slots in strategy._slots]
    assert after == [free[0] - opened, free[1] - 2 * opened]


def test_start_refused_leaves_nothing_and_can_be_repeated():
    device = HostDevice(19 * CHUNK, observer=Events())
    strategy = Static(device, PLAIN, 20 * PAGE_TOKENS, 3)
    for _ in range(2):
        with pytest.raises(OutOfMemory) as refused:
            strategy.start()
        assert refused.value.requested_bytes == 20 * CHUNK
        assert refused.value.free_bytes == 19 * CHUNK - 4096
        assert (device.used_bytes(), device.observer.held_bytes) == (0, 0)


def test_bad_input_is_one_line():
    device = HostDevice(CHUNK)
    for key, value, allowed in (
        ("mem_fraction", 1.5, "above 0 and at most 1"),
        ("mem_fraction_of", "gpu", "context, device"),
        ("slot_policy", "min", "max, pow2, exact"),
    ):
        with pytest.raises(ValueError, match=f"{key}={value}: .*{allowed}"):
            Static(device, PLAIN, 100, 1, **{key: value})
    with pytest.raises(ValueError, match="sequences=0"):
        Static(device, PLAIN, 100, 0)


def test_slot_pages_by_policy():
    assert [slot_pages("pow2", n, 12) for n in (1, 2, 3, 5, 9)] == [1, 2, 4, 8, 12]
    assert [slot_pages("exact", n, 12) for n in (1, 5)] == [1, 5]
    assert slot_pages("max", 1, 12) == 12


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_slots_never_overlap_and_join_again(steps):
    pool, held = SlotPool(24), []
    for give, pages in steps:
        if give and held:
            pool.give(held.pop(pages % len(held)))
        else:
            taken = {p for lo, hi in held for p in range(lo, hi)}
            slot = pool.take(pages)
            fits = [lo for lo in range(24 - pages + 1) if not taken & set(range(lo, lo + pages))]
            assert (slot is None) == (not fits)
            if slot is not None:
                assert slot == (fits[0], fits[0] + pages)
                held.append(slot)
        assert pool.free_pages == 24 - sum(hi - lo for lo, hi in held)
    for slot in held:
        pool.give(slot)
    assert pool.largest_gap == 24
