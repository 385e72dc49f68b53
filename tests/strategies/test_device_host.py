"""The scale model's device: really resident, really given back, refused by budget."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from strategies import host_memory
from strategies.device_host import HostDevice
from strategies.errors import OutOfMemory
from strategies.host_memory import PAGE_BYTES, HostMapping
from tests.strategies.small_models import Events

CHUNK = 352 * 1024


def test_allocation_is_resident_until_freed_and_told():
    events = Events()
    device = HostDevice(100 * PAGE_BYTES, observer=events)
    held = device.allocate("weights", "weights", 10 * PAGE_BYTES - 5)
    assert device.used_bytes() == 10 * PAGE_BYTES
    assert device.free_bytes() == 90 * PAGE_BYTES
    assert held.nbytes == held.u8.numel() == 10 * PAGE_BYTES - 5
    held.free()
    held.free()
    assert device.used_bytes() == 0 and device.free_bytes() == 100 * PAGE_BYTES
    nbytes = 10 * PAGE_BYTES - 5
    assert events.seen == [("weights", "weights", nbytes), ("weights", "weights", -nbytes)]


def test_budget_refuses_with_what_was_asked_and_what_was_free():
    device = HostDevice(10 * PAGE_BYTES)
    device.allocate("weights", "weights", 4 * PAGE_BYTES)
    with pytest.raises(OutOfMemory) as refused:
        device.allocate("workspace", "activations", 6 * PAGE_BYTES + 1)
    assert refused.value.requested_bytes == 6 * PAGE_BYTES + 1
    assert refused.value.free_bytes == 6 * PAGE_BYTES
    assert (refused.value.phase, refused.value.allocation) == ("workspace", "activations")
    assert refused.value.source == "budget"
    assert device.used_bytes() == 4 * PAGE_BYTES
    device.allocate("workspace", "activations", 6 * PAGE_BYTES)
    assert device.free_bytes() == 0


def test_arena_commits_whole_chunks_and_the_kernel_agrees():
    device = HostDevice(20 * CHUNK)
    arena = device.reserve(100 * CHUNK, CHUNK)
    assert (arena.kind, arena.reserved_bytes, device.used_bytes()) == ("mmap", 100 * CHUNK, 0)
    assert arena.commit(CHUNK // 2, 2 * CHUNK + 1, "fill", "kv_pages") == 3 * CHUNK
    assert arena.commit(0, 4 * CHUNK, "fill", "kv_pages") == CHUNK
    assert device.used_bytes() == arena.resident_bytes() == arena.committed_bytes == 4 * CHUNK
    arena.np[: 4 * CHUNK] = 7
    assert arena.decommit(1, 3 * CHUNK - 1) == CHUNK
    assert device.used_bytes() == arena.committed_bytes == 3 * CHUNK
    assert arena.commit(CHUNK, 2 * CHUNK, "fill", "kv_pages") == CHUNK
    assert not arena.np[CHUNK : 2 * CHUNK].any() and arena.np[:CHUNK].all()
    arena.close()
    arena.close()
    assert device.used_bytes() == 0 and device.free_bytes() == 20 * CHUNK


def test_arena_refusal_changes_nothing():
    device = HostDevice(5 * CHUNK)
    arena = device.reserve(10 * CHUNK, CHUNK)
    arena.commit(3 * CHUNK, 4 * CHUNK, "fill", "kv_pages")
    with pytest.raises(OutOfMemory) as refused:
        arena.commit(0, 10 * CHUNK, "pool", "kv_pool")
    assert refused.value.requested_bytes == 9 * CHUNK
    assert refused.value.free_bytes == 4 * CHUNK
    assert device.used_bytes() == arena.committed_bytes == CHUNK
    assert arena.commit(5 * CHUNK, 9 * CHUNK, "pool", "kv_pool") == 4 * CHUNK


def test_arena_u8_and_np_are_the_same_bytes():
    device = HostDevice(CHUNK)
    arena = device.reserve(CHUNK, CHUNK)
    arena.commit(0, 1, "fill", "kv_pages")
    arena.u8[5] = 9
    assert arena.np[5] == 9
    arena.zero(0, CHUNK)
    assert int(arena.u8[5]) == 0


@pytest.mark.parametrize("lo, hi", [(-1, 1), (0, 4 * CHUNK + 1), (2, 1)])
def test_arena_refuses_ranges_outside(lo, hi):
    arena = HostDevice(CHUNK).reserve(4 * CHUNK, CHUNK)
    with pytest.raises(ValueError, match="not inside"):
        arena.commit(lo, hi, "fill", "kv_pages")


def test_bad_input_is_one_line():
    device = HostDevice(CHUNK)
    with pytest.raises(ValueError, match="arena=mapped: allowed on the host are auto, mmap"):
        device.reserve(CHUNK, CHUNK, "mapped")
    with pytest.raises(ValueError, match="multiple of 4096"):
        device.reserve(CHUNK, 5000)
    with pytest.raises(ValueError, match="at least 1"):
        HostDevice(0)


def test_host_without_memory_is_a_memory_error_not_an_oom(monkeypatch):
    device = HostDevice(1 << 62)
    with pytest.raises(MemoryError):
        device.allocate("weights", "weights", 1 << 60)
    assert device.free_bytes() == 1 << 62

    def no_memory(self, lo, hi):
        raise MemoryError("none")

    arena = device.reserve(4 * CHUNK, CHUNK)
    monkeypatch.setattr(HostMapping, "touch", no_memory)
    with pytest.raises(MemoryError):
        arena.commit(0, 4 * CHUNK, "pool", "kv_pool")
    with pytest.raises(MemoryError):
        device.allocate("weights", "weights", CHUNK)
    assert device.free_bytes() == 1 << 62 and arena.committed_bytes == 0


def test_touch_without_populate_keeps_what_is_written(monkeypatch):
    mapping = HostMapping(8 * PAGE_BYTES)
    mapping.np[: 2 * PAGE_BYTES] = 3
    monkeypatch.setattr(host_memory, "_MADV_POPULATE_WRITE", 9999)
    mapping.touch(0, 6 * PAGE_BYTES)
    assert mapping.resident_bytes() == 6 * PAGE_BYTES
    assert int(mapping.np[: 2 * PAGE_BYTES].min()) == 3
    mapping.close()


def test_smaps_and_mincore_agree(monkeypatch):
    mapping = HostMapping(64 * PAGE_BYTES)
    mapping.touch(8 * PAGE_BYTES, 24 * PAGE_BYTES)
    by_mincore = mapping.resident_bytes()
    monkeypatch.setattr(host_memory, "_mincore_is_honest", lambda: False)
    assert mapping.resident_bytes() == by_mincore == 16 * PAGE_BYTES
    mapping.close()


def test_device_close_gives_everything_back():
    device = HostDevice(100 * CHUNK)
    device.allocate("weights", "weights", CHUNK)
    device.reserve(4 * CHUNK, CHUNK).commit(0, CHUNK, "fill", "kv_pages")
    device.close()
    assert device.used_bytes() == 0 and device.free_bytes() == 100 * CHUNK


def test_no_torch_on_the_way_to_refusal():
    """A bracket trial on the host needs no torch."""
    code = (
        "import sys\n"
        "from strategies.registry import build\n"
        "from strategies.device_host import HostDevice\n"
        "from tests.strategies.small_models import SCALED\n"
        "s = build('paged', HostDevice(4 << 20), SCALED, 10_000)\n"
        "s.start(); s.open(0, 9000); s.extend(0, 9000); s.close(0); s.stop()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_tensor_copies_plain_data():
    made = HostDevice(CHUNK).tensor([[1, 2], [3, 4]], "int32")
    assert np.array_equal(made.numpy(), [[1, 2], [3, 4]]) and made.dtype.itemsize == 4
