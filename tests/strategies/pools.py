"""Strategies that are started and filled, for the tests of paged and eager pages."""

from __future__ import annotations

from strategies.paged import Paged
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN, RefusingDevice

CHUNK = PLAIN.groups[0].chunk_bytes
LOCAL_CHUNK = HYBRID.groups[1].chunk_bytes
CONTEXT = 400 * PAGE_TOKENS


def started(capacity_bytes=100 * CHUNK, model=PLAIN, kind=Paged, sequences=4, **options):
    # The page tables take 8 KiB a group: 4 sequences x 400 pages x 4 B, in whole host pages.
    tables = len(model.groups) * 8192
    device = RefusingDevice(capacity_bytes + tables)
    strategy = kind(device, model, CONTEXT, sequences, **options)
    strategy.start()
    assert device.free_bytes() + strategy.footprint().committed_bytes == capacity_bytes
    return strategy


def filled(strategy, sequence, pages):
    strategy.open(sequence, CONTEXT)
    return strategy.extend(sequence, pages * PAGE_TOKENS)


def held(strategy, sequence, group=0):
    return strategy.pools[group].table.rows[sequence].held.tolist()
