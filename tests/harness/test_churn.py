"""Churn leaves nothing behind, is repeatable, and tells policies apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.churn import Churn
from harness.lengths import mixed_lengths
from strategies.device_host import HostDevice
from strategies.registry import build
from tests.strategies.small_models import HYBRID, SCALED

CONTEXT = 16384


def churned(
    name,
    model=SCALED,
    operations=400,
    seed=0,
    context=CONTEXT,
    chunks=60,
    rows=256,
    observe=lambda churn: None,
    **options,
):
    device = HostDevice(chunks * max(g.chunk_bytes for g in model.groups))
    strategy = build(name, device, model, context, rows, **options)
    strategy.start()
    capacity = strategy.footprint().committed_bytes or device.free_bytes()
    lengths = mixed_lengths(seed, operations, max(1, context // 64), context)
    churn = Churn(strategy, model.token_bytes, capacity, lengths, context, seed, observe)
    churn.run()
    return churn, strategy, device


@pytest.mark.parametrize("model", [SCALED, HYBRID], ids=["plain", "hybrid"])
@pytest.mark.parametrize("name", ["paged", "eager_pages"])
def test_everything_comes_back(name, model):
    small = {} if model is SCALED else {"context": 512, "rows": 12}
    churn, strategy, device = churned(name, model, **small)
    held = strategy.footprint()
    assert held.live_bytes == 0 and not churn.totals
    assert held.committed_bytes == (0 if name == "paged" else held.reserved_bytes)
    assert churn.opened > 50
    strategy.stop()
    assert device.used_bytes() == 0


def test_deferred_release_keeps_what_it_was_told_to():
    mark = 5 * SCALED.groups[0].chunk_bytes
    _, strategy, _ = churned("paged", release="deferred", low_water_bytes=mark)
    assert strategy.footprint().committed_bytes == mark


def test_the_same_seed_is_the_same_churn():
    def seen(seed):
        churn = churned("paged", operations=200, seed=seed)[0]
        return churn.opened, churn.refused, churn.means.parts(), churn.admissible.of_free

    assert seen(1) == seen(1)
    assert seen(1) != seen(2)


@pytest.mark.parametrize("name", ["paged", "static"])
def test_what_is_counted_on_the_way_is_what_the_strategy_says(name):
    seen = []

    def observe(churn):
        strategy, token = churn.strategy, churn.token_bytes
        rooms = {s: strategy.room_tokens(s) for s in churn.totals}
        tokens = {s: strategy.resident_tokens(s) for s in churn.totals}
        internal = sum(max(0, rooms[s] - churn.totals[s]) for s in rooms)
        later = sum(max(0, min(rooms[s], churn.totals[s]) - tokens[s]) for s in rooms)
        assert churn.resident_tokens == sum(tokens.values())
        parts = churn.parts
        assert (parts.internal, parts.reserved) == (internal * token, later * token)
        capacity = churn.capacity_bytes // token
        assert churn.free_tokens() == max(0, capacity - sum(rooms.values()))
        seen.append(len(rooms))

    slots = {"mem_fraction_of": "device", "slot_policy": "exact"} if name == "static" else {}
    churn = churned(name, observe=observe, **slots)[0]
    assert len(seen) > 100 and max(seen) > 5 and seen[-1] == 0
    assert churn.cut_short + churn.opened > 50


def test_a_step_of_the_clock_is_a_token_of_every_open_sequence():
    """Between two readings no more is generated than all open sequences do in the steps passed."""
    grown = []

    class Watched(Churn):
        def _grow_some(self):
            open_, before = len(self.totals), self.decode_steps
            tokens = self.resident_tokens
            super()._grow_some()
            more = self.resident_tokens - tokens
            if more > 0:  # else nothing grew, or a sequence that found no memory was closed
                assert (self.decode_steps - before) * open_ == pytest.approx(more)
                grown.append(more)

    device = HostDevice(60 * SCALED.groups[0].chunk_bytes)
    strategy = build("paged", device, SCALED, CONTEXT, 256)
    strategy.start()
    lengths = mixed_lengths(0, 400, 256, CONTEXT)
    churn = Watched(strategy, SCALED.token_bytes, device.free_bytes(), lengths, CONTEXT, 0)
    churn.run()
    assert len(grown) > 50 and sum(grown) / churn.peak_open < churn.decode_steps < sum(grown)


def test_slots_fragment_and_pages_do_not():
    exact = churned("static", mem_fraction_of="device", slot_policy="exact")[0]
    pages = churned("eager_pages")[0]
    assert exact.refused_while_free > 0
    assert min(exact.admissible.of_free) < 0.9
    assert pages.refused_while_free == 0
    assert min(pages.admissible.of_free) == 1.0


def test_larger_chunks_hold_back_more():
    def external(pages_per_chunk):
        model = replace(
            SCALED, groups=(replace(SCALED.groups[0], pages_per_chunk=pages_per_chunk),)
        )
        return churned("paged", model, chunks=1320 // pages_per_chunk)[0].means.parts().external

    assert external(4) < external(22) < external(88)


def test_lengths_stay_in_their_range_and_cover_it():
    lengths = mixed_lengths(0, 2000, 10, 1000)
    assert min(lengths) >= 10 and max(lengths) <= 1000
    small = sum(n < 100 for n in lengths)
    assert 800 < small < 1200  # uniform in the logarithm
    assert mixed_lengths(0, 3, 7, 7) == [7, 7, 7]
