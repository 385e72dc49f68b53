"""The malloc arena: everything at once, nothing back before the end."""

import pytest
import torch

from strategies.arena_malloc import MallocArena
from strategies.device_host import HostDevice
from strategies.errors import OutOfMemory
from strategies.paged import Paged
from tests.strategies.small_models import PAGE_TOKENS, PLAIN

CHUNK = 8192


def commit(arena, lo, hi):
    return arena.commit(lo * CHUNK, hi * CHUNK, "fill", "kv_pages")


def test_malloc_arena_is_one_allocation():
    asked, released = [], []

    def allocate(phase, allocation, nbytes):
        asked.append((phase, allocation, nbytes))
        if len(asked) == 1:
            raise OutOfMemory(phase, allocation, nbytes, 5, source="torch")
        return torch.ones(nbytes, dtype=torch.uint8)

    arena = MallocArena(allocate, 10 * CHUNK - 1, CHUNK, lambda: released.append(1))
    with pytest.raises(RuntimeError, match="no bytes before its first commit"):
        arena.u8  # noqa: B018
    with pytest.raises(OutOfMemory):
        commit(arena, 0, 1)
    assert arena.committed_bytes == 0
    assert commit(arena, 0, 1) == 10 * CHUNK == arena.committed_bytes
    assert commit(arena, 5, 9) == 0 and arena.decommit(0, 10 * CHUNK) == 0
    assert asked == [("fill", "kv_pages", 10 * CHUNK)] * 2
    arena.zero(CHUNK, 2 * CHUNK)
    assert int(arena.u8.sum()) == 9 * CHUNK
    assert not released
    arena.close()
    arena.close()
    assert arena.committed_bytes == 0 and released == [1]


class MallocDevice(HostDevice):
    def reserve(self, reserve_bytes, chunk_bytes, kind="auto"):
        def allocate(phase, allocation, nbytes):
            self.take(phase, allocation, nbytes)
            return torch.full((nbytes,), 255, dtype=torch.uint8)

        return MallocArena(allocate, reserve_bytes, chunk_bytes)


def test_paged_on_a_malloc_arena_commits_everything_at_once():
    strategy = Paged(MallocDevice(100 * 12288), PLAIN, 20 * PAGE_TOKENS, 2)
    strategy.start()
    strategy.open(0, 20 * PAGE_TOKENS)
    assert strategy.extend(0, 1) == 14 * 12288
    assert strategy.extend(0, 19 * PAGE_TOKENS) == 0
    assert not strategy.pools[0].arena.u8[: 20 * 4096].any()
    strategy.close(0)
    assert strategy.footprint().committed_bytes == 14 * 12288
    strategy.device.allocate("workspace", "other", strategy.device.free_bytes())
    assert strategy.can_admit(20 * PAGE_TOKENS)
    strategy.stop()
