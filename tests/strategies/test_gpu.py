"""The CUDA device for real: mapping, refusals by the driver, ballast, views that kernels use."""

import pytest

from kernels.view import Geometry
from strategies import registry
from strategies.engine_model import GIB, MIB
from strategies.errors import OutOfMemory
from strategies.model import KVModel, LayerGroup, chunk_pages
from tests.strategies.small_models import Events

pytestmark = pytest.mark.gpu

GEOMETRY = Geometry(layers=48, kv_heads=1, q_heads=8, head_dim=128)
MODEL = KVModel("m", (LayerGroup("full", GEOMETRY, chunk_pages(GEOMETRY.page_bytes)),))
CHUNK = MODEL.groups[0].chunk_bytes
CAPACITY = 8 * GIB
# What the driver keeps for itself when address ranges grow, beside the chunks.
DRIVER_BYTES = 64 * MIB


@pytest.fixture
def device():
    from strategies.device_cuda import CudaDevice

    made = CudaDevice(0, capacity_bytes=CAPACITY, observer=Events())
    yield made
    made.empty_cache()
    made.close()


def started(device, name, context_tokens, sequences=1, **options):
    strategy = registry.build(name, device, MODEL, context_tokens, sequences, **options)
    strategy.start()
    return strategy


def test_capacity_is_what_ballast_leaves(device):
    assert CAPACITY - 2 * MIB < device.capacity_bytes <= CAPACITY
    assert 0 < device.free_bytes() < CAPACITY
    assert device.meter == "nvml" and device.uuid
    assert abs(device.capacity_bytes - device.used_bytes() - device.free_bytes()) <= DRIVER_BYTES
    meters = device.meters()
    assert meters["torch_reserved_bytes"] >= meters["torch_allocated_bytes"] >= 0
    assert meters["nvml_used_bytes"] > device.ballast_bytes > 0


def test_more_than_the_device_has_is_bad_input():
    from strategies.device_cuda import CudaDevice

    with pytest.raises(ValueError, match=r"^capacity_bytes=\d+: must be at least 1 and at most"):
        CudaDevice(0, capacity_bytes=1 << 50)


def test_allocation_is_there_until_freed_and_torch_says_no(device):
    used = device.used_bytes()
    held = device.allocate("weights", "weights", GIB)
    assert abs(device.used_bytes() - used - GIB) <= DRIVER_BYTES
    assert not held.u8[:: 1 << 20].any()
    held.free()
    assert abs(device.used_bytes() - used) <= DRIVER_BYTES
    free = device.free_bytes()
    with pytest.raises(OutOfMemory) as refused:
        device.allocate("weights", "weights", CAPACITY)
    assert refused.value.source == "torch"
    assert (refused.value.requested_bytes, refused.value.free_bytes) == (CAPACITY, free)
    assert device.observer.seen[0] == ("weights", "weights", GIB)
    assert device.observer.held_bytes == 0


def test_arena_commits_and_gives_back_physical_memory(device):
    used = device.used_bytes()
    arena = device.reserve(1000 * CHUNK, CHUNK)
    assert (arena.kind, arena.committed_bytes) == ("mapped", 0)
    assert device.used_bytes() - used <= DRIVER_BYTES
    assert arena.commit(3 * CHUNK, 23 * CHUNK, "fill", "kv_pages") == 20 * CHUNK
    assert abs(device.used_bytes() - used - 20 * CHUNK) <= DRIVER_BYTES
    arena.u8[3 * CHUNK : 23 * CHUNK].fill_(7)
    arena.zero(3 * CHUNK, 13 * CHUNK)
    assert not arena.u8[3 * CHUNK : 13 * CHUNK].any()
    assert int(arena.u8[13 * CHUNK : 23 * CHUNK].min()) == 7
    assert arena.decommit(0, 13 * CHUNK) == 10 * CHUNK
    assert abs(device.used_bytes() - used - 10 * CHUNK) <= DRIVER_BYTES
    assert int(arena.u8[13 * CHUNK : 23 * CHUNK].min()) == 7
    arena.close()
    assert abs(device.used_bytes() - used) <= DRIVER_BYTES


def test_the_driver_refuses_at_the_same_chunk_twice(device):
    arena = device.reserve(1000 * CHUNK, CHUNK)
    free = device.free_bytes()
    with pytest.raises(OutOfMemory) as refused:
        arena.commit(0, 1000 * CHUNK, "pool", "kv_pool")
    assert refused.value.source == "driver"
    assert refused.value.requested_bytes == 1000 * CHUNK
    assert abs(refused.value.free_bytes - free) <= DRIVER_BYTES
    assert arena.committed_bytes == 0 and abs(device.free_bytes() - free) <= DRIVER_BYTES
    reached = []
    for _ in range(2):
        lo = 0
        with pytest.raises(OutOfMemory):
            while True:
                arena.commit(lo, lo + CHUNK, "fill", "kv_pages")
                lo += CHUNK
        reached.append(lo)
        assert free - lo < CHUNK + DRIVER_BYTES
        arena.decommit(0, arena.reserved_bytes)
    assert reached[0] == reached[1]
    arena.close()


@pytest.mark.parametrize("options", [{}, {"growth": "ahead"}], ids=["sync", "ahead"])
def test_a_thousand_cycles_give_everything_back(device, options):
    strategy = started(device, "paged", 200_000, **options)
    used = device.used_bytes()
    for cycle in range(1000):
        strategy.open(cycle, 200_000)
        strategy.extend(cycle, 1 + 17 * cycle)
        strategy.close(cycle)
    strategy.settle()
    assert strategy.footprint().committed_bytes == 0
    assert abs(device.used_bytes() - used) <= DRIVER_BYTES
    strategy.stop()
    assert device.observer.held_bytes == 0


def test_paged_fills_to_the_driver_refusal_and_goes_on(device):
    strategy = started(device, "paged", 10_000_000)
    assert not strategy.can_admit(10_000_000)
    strategy.open(0, 10_000_000)
    with pytest.raises(OutOfMemory) as refused:
        while True:
            strategy.extend(0, 8192)
    error = refused.value
    assert (error.source, error.phase, error.allocation) == ("driver", "fill", "kv_pages")
    assert error.requested_bytes in (CHUNK, 2 * CHUNK)
    assert error.free_bytes < error.requested_bytes + DRIVER_BYTES
    assert error.tokens == strategy.resident_tokens(0) > 300_000
    before = strategy.footprint()
    with pytest.raises(OutOfMemory):
        strategy.extend(0, 8192 * 16)
    assert strategy.footprint() == before
    strategy.batch([0])[0].arena[: before.committed_bytes].fill_(1)
    strategy.close(0)
    strategy.open(1, 1000)
    strategy.extend(1, 1000)
    strategy.stop()


@pytest.mark.parametrize("arena_kind", ["mapped", "malloc"])
def test_static_starts_or_is_refused_as_a_whole(device, arena_kind):
    strategy = started(device, "static", 500_000, arena_kind=arena_kind)
    assert strategy.pools[0].arena.kind == arena_kind
    committed = strategy.footprint().committed_bytes
    assert 500_000 * MODEL.token_bytes <= committed < 500_000 * MODEL.token_bytes + 2 * CHUNK
    strategy.stop()
    free = device.free_bytes()
    with pytest.raises(OutOfMemory) as refused:
        started(device, "static", 10_000_000, arena_kind=arena_kind)
    assert refused.value.source == {"mapped": "driver", "malloc": "torch"}[arena_kind]
    assert refused.value.requested_bytes >= 10_000_000 * MODEL.token_bytes
    assert abs(device.free_bytes() - free) <= DRIVER_BYTES


def test_eager_pages_commits_what_is_free_but_the_reserve(device):
    strategy = started(device, "eager_pages", 10_000_000, workspace_reserve_bytes=GIB)
    assert GIB <= device.free_bytes() + DRIVER_BYTES <= GIB + CHUNK + 2 * DRIVER_BYTES
    strategy.open(0, 10_000_000)
    strategy.extend(0, 100_000)
    strategy.stop()


@pytest.mark.parametrize("arena_kind", ["mapped", "malloc"])
def test_kernels_write_through_the_view(device, arena_kind):
    """Tokens appended across pages and chunks lie where the page table says."""
    import torch

    from kernels import ops

    strategy = started(device, "paged", 9000, 2, arena_kind=arena_kind)
    strategy.open(5, 9000)
    strategy.open(6, 9000)
    for _ in range(4):  # interleaved, so that neither sequence is contiguous
        strategy.extend(5, 1000)
        strategy.extend(6, 900)
    view = strategy.batch([6, 5])[0]
    g = view.geometry
    values = torch.arange(4000, device="cuda").remainder(7).add(1).to(torch.bfloat16)
    k = values[:, None, None].expand(4000, 1, g.head_dim).contiguous()
    layer = g.layers - 1
    ops.append_run(view, layer, k, -k, 1, 0)
    codes = view.arena.view(torch.float8_e4m3fn)
    for token in (0, 127, 128, 2500, 3999):
        page = int(view.page_table[1, token // 128])
        k_at = g.tile_offset(page, layer, 0, 0) + token % 128 * g.head_dim
        v_at = g.tile_offset(page, layer, 1, 0) + token % 128
        v_tile = codes[v_at : v_at + (g.head_dim - 1) * 128 + 1 : 128]
        expected = float(token % 7 + 1)
        assert codes[k_at : k_at + g.head_dim].float().eq(expected).all()
        assert v_tile.float().eq(-expected).all()
    last = int(view.page_table[1, 31])
    tail = g.tile_offset(last, layer, 1, 0) + 4000 % 128
    assert not codes[tail : tail + 128 - 4000 % 128].float().any(), "the tail of a V tile is zero"
    strategy.stop()


def test_growth_in_the_background_while_kernels_run(device):
    import torch

    strategy = started(device, "paged", 300_000, growth="ahead", ahead_chunks=4)
    strategy.open(0, 300_000)
    a = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    for step in range(100):
        strategy.extend(0, 2048)
        view = strategy.batch([0])[0]
        page = int(view.page_table[0, -1])
        nbytes = GEOMETRY.page_bytes
        view.arena[page * nbytes : (page + 1) * nbytes].fill_(step)
        a = a @ a * 0.01
    device.synchronize()
    strategy.settle()
    assert strategy.pools[0].allocator.empty_chunks == 4
    strategy.stop()
