"""Several gloo ranks give what one rank gives: heads split, pages dealt out, and their product."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.harness.ranks_fixture import ROOT

LAYOUTS = ["2x1", "1x2", "4x1", "2x2", "1x4", "8x1", "2x4", "1x8"]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    """Of every layout (tensor x context ranks), each rank's error against both references."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.gloo_ranks", str(tmp_path_factory.mktemp("gloo"))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[float, float]]] = {}
    for line in done.stdout.splitlines():
        tensor, context, stored, values = line.split()
        found.setdefault(f"{tensor}x{context}", []).append((float(stored), float(values)))
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_rank_holds_the_output_of_one_rank(layout, errors):
    tensor, context = map(int, layout.split("x"))
    own = errors[layout]
    assert len(own) == tensor * context
    for stored, values in own:
        assert stored < 4e-3, "bf16's rounding of the reduced output"
        assert values < 5e-2, "FP8's rounding of K and V"


def test_the_layouts_are_those_that_ran(errors):
    assert sorted(errors) == sorted(LAYOUTS)
