"""What a workload tells of the stalls of its growth."""

from __future__ import annotations

import random

import pytest

from harness.growth import Growth


@pytest.mark.parametrize(
    ("events", "p50", "p99"), [(1, 0, 0), (100, 50, 99), (200, 100, 198), (1000, 500, 990)]
)
def test_percentiles_of_stalls_are_their_order_statistics(events, p50, p99):
    growth = Growth(1.0, 4096, [1.0 + n for n in random.Random(0).sample(range(events), events)])
    row = growth.columns()
    assert (row["grow_events"], row["grow_stall_us_p50"], row["grow_stall_us_p99"]) == (
        events,
        1 + p50,
        1 + p99,
    )
