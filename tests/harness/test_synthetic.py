"""Synthetic K/V: every token comes from one place of the bank, needles from none."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from harness.synthetic import Content, make_content
from harness.workspace import BANK_TOKENS
from tests.harness.composed import made


@pytest.fixture(scope="module")
def content():
    group = made("model.kv_dtype=bf16").kv_model().groups[0]
    return make_content(group, 7, None, on_host=True)


@given(
    sequence=st.integers(0, 3),
    layer=st.integers(0, 2),
    ends=st.tuples(st.integers(0, 5 * BANK_TOKENS), st.integers(0, 5 * BANK_TOKENS)),
)
def test_pieces_cover_every_token_once(content, sequence, layer, ends):
    lo, hi = sorted(ends)
    at = lo
    for start, a, b, *_ in content.pieces(sequence, layer, lo, hi):
        assert start == at and 0 <= a < b <= BANK_TOKENS
        at += b - a
    assert at == hi


@given(cut=st.lists(st.integers(0, 3 * BANK_TOKENS), min_size=1, max_size=6))
def test_a_token_is_the_same_however_it_is_reached(content, cut):
    def places(bounds):
        found = {}
        for lo, hi in pairwise(bounds):
            for start, a, b, *shifts in content.pieces(1, 0, lo, hi):
                found.update({start: (a, shifts), start + (b - a) - 1: (b - 1, shifts)})
        return found

    whole = list(content.pieces(1, 0, 0, 3 * BANK_TOKENS))
    for token, (row, shifts) in places(sorted({0, *cut, 3 * BANK_TOKENS})).items():
        piece = next(p for p in whole if p.start <= token < p.start + p.hi - p.lo)
        assert row == piece.lo + token - piece.start
        assert shifts == [piece.k_shift, piece.v_shift]


def test_blocks_layers_and_sequences_differ_in_rows_and_in_columns(content):
    def first(sequence, layer, block):
        return next(iter(content.pieces(sequence, layer, block * BANK_TOKENS, 10**9)))

    pieces = [first(s, la, b) for s in range(3) for la in range(3) for b in range(3)]
    assert len({p.lo for p in pieces}) > 20
    assert all(p.lo % content.group.geometry.page_tokens == 0 for p in pieces)
    assert len({(p.k_shift, p.v_shift) for p in pieces}) > 15
    rows = [torch.stack(content.stored(p)) for p in pieces]
    assert all(r.shape[2:] == (content.group.geometry.kv_heads, 64) for r in rows)


def test_the_bank_is_seeded_and_never_zero(content):
    group = content.group
    again = make_content(group, 7, None, on_host=True)
    other = make_content(group, 8, None, on_host=True)
    assert (again.k_bank == content.k_bank).all()
    assert (other.k_bank != content.k_bank).any()
    assert (content.k_bank.float().abs().amax(dim=1) > 0).all()
    assert abs(content.v_bank.float().mean()) < 0.01  # a mean would hide what is read wrongly


def test_a_needle_is_one_pattern_for_each_position(content):
    own = Content(content.group, 7, content.k_bank, content.v_bank)
    one, same, other = (own.add_needle(0, 0, p) for p in (5, 5, 6))
    assert (one.signs == same.signs).all() and (one.value == same.value).all()
    assert (one.signs != other.signs).any()
    assert set(one.signs.tolist()) == {-1.0, 1.0}
    assert list(own.needles[0, 0]) == [5, 6]
