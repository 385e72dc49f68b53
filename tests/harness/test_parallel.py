"""Several gloo ranks give what one rank gives: heads split, pages dealt out, and their product."""

from __future__ import annotations

import pytest

LAYOUTS = ["2x1", "1x2", "4x1", "2x2", "1x4", "8x1", "2x4", "1x8"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_the_output_of_one_rank(layout, layouts):
    tensor, context = map(int, layout.split("x"))
    own = layouts[layout]
    assert len(own) == tensor * context
    for stored, values, *_ in own:
        assert stored < 4e-3, "bf16's rounding of the reduced output"
        assert values < 5e-2, "FP8's rounding of K and V"


def test_ranks_count_their_collectives_alike(layouts):
    for own in layouts.values():
        ((entered, left),) = {(entered, left) for _, _, entered, left, *_ in own}
        assert entered == left > 0


def test_a_timed_step_passes_with_its_exchange_and_not_without(layouts):
    for layout, own in layouts.items():
        assert [(whole, hollow) for *_, whole, hollow in own] == [(1, 0)] * len(own), layout


def test_the_layouts_are_those_that_ran(layouts):
    assert sorted(layouts) == sorted(LAYOUTS)
