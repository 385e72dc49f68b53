"""Sizes by formula."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.view import Geometry
from strategies import sizing
from strategies.engine_model import GIB, MIB
from strategies.model import KVModel, LayerGroup, chunk_pages
from tests.strategies.small_models import HYBRID, PAGE_TOKENS, PLAIN, SCALED


def test_report_at_ten_million_on_the_scale_model():
    assert sizing.pool_chunks(SCALED.groups[0], 10_000_000) == 3552
    assert SCALED.groups[0].chunk_bytes == 360_448
    assert sizing.pool_bytes(SCALED, 10_000_000) == 3552 * 360_448
    assert sizing.page_table_bytes(SCALED, 10_000_000, 1) == 78_125 * 4
    assert sizing.scaled_bytes(78_125 * 4, 192) == 1628


@pytest.mark.parametrize("page_mib", [0.75, 1.5, 3])
def test_chunk_of_the_named_models_is_66_mib(page_mib):
    page_bytes = int(page_mib * MIB)
    assert chunk_pages(page_bytes) * page_bytes == 66 * MIB


def test_report_needs_240_gb_on_a_gpu():
    page = Geometry(48, 2, 8, 128)
    model = KVModel("report", (LayerGroup("full", page, chunk_pages(page.page_bytes)),))
    assert model.token_bytes == 24 * 1024
    assert 0 <= sizing.pool_bytes(model, 10_000_000) - 24 * 1024 * 10_000_000 < 66 * MIB
    assert sizing.pool_bytes(model, 10_000_000) > 139 * GIB


def test_fraction_is_a_decimal():
    assert sizing.slot_tokens(10_000_000, 0.55) == 5_500_000
    assert sizing.slot_tokens(10_000_001, 0.55) == 5_500_001
    assert sizing.static_device_budget_bytes(1000, 700, 0.8) == 500
    assert sizing.budget_bytes(1000, 0.7, 100) == 630
    assert sizing.budget_bytes(100, 1.0, 200) == 0


@given(st.integers(1, 200), st.integers(1, 5), st.sampled_from([PLAIN, HYBRID]))
def test_pool_is_whole_pages_a_slot_and_whole_chunks_a_pool(tokens, sequences, model):
    for group in model.groups:
        pages = sequences * -(-tokens // PAGE_TOKENS)
        chunks = sizing.pool_chunks(group, tokens, sequences)
        assert (chunks - 1) * group.pages_per_chunk < pages <= chunks * group.pages_per_chunk


@given(st.integers(0, 2_000_000), st.integers(1, 3), st.sampled_from([PLAIN, HYBRID]))
def test_budget_tokens_is_the_most_that_fits(nbytes, sequences, model):
    tokens = sizing.budget_tokens(model, nbytes, sequences)
    assert sizing.pool_bytes(model, tokens, sequences) <= nbytes
    assert sizing.pool_bytes(model, tokens + 1, sequences) > nbytes


@given(st.integers(0, 400_000), st.integers(1, 3), st.integers(1, 3000))
def test_eager_pool_fits_its_budget_and_holds_every_window(nbytes, sequences, context):
    full, local = sizing.eager_pool_chunks(HYBRID, nbytes, context, sequences)
    groups = HYBRID.groups
    assert full * groups[0].chunk_bytes + local * groups[1].chunk_bytes <= nbytes
    if local:
        held = sequences * groups[1].pages(min(context, 8 * PAGE_TOKENS))
        assert local * groups[1].pages_per_chunk >= held
        assert nbytes - local * groups[1].chunk_bytes - full * groups[0].chunk_bytes < (
            groups[0].chunk_bytes
        )


def test_window_bounds_what_a_local_group_holds():
    assert sizing.window_tokens(HYBRID.groups[1], 10_000, PAGE_TOKENS) == 5 * PAGE_TOKENS
    assert sizing.window_tokens(HYBRID.groups[1], 40) == 40
    assert sizing.window_tokens(HYBRID.groups[0], 10_000) == 10_000
    chunk_bytes = HYBRID.groups[1].chunk_bytes
    assert sizing.live_bytes(HYBRID, 10_000) - sizing.live_bytes(PLAIN, 10_000) == 2 * chunk_bytes


def test_reserve_stops_one_chunk_past_the_device():
    group = PLAIN.groups[0]
    assert sizing.paged_reserve_chunks(group, 96 * 1000, 4, 10 * group.chunk_bytes + 5) == 11
    assert sizing.paged_reserve_chunks(group, 96, 4, 10 * group.chunk_bytes) == 4
