"""torch's segments as an H200 took them, and never less than what is asked for."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.runs import load_run
from harness.sizes import MIB
from harness.torch_segments import TorchSegments, taken_bytes
from tests.harness.command import ROOT

RUNS = ("h200_report", "h200_qwen3_30b_a3b", "h200_remedies")


@pytest.mark.parametrize("name", RUNS)
def test_the_workspaces_of_a_run_took_what_is_foreseen(name):
    events = load_run(ROOT / "results/reference" / name).timeline
    seen = 0
    for _, own in events.groupby("trial_id"):
        own = own.reset_index(drop=True)
        buffers = own[(own["phase"] == "workspace") & (own["event_bytes"] > 0)]
        if buffers.empty:
            continue
        first = buffers.index[0]
        reserved = own["torch_reserved_bytes"]
        measured = reserved[buffers.index[-1]] - reserved[first - 1]
        foreseen = sum(taken_bytes(buffers["event_bytes"].astype(int)))
        # Tables made before may have left room in a segment of each kind: never more is taken.
        assert 0 <= foreseen - measured < 42 * MIB
        seen += 1
    assert seen > 2


@given(st.lists(st.integers(1, 64 * MIB), max_size=30))
def test_segments_hold_what_is_asked_for(sizes):
    taken = taken_bytes(sizes)
    assert sum(taken) >= sum(sizes)
    assert all(t % (2 * MIB) == 0 for t in taken)
    assert sum(taken) <= sum(sizes) + 20 * MIB * len(sizes)
    segments = TorchSegments()
    assert [segments.take(n) for n in sizes] == taken


def test_the_host_rounds_each_up():
    assert taken_bytes([1, 4096, 4097], 4096) == [4096, 4096, 8192]
