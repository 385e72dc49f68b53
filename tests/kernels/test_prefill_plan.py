"""The work cut: everything visible once, fair shares, scratch within its bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import prefill_plan as pp
from kernels import prefill_scratch as ps
from kernels.prefill import plan_prefill, prefill
from kernels.prefill_config import HOPPER, all_prefill_configs, choose
from kernels.view import Geometry
from tests.kernels.cases import empty_view, random_q

geometries = st.builds(
    lambda kv, group, page: Geometry(1, kv, kv * group, 128, page_tokens=page),
    st.integers(1, 4),
    st.integers(1, 16),
    st.sampled_from((16, 128)),
)


@st.composite
def chunks(draw):
    """(start, tokens, window, geometry, rows, tile tokens, programs)."""
    start = draw(st.one_of(st.integers(0, 600), st.integers(0, 40_000), st.just(10_000_000)))
    tokens = draw(st.integers(1, 700))
    window = draw(st.one_of(st.just(0), st.integers(max(0, start - 3000), start)))
    rows, tile_tokens = draw(
        st.sampled_from(((192, 128), (64, 128), (64, 64), (128, 64), (64, 32)))
    )
    programs = draw(st.integers(1, 264))
    return start, tokens, window, draw(geometries), rows, tile_tokens, programs


@settings(max_examples=80, deadline=None)
@given(chunks())
def test_every_visible_tile_is_read_once(chunk):
    start, tokens, window, geometry, rows, tile_tokens, programs = chunk
    cut = pp.cut(start, tokens, window, geometry, rows, tile_tokens, programs)
    seen: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row, head, lo, hi, *_ in cut.segments.tolist():
        seen.setdefault((head, row), []).append((lo, hi))
    want_rows = range(0, tokens * geometry.group, rows)
    assert set(seen) == {(h, r) for h in range(geometry.kv_heads) for r in want_rows}
    for (_, row), runs in seen.items():
        runs.sort()
        last = min((row + rows - 1) // geometry.group, tokens - 1)
        edges = [window // tile_tokens, (start + last) // tile_tokens + 1]
        assert runs[0][0] == edges[0] and runs[-1][1] == edges[1]
        assert all(lo < hi for lo, hi in runs)
        assert all(a[1] == b[0] for a, b in itertools.pairwise(runs))


@settings(max_examples=60, deadline=None)
@given(chunks())
def test_clear_tiles_need_no_mask_and_masked_ones_do(chunk):
    start, tokens, window, geometry, rows, tile_tokens, programs = chunk
    cut = pp.cut(start, tokens, window, geometry, rows, tile_tokens, programs)
    for row, _, lo, hi, clear_lo, clear_hi, _, turn in cut.segments.tolist():
        assert lo <= clear_lo <= clear_hi <= hi
        assert 0 <= turn < max(1, clear_hi - clear_lo)
        first_limit = start + row // geometry.group
        for tile in (clear_lo, clear_hi - 1) if clear_lo < clear_hi else ():
            assert window <= tile * tile_tokens
            assert (tile + 1) * tile_tokens - 1 <= first_limit
        if clear_lo < clear_hi < hi:
            assert (clear_hi + 1) * tile_tokens - 1 > first_limit
        if window % tile_tokens == 0:
            assert clear_lo == lo  # the Hopper kernel knows no mask at the front


@settings(max_examples=60, deadline=None)
@given(chunks())
def test_pieces_and_merges_match(chunk):
    start, tokens, window, geometry, rows, tile_tokens, programs = chunk
    cut = pp.cut(start, tokens, window, geometry, rows, tile_tokens, programs)
    assert cut.shares[0] == 0 and cut.shares[-1] == len(cut.segments)
    assert len(cut.shares) == programs + 1 and (np.diff(cut.shares) >= 0).all()
    pieces: dict[tuple[int, int], list[int]] = {}
    for row, head, *_, slot, _ in sorted(cut.segments.tolist(), key=lambda s: s[pp.LO]):
        pieces.setdefault((row, head), []).append(slot)
    merges = {(row, head): (slot, n) for row, head, slot, n in cut.merges.tolist()}
    for where, slots in pieces.items():
        if len(slots) == 1:
            assert slots == [-1] and where not in merges
        else:
            first, count = merges.pop(where)
            assert slots == list(range(first, first + count))
    assert not merges
    used = sorted(s for slots in pieces.values() for s in slots if s >= 0)
    assert used == list(range(cut.slots))


@pytest.mark.parametrize("tokens, heads", [(8192, 8), (8192, 5), (2048, 8), (2048, 5), (16, 8)])
@pytest.mark.parametrize("total", [1 << 17, 1 << 20, 10_000_000])
def test_shares_are_fair(tokens, heads, total):
    geometry = Geometry(1, 1, heads, 128)
    cut = pp.cut(total - tokens, tokens, 0, geometry, 192, 128, 132)
    cost = cut.segments[:, pp.HI] - cut.segments[:, pp.LO] + pp.OVERHEAD_TILES
    shares = [cost[a:b].sum() for a, b in zip(cut.shares[:-1], cut.shares[1:], strict=True)]
    assert max(shares) <= 1.02 * np.mean(shares) + 1


@pytest.mark.parametrize("tokens, heads", [(8192, 8), (2048, 8), (2048, 5), (512, 8)])
@pytest.mark.parametrize("total", [1 << 20, 4_000_000])
def test_programs_read_the_same_tiles_at_the_same_time(tokens, heads, total):
    """Of a long history an L2 cache of 32 MB sends few tiles to memory twice."""
    geometry = Geometry(1, 1, heads, 128)
    cut = pp.cut(total - tokens, tokens, 0, geometry, 192, 128, 132)
    step = 32  # tiles: one MiB
    reads = []
    for lo, hi in itertools.pairwise(cut.shares):
        at = 0
        for *_, clear_lo, clear_hi, _, turn in cut.segments[lo:hi].tolist():
            order = np.roll(np.arange(clear_lo, clear_hi), -turn)
            reads += [(at + i, int(tile) // step) for i, tile in enumerate(order[::step])]
            at += len(order) / step
    held: dict[int, None] = {}
    fetched = 0
    for _, tile in sorted(reads):
        fetched += tile not in held
        held.pop(tile, None)
        held[tile] = None
        if len(held) > 32:
            held.pop(next(iter(held)))
    assert fetched <= 6 * total / 128 / step


@settings(max_examples=60, deadline=None)
@given(chunks())
def test_scratch_stays_within_its_bound(chunk):
    start, tokens, window, geometry, *_, programs = chunk
    sm_count = (programs + 1) // 2
    bound = ps.prefill_scratch_bytes(geometry, tokens, sm_count)
    for config in {choose(geometry, window, hopper) for hopper in (False, True)}:
        per_sm = sm_count * config.programs_per_sm
        shape = (config.rows, config.block_tokens)
        cut = pp.cut(start, tokens, window, geometry, *shape, per_sm)
        counts = (len(cut.segments), per_sm, len(cut.merges), cut.slots)
        assert sum(ps.scratch_sizes(*counts, config.rows, geometry.head_dim).values()) <= bound


def test_chooser():
    fp8 = Geometry(1, 1, 8, 128)
    assert choose(fp8, 0, hopper=True).variant.startswith("gluon_3wg")
    assert choose(fp8, 0, hopper=False).variant == "triton_64x128_tma"
    assert choose(fp8, 100, hopper=True).variant.startswith("triton")
    assert choose(Geometry(1, 1, 8, 256), 0, hopper=True).variant.startswith("triton")
    assert choose(Geometry(1, 1, 8, 128, "bf16"), 0, hopper=True).variant.startswith("triton")
    small = Geometry(1, 1, 8, 128, page_tokens=32)
    assert choose(small, 0, hopper=True).variant.endswith("pointer")
    assert choose(fp8, 0, hopper=True, variant="triton").variant == "triton_64x128_tma"
    assert {c.rows for _, c in all_prefill_configs()} <= {64, 128, 192}
    assert max(c.rows for _, c in all_prefill_configs()) == ps.ROWS_MAX
    assert max(c.programs_per_sm for _, c in all_prefill_configs()) == ps.PROGRAMS_PER_SM_MAX


def test_bad_calls_are_refused():
    geometry = Geometry(2, 1, 4, 128)
    view = empty_view(geometry, [300])
    for change, message in (
        ({"row": 1}, "row=1"),
        ({"start": 290, "tokens": 11}, "start=290, tokens=11"),
        ({"tokens": 0}, "tokens=0"),
        ({"variant": "gluon"}, "variant=gluon: allowed are gluon_3wg"),
        ({"scratch": torch.empty(100, dtype=torch.uint8)}, "scratch=100"),
    ):
        with pytest.raises(ValueError, match=message):
            plan_prefill(view, **{"row": 0, "start": 0, "tokens": 300} | change)
    in_page = empty_view(geometry, [300], starts=(70,))
    with pytest.raises(ValueError, match="token 70"):
        plan_prefill(in_page, 0, 200, 100, variant=HOPPER.variant)
    with pytest.raises(ValueError, match="starts"):
        plan_prefill(in_page, 0, 10, 100)
    plan = plan_prefill(view, 0, 200, 100)
    q = random_q(geometry, 100)
    with pytest.raises(ValueError, match="q="):
        prefill(view, 0, q[:50].contiguous(), plan)
    with pytest.raises(ValueError, match="fp8_e4m3 K/V takes"):
        prefill(view, 0, q.to(torch.bfloat16), plan)
    with pytest.raises(ValueError, match="layer=2"):
        prefill(view, 2, q, plan)
    with pytest.raises(ValueError, match="another arena"):
        prefill(empty_view(geometry, [300]), 0, q, plan)


def test_reach_of_the_box():
    from kernels.prefill_hopper import MAX_TILES, TILE_BYTES, check_reach

    check_reach(MAX_TILES * TILE_BYTES)
    with pytest.raises(ValueError, match="4398046527488"):
        check_reach(MAX_TILES * TILE_BYTES + TILE_BYTES)
