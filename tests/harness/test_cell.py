"""A cell's identity: its content and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harness.cell import Cell, cell_from_json
from harness.settings import from_json, to_json
from tests.harness.composed import made


@pytest.fixture(scope="module")
def settings():
    return made("context=1M")


CHANGES = [
    "context=2M",
    "fault.kind=hang",
    "hardware.capacity=80GiB",
    "model.head_dim=64",
    "model=llama4_scout",
    "seed=1",
    "strategy.growth=ahead",
    "strategy=eager_pages",
    "sweep.one_process=true",
    "trial.chunk_target=8MiB",
    "trial.max_samples=3",
    "trial.page_tokens=64",
    "trial.table_order=shuffled",
    "trial.timeout_seconds=5",
    "workload.sequences=2",
]


def test_any_change_of_what_is_measured_is_another_cell(settings):
    ids = {Cell(settings, settings.context_tokens).trial_id}
    for word in CHANGES:
        other = made("context=1M", word)
        ids.add(Cell(other, other.context_tokens).trial_id)
    assert len(ids) == len(CHANGES) + 1
    base = Cell(settings, 1_000_000)
    for change in (
        {"fill": 0.5},
        {"purpose": "bracket"},
        {"timing": False},
        {"histories": True},
        {"repeat": 1},
        {"context_tokens": 999_999},
    ):
        ids.add(replace(base, **change).trial_id)
    assert len(ids) == len(CHANGES) + 7


@pytest.mark.parametrize(
    "words",
    [
        ["results=elsewhere"],
        ["sweep.points=[0.5,1.0]"],
        ["fill=1"],
        ["experiment.name=other"],
        ["sweep.brackets=false"],
        ["sweep.repeats=3"],
    ],
)
def test_what_is_around_a_cell_is_no_part_of_it(settings, words):
    other = made("context=1M", *words)
    assert Cell(other, 1_000_000).trial_id == Cell(settings, 1_000_000).trial_id


def test_what_a_gpu_has_free_is_no_part_of_it(settings):
    gpu = replace(settings.hardware, kind="cuda", uuid="GPU-0")
    busier = replace(gpu, free_bytes=gpu.free_bytes - 4096, capacity_bytes=gpu.free_bytes - 4096)
    smaller = replace(gpu, capacity_bytes=gpu.free_bytes // 2)
    ids = [Cell(replace(settings, hardware=h), 1_000_000).trial_id for h in (gpu, busier, smaller)]
    assert ids[0] == ids[1] != ids[2]


def test_strategies_share_the_pair_of_a_question(settings):
    paged = Cell(settings, 1_000_000)
    others = [
        Cell(made("context=1M", word), 1_000_000)
        for word in ("strategy=static", "strategy=eager_pages", "strategy.growth=ahead")
    ]
    assert {c.pair_id for c in others} == {paged.pair_id}
    assert len({c.trial_id for c in [paged, *others]}) == 4
    assert replace(paged, fill=0.1).pair_id != paged.pair_id
    assert replace(paged, repeat=1).pair_id != paged.pair_id


def test_cells_and_settings_survive_json(settings):
    cell = Cell(settings, 999_999, fill=0.3, repeat=2, histories=True)
    again = cell_from_json(json.loads(json.dumps(cell.to_json())))
    assert again == cell and again.trial_id == cell.trial_id
    assert from_json(json.loads(json.dumps(to_json(settings)))) == settings
    lists = made("context=1M", "fill=[0,0.5]", "claims.from=[a,b]", "results=x")
    assert from_json(json.loads(json.dumps(to_json(lists)))) == lists


def test_tokens_of_a_share(settings):
    assert Cell(settings, 1_000_000, fill=0.1).target_tokens == 100_000
    assert Cell(settings, 3, fill=0.5).target_tokens == 1
    split = made("context=1M", "parallel=context")
    shares = [
        replace(Cell(split, 1_000_000), context_index=i).target_tokens
        for i in range(split.parallel.context_ranks)
    ]
    assert sum(shares) == 1_000_000
    assert max(shares) - min(shares) <= 128
