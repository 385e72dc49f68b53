"""Shares of KV memory as figure 2 of the PagedAttention paper counts them."""

from __future__ import annotations

import pytest

from harness.shares import Means, Parts, Uses, parts_of
from strategies.device_host import HostDevice
from strategies.registry import build
from tests.strategies.small_models import PAGE_TOKENS, PLAIN

TOKEN = PLAIN.token_bytes
CHUNK = PLAIN.groups[0].chunk_bytes


def used(strategy, total_tokens):
    """The parts of a strategy in which sequence 0 alone is open."""
    uses = Uses(strategy, TOKEN)
    uses.read(0, total_tokens)
    return uses.parts


def test_a_slot_holds_tokens_room_for_its_own_and_room_for_none():
    device = HostDevice(4 * CHUNK + 8192)
    static = build("static", device, PLAIN, 128, 2, mem_fraction_of="device")
    static.start()
    static.open(0, 100)
    static.extend(0, 40)
    parts = used(static, 100)
    assert (parts.live, parts.reserved, parts.internal) == (40 * TOKEN, 60 * TOKEN, 28 * TOKEN)
    assert parts.committed == static.footprint().committed_bytes
    assert parts.external == parts.committed - 128 * TOKEN
    assert sum(parts.columns().values()) == pytest.approx(1)


def test_pages_waste_the_end_of_the_last_one_only():
    device = HostDevice(8 * CHUNK)
    paged = build("paged", device, PLAIN, 1000, 2)
    paged.start()
    paged.open(0, 1000)
    paged.extend(0, PAGE_TOKENS + 1)
    going_on = used(paged, 1000)
    assert (going_on.reserved, going_on.internal) == ((PAGE_TOKENS - 1) * TOKEN, 0)
    at_its_end = used(paged, PAGE_TOKENS + 1)
    assert (at_its_end.reserved, at_its_end.internal) == (0, (PAGE_TOKENS - 1) * TOKEN)
    assert at_its_end.external == CHUNK - 2 * PAGE_TOKENS * TOKEN


def test_means_weigh_by_steps_and_follow_growth():
    means = Means()
    assert means.parts() is None
    means.add(parts_of(100, 10, 50, 5), steps=3, growth=2)  # live 10, 12, 14
    means.add(parts_of(100, 40, 0, 0), steps=1)
    found = means.parts()
    assert found.live == pytest.approx((10 + 12 + 14 + 40) / 4)
    assert found.reserved == pytest.approx((50 + 48 + 46 + 0) / 4)
    assert found.committed == pytest.approx(100)


def test_nothing_committed_has_no_shares():
    assert set(Parts(0, 0, 0, 0).columns().values()) == {None}
