"""What the kernels are shown."""

import pytest
import torch

from strategies import registry
from strategies.device_host import HostDevice
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN

CHUNK = PLAIN.groups[0].chunk_bytes


@pytest.fixture(params=["static", "paged", "eager_pages"])
def strategy(request):
    device = HostDevice(100 * CHUNK)
    made = registry.build(request.param, device, HYBRID, 20 * PAGE_TOKENS, 4)
    made.start()
    for sequence, tokens in ((3, 100), (1, 300), (2, 1), (0, 33)):
        made.open(sequence, 20 * PAGE_TOKENS)
        made.extend(sequence, tokens)
    return made


def test_views_name_every_page_in_order(strategy):
    for index, view in enumerate(strategy.batch([1, 2, 3])):
        pool = strategy.pools[index]
        assert view.lengths_host == (300, 1, 100) == tuple(view.lengths.tolist())
        assert view.lengths.dtype == torch.int64 and view.page_table.dtype == torch.int32
        assert view.page_table.shape == (3, 10) and view.page_table.is_contiguous()
        assert view.arena.numel() == pool.arena.reserved_bytes
        assert view.geometry is pool.group.geometry
        assert view.k_scale.tolist() == view.v_scale.tolist() == [1.0]
        for sequence, line in zip((1, 2, 3), view.page_table.tolist(), strict=True):
            row = pool.table.rows[sequence]
            assert line[row.first : row.count] == row.held.tolist()


def test_padding_names_the_sequences_own_backed_page(strategy):
    for index, view in enumerate(strategy.batch([1, 2, 3])):
        for sequence, line in zip((1, 2, 3), view.page_table.tolist(), strict=True):
            own = strategy.pools[index].table.rows[sequence].held.tolist()
            assert set(line) == set(own)


def test_starts_follow_the_window(strategy):
    full, local = strategy.batch([1, 2, 3])
    assert full.starts == (0, 0, 0)
    assert local.starts == (256, 0, 0)


def test_a_sequence_without_a_token_is_padded_with_a_backed_page(strategy):
    strategy.close(0)
    strategy.open(9, 10)
    for index, view in enumerate(strategy.batch([9, 1])):
        allocator = strategy.pools[index].allocator
        backed = {int(p) // allocator.pages_per_chunk for p in view.page_table[0]}
        assert view.lengths_host == (0, 300)
        assert all(allocator._committed[chunk] for chunk in backed)


def test_a_later_extension_does_not_change_an_earlier_view(strategy):
    before = strategy.batch([3])[0]
    line = before.page_table.tolist()
    strategy.extend(3, 8 * PAGE_TOKENS)
    strategy.close(3)
    assert before.page_table.tolist() == line and before.lengths_host == (100,)


def test_registry_names_key_value_and_what_is_allowed():
    device = HostDevice(CHUNK)
    with pytest.raises(ValueError, match=r"^strategy=pagd: allowed are static, paged, eager_pages"):
        registry.build("pagd", device, PLAIN, 100)
    with pytest.raises(ValueError, match=r"^slot_policy=max: paged allows growth, "):
        registry.build("paged", device, PLAIN, 100, slot_policy="max")
    assert registry.options("static")["mem_fraction_of"] == "context"
    assert {"static", "paged", "eager_pages"} <= set(registry.names())


def test_not_started_is_said():
    strategy = registry.build("paged", HostDevice(CHUNK), PLAIN, 100)
    with pytest.raises(RuntimeError, match="not started"):
        strategy.open(0, 10)
    with pytest.raises(RuntimeError, match="not started"):
        strategy.can_admit(10)
    strategy.stop()
