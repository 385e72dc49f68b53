"""Cutting a decode step into shares: nothing is lost, doubled, or out of balance."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import config
from kernels.decode_plan import DIRECT, EDGE_COST_BLOCKS, cut_work, plan_decode, records, units_of
from kernels.view import Geometry, View
from tests.kernels.cases import empty_view

LENGTH = st.one_of(st.integers(0, 300), st.integers(0, 200_000))


def view_of(geometry, lengths, starts=()):
    """A view with no memory behind it."""
    nothing = torch.empty(0)
    return View(nothing, nothing, nothing, tuple(lengths), geometry, nothing, nothing, starts)


@st.composite
def batches(draw):
    geometry = Geometry(1, draw(st.integers(1, 4)), 16 * 12, 64)
    geometry = dataclasses.replace(geometry, q_heads=geometry.kv_heads * draw(st.integers(1, 16)))
    lengths = draw(st.lists(LENGTH, min_size=1, max_size=12))
    starts = tuple(draw(st.integers(0, n)) for n in lengths)
    return view_of(geometry, lengths, starts)


@settings(max_examples=80, deadline=None)
@given(batches(), st.integers(1, 300), st.sampled_from([64, 128]))
def test_every_visible_block_is_in_one_segment(view, programs, block):
    chosen = dataclasses.replace(config.decode_config(view.geometry), block_tokens=block)
    units = units_of(view)
    cut = cut_work(units, programs, chosen)
    assert len(cut.shares) - 1 <= programs
    assert cut.shares[0] == 0 and cut.shares[-1] == len(cut.segments)
    assert all(a < b for a, b in pairwise(cut.shares))
    found = {}
    for row, head, lo, hi, first, end, slot in cut.segments:
        found.setdefault((row, head), []).append((lo, hi, slot))
        assert (first, end) == (view.starts[row], view.lengths_host[row])
    assert list(found) == [(u.row, u.head) for u in units]
    slots = []
    for unit in units:
        pieces = found[unit.row, unit.head]
        assert pieces[0][0] == unit.first // block
        assert pieces[-1][1] == -(-unit.end // block)
        assert all(a[1] == b[0] for a, b in pairwise(pieces))
        if len(pieces) == 1:
            assert pieces[0][2] == DIRECT
        else:
            assert all(hi > lo for lo, hi, _ in pieces)
            assert (unit.row, unit.head, pieces[0][2], len(pieces)) in cut.merges
            slots += [slot for _, _, slot in pieces]
    assert slots == list(range(cut.slots))


@settings(max_examples=60, deadline=None)
@given(batches(), st.integers(1, 132))
def test_shares_are_even_and_scratch_suffices(view, sm_count):
    chosen = config.decode_config(view.geometry)
    programs = sm_count * chosen.programs_per_sm
    cut = cut_work(units_of(view), programs, chosen)
    costs = []
    for lo, hi in pairwise(cut.shares):
        costs.append(sum(s[3] - s[2] + chosen.segment_cost_blocks for s in cut.segments[lo:hi]))
    edges = 2 * len(cut.segments) * EDGE_COST_BLOCKS
    assert max(costs) <= (sum(costs) + edges) / programs + 6
    assert cut.slots <= config.decode_partials(view.geometry, sm_count)


@settings(max_examples=40, deadline=None)
@given(batches(), st.integers(1, 300))
def test_records_lead_to_every_segment_once(view, programs):
    cut = cut_work(units_of(view), programs, config.decode_config(view.geometry))
    heads = view.geometry.kv_heads
    rows = records(cut, heads)
    found = []
    for program in range(len(cut.shares) - 1):
        count, rest = rows[program][6:]
        found += [rows[program], *(rows[rest + i] for i in range(count - 1))]
    assert len(rows) == len(cut.segments)
    assert [(r[0] // heads, r[0] % heads, *r[1:6]) for r in found] == cut.segments


def test_one_long_sequence_fills_the_device():
    geometry = Geometry(1, 1, 5, 128)
    chosen = config.decode_config(geometry)
    cut = cut_work(units_of(view_of(geometry, [10 << 20])), 264, chosen)
    blocks = [s[3] - s[2] for s in cut.segments]
    assert len(blocks) >= 262
    assert max(blocks) <= 81920 / 264 + 2


def test_scratch_is_cut_from_the_callers_bytes():
    geometry = Geometry(1, 1, 5, 128)
    view = empty_view(geometry, [4000])
    scratch = torch.empty(config.decode_scratch_bytes(geometry, 1, 4), dtype=torch.uint8)
    plan = plan_decode(view, 4, scratch)
    assert plan.partial_out.data_ptr() == scratch.data_ptr()
    assert plan.partial_lse.data_ptr() == scratch.data_ptr() + plan.partial_out.nbytes
    with pytest.raises(ValueError, match="scratch=100 bytes"):
        plan_decode(view, 4, scratch[:100])


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        (Geometry(1, 1, 1, 96), "head_dim=96"),
        (Geometry(1, 1, 1, 128, page_tokens=48), "page_tokens=48"),
        (Geometry(1, 1, 33, 128), "q_heads=33"),
    ],
)
def test_shapes_without_a_kernel_are_refused(geometry, message):
    with pytest.raises(ValueError, match=message):
        config.decode_config(geometry)


def test_lengths_beyond_int32_are_refused():
    with pytest.raises(ValueError, match=r"lengths_host\[1\]=2147483648"):
        units_of(view_of(Geometry(1, 1, 1, 128), [5, 1 << 31]))
