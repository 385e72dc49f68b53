"""The ledger's arithmetic, held against a device that may know more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.ledger import Ledger, tolerance_bytes
from harness.sizes import MIB
from strategies.device_host import HostDevice

PHASES = ("weights", "pool", "fill")


@given(
    events=st.lists(
        st.tuples(st.sampled_from(PHASES), st.sampled_from("ab"), st.integers(0, 1000)),
        max_size=30,
    )
)
def test_sums_and_peaks(events):
    rows = []
    ledger = Ledger(rows.append)
    held, now, peaks = {}, 0, dict.fromkeys(PHASES, 0)
    top = 0
    for phase, name, size in events:
        change = -held.get((phase, name), 0) if size % 3 == 0 else size
        held[phase, name] = held.get((phase, name), 0) + change
        ledger.event(phase, name, change)
        now += change
        top = max(top, now)
        for p in PHASES:
            peaks[p] = max(peaks[p], sum(n for (q, _), n in held.items() if q == p))
    assert ledger.total_bytes == now and ledger.peak_ledger_bytes == top
    assert {p: ledger.phase_peak_bytes.get(p, 0) for p in PHASES} == peaks
    assert [r["event_bytes"] for r in rows] == [r["event_bytes"] for r in rows if r is not None]
    assert sum(r["event_bytes"] for r in rows) == now == (rows[-1]["ledger_bytes"] if rows else 0)


def test_a_device_s_allocations_are_explained():
    rows = []
    ledger = Ledger(rows.append)
    device = HostDevice(64 * MIB, observer=ledger)
    ledger.device = device
    weights = device.allocate("weights", "weights", 5 * MIB)
    device.allocate("workspace", "buffer", 3 * MIB)
    weights.free()
    assert ledger.unexplained_bytes == 0 and ledger.unexplained_phase == ""
    assert ledger.peak_device_bytes == ledger.peak_ledger_bytes == 8 * MIB
    assert [r["device_used_bytes"] for r in rows] == [5 * MIB, 8 * MIB, 3 * MIB]
    assert rows[-1]["device_free_bytes"] == 61 * MIB
    device.close()


def test_what_the_ledger_is_not_told_of_is_unexplained_and_placed():
    ledger = Ledger(lambda row: None)
    device = HostDevice(64 * MIB)
    ledger.device = device
    device.observer = ledger
    device.allocate("weights", "weights", MIB)
    device.observer = None
    hidden = device.allocate("pool", "hidden", 7 * MIB)
    device.observer = ledger
    device.allocate("pool", "kv_pool", MIB)
    assert (ledger.unexplained_bytes, ledger.unexplained_phase) == (7 * MIB, "pool")
    hidden_freed_later = device.allocate("fill", "kv_pages", MIB)
    device.observer = None
    hidden.free()
    hidden_freed_later.free()
    device.observer = ledger
    ledger.note("decode", "timed")
    assert ledger.unexplained_bytes == 7 * MIB  # the worst is kept, not the last
    device.close()


@pytest.mark.parametrize(
    ("kind", "chunk", "allowed"),
    [
        ("host", 360_448, MIB),
        ("host", 4 * MIB, 4 * MIB),
        ("cuda", 2 * MIB, 64 * MIB),
        ("cuda", 66 * MIB, 66 * MIB),
    ],
)
def test_tolerance(kind, chunk, allowed):
    assert tolerance_bytes(kind, chunk) == allowed


class Meters(HostDevice):
    """A host device that reports an allocator's cache, as torch's on CUDA."""

    reserved_bytes = requested_bytes = 0

    def used_bytes(self) -> int:
        return super().used_bytes() + self.reserved_bytes - self.requested_bytes

    def meters(self) -> dict[str, int]:
        return {
            "torch_reserved_bytes": self.reserved_bytes,
            "torch_requested_bytes": self.requested_bytes,
        }


def test_what_the_allocator_keeps_in_its_cache_is_explained_and_what_it_lent_is_not():
    ledger = Ledger(lambda row: None)
    device = Meters(64 * MIB, observer=ledger)
    ledger.device = device
    device.allocate("tables", "table", 5 * MIB)
    device.reserved_bytes, device.requested_bytes = 6 * MIB, 5 * MIB
    ledger.note("tables", "rounded up")
    assert ledger.unexplained_bytes == 0
    device.observer = None
    device.allocate("tables", "hidden", MIB)  # lent from the cache, to somebody else
    device.requested_bytes += MIB
    ledger.note("workspace", "after")
    assert (ledger.unexplained_bytes, ledger.unexplained_phase) == (MIB, "workspace")
    device.close()
