"""The plan beside the measurement: what a row says of it, and where brackets are opened."""

from __future__ import annotations

import pytest

from harness import forecast
from harness.cell import Cell
from harness.lengths import targets
from harness.rows import identity
from harness.run import _chunk_tokens, interleaved, point_cells
from harness.sizes import BadValue
from tests.harness.composed import made


def as_planned(cell):
    """A row that measured exactly what the planner says."""
    plan = forecast.predict_cell(cell)
    row = identity(cell, {}) | {"status": plan.outcome}
    for item in plan.items:
        if item.location == "device" and not item.failed:
            key = f"{item.phase}_bytes"
            row[key] = row.get(key, 0) + item.nbytes
    row.pop("pool_bytes", None)
    row.pop("fill_bytes", None)
    row["kv_committed_bytes"] = plan.predicted_kv_bytes
    row["peak_device_bytes"] = plan.predicted_peak_bytes
    return row


@pytest.mark.parametrize("words", [["strategy=static"], ["strategy=paged"], ["strategy=vllm"]])
def test_a_row_as_planned_is_off_by_nothing(words):
    own = made(*words, "context=1M")
    row = forecast.with_prediction(as_planned(Cell(own, 1_000_000)), Cell(own, 1_000_000))
    assert row["predicted_off_by"] is None and row["predicted_status"] == row["status"]
    assert row["predicted_peak_bytes"] == row["peak_device_bytes"]


def test_the_item_that_is_off_is_named_with_its_bytes():
    cell = Cell(made("strategy=static", "context=1M"), 1_000_000)
    row = as_planned(cell)
    row["weights_bytes"] += 5_000_000
    row["kv_committed_bytes"] -= 3_000_000
    row["tables_bytes"] = row.get("tables_bytes", 0) + 100  # within 1 % of the peak
    named = forecast.with_prediction(row, cell)["predicted_off_by"]
    assert named == "weights +5000000; kv -3000000"
    other = forecast.with_prediction(as_planned(cell) | {"status": "oom"}, cell)
    assert other["predicted_off_by"] == "status ok"


def ended_as_planned(cell):
    """A row that ended at the allocation at which the planner says that it ends."""
    plan = forecast.predict_cell(cell)
    ended = {
        "oom_phase": plan.phase,
        "oom_allocation": plan.allocation,
        "oom_requested_bytes": plan.requested_bytes,
        "oom_free_bytes": plan.free_bytes,
        "resident_tokens": plan.resident_tokens,
    }
    return as_planned(cell) | ended


def test_of_a_start_that_is_refused_what_decides_is_named_or_else_its_peak():
    cell = Cell(made("strategy=vllm"), 10_000_000, fill=0.0)
    row = ended_as_planned(cell)
    assert (row["status"], row["oom_allocation"]) == ("refused", "kv_pool")
    little, asked = row["peak_device_bytes"] // 50, row["oom_requested_bytes"]
    assert little < 0.01 * asked  # more than 1 % of what is held, less than 1 % of what decides
    row["context_bytes"] -= little
    row["peak_device_bytes"] -= little
    row["oom_free_bytes"] += little
    assert forecast.with_prediction(row, cell)["predicted_off_by"] == f"peak -{little}"
    row["oom_free_bytes"] -= little + asked // 20
    row["oom_requested_bytes"] += asked // 25
    named = forecast.with_prediction(row, cell)["predicted_off_by"]
    assert named == f"kv_pool asked +{asked // 25}; kv_pool free -{asked // 20}"
    row["oom_allocation"] = "rope_cos_sin"
    named = forecast.with_prediction(row, cell)["predicted_off_by"]
    assert "status refused at kv_pool" in named and "not refused at rope_cos_sin" in named


def test_a_prediction_of_another_end_says_what_was_to_fail_and_what_differs():
    cell = Cell(made("strategy=static", "context=10M"), 10_000_000)
    plan = forecast.predict_cell(cell)
    ok = ended_as_planned(cell) | {"status": "ok", "oom_phase": None, "kv_committed_bytes": 1 << 30}
    ok["weights_bytes"] -= 50_000  # below 1 %: near an edge it is what decides
    named = forecast.with_prediction(ok, cell)["predicted_off_by"]
    asked, free = plan.requested_bytes, plan.free_bytes
    assert named == f"weights -50000; status oom at kv_pool, {asked} asked, {free} free"


def test_a_fill_that_ends_elsewhere_is_off_by_tokens():
    cell = Cell(made("strategy=paged", "context=10M"), 10_000_000, purpose="resident")
    row = ended_as_planned(cell)
    assert row["oom_phase"] == "fill"
    row["resident_tokens"] -= 100_000
    assert forecast.with_prediction(row, cell)["predicted_off_by"] == "resident_tokens -100000"


@pytest.mark.parametrize("status", ["crash", "timeout", "oom_host"])
def test_a_trial_that_died_is_held_against_nothing(status):
    cell = Cell(made("strategy=static", "context=1M"), 1_000_000)
    row = forecast.with_prediction(as_planned(cell) | {"status": status}, cell)
    assert row.get("predicted_off_by") is None and row["predicted_status"] == "ok"


def test_a_batch_is_foreseen_sequence_by_sequence():
    """Six sequences of mixed lengths: 946 pages, of which 22 fill a chunk."""
    words = ["workload=batch", "workload.sequences=6", "hardware.capacity=24GiB"]
    own = made("strategy=paged", "context=64Ki", *words)
    cell = Cell(own, 64 << 10)
    (group,) = own.kv_model().groups
    pages = sum(group.pages(tokens) for tokens in targets(cell))
    assert (pages, group.pages_per_chunk) == (946, 22)
    assert forecast.predict_cell(cell).predicted_kv_bytes == 43 * group.chunk_bytes


def test_cells_of_one_process_have_a_prediction_each():
    own = made("strategy=paged", "context=1M")
    kv = [
        forecast.with_prediction(as_planned(c), c)["predicted_kv_bytes"]
        for c in (Cell(own, 1_000_000, fill=f) for f in (0.0, 0.1, 1.0))
    ]
    assert kv[0] == 0 < kv[1] < kv[2]


def test_a_bracket_s_trial_opens_no_sequence():
    """Nothing is refused in it, and nothing committed ahead of growth."""
    own = made("strategy=static", "strategy.mem_fraction_of=device", "context=10M")
    plan = forecast.predict_cell(Cell(own, 10_000_000, purpose="bracket"))
    assert plan.outcome == "ok" and plan.started and not plan.admits_context
    assert forecast.predict_cell(Cell(own, 10_000_000, purpose="resident")).outcome == "refused"
    ahead = made("strategy=paged", "strategy.growth=ahead", "context=1M")
    assert forecast.predict_cell(Cell(ahead, 1_000_000, purpose="bracket")).predicted_kv_bytes == 0
    assert forecast.predict_cell(Cell(ahead, 1_000_000, fill=0.0)).predicted_kv_bytes > 0


def test_brackets_open_where_the_planner_turns():
    for words in (["strategy=static"], ["strategy=paged", "workload.sequences=2"]):
        own = made(*words, "context=10M")
        start, admit = forecast.startup_guess(own), forecast.admit_guess(own)
        for guess, started in ((start, True), (admit, False)):
            at = forecast.predict_cell(Cell(own, guess, purpose="bracket"))
            assert at.started and (started or at.admits_context)
            if guess < 10_000_000:
                above = Cell(own, guess + _chunk_tokens(own), purpose="bracket")
                beyond = forecast.predict_cell(above)
                assert not (beyond.started if started else beyond.admits_context)


@pytest.mark.parametrize(
    ("words", "key", "allowed"),
    [
        (["strategy=vllm", "strategy.version=9"], "strategy.version", "0.23.0"),
        (["strategy=vllm", "strategy.max_num_seqs=0"], "strategy.max_num_seqs", "from 1"),
        (["strategy=sglang", "strategy.page_size=0"], "strategy.page_size", "from 1"),
    ],
)
def test_flags_are_checked_by_the_planner(words, key, allowed):
    own = made(*words)
    with pytest.raises(BadValue) as refused:
        forecast.check(own)
    assert refused.value.key == key and allowed in refused.value.allowed


def test_the_other_strategy_in_one_sentence():
    own = made("strategy=paged", "context=10M")
    said = forecast.sentence(own, "static")
    assert said.startswith("static does not start at 10M: kv_pool asks 228.94 GiB")
    assert "largest context that starts" in said
    small = made("strategy=static", "context=1M")
    assert forecast.sentence(small, "paged").startswith("paged starts at 1M and holds it whole")


def test_strategies_alternate_where_they_are_asked_the_same():
    own = [made(f"strategy={s}", "context=1M", "sweep.repeats=2") for s in ("static", "paged")]
    order = [(c.repeat, c.context_tokens, c.fill, c.settings.strategy) for (c,) in interleaved(own)]
    assert [s for *_, s in order] == ["static", "paged"] * (len(order) // 2)
    assert [o[:3] for o in order[::2]] == [o[:3] for o in order[1::2]]
    assert [o[0] for o in order] == sorted(o[0] for o in order)


def test_points_of_a_sweep():
    cells = [c for job in point_cells(made("strategy=static", "context=10M")) for c in job]
    assert [(c.context_tokens, c.fill) for c in cells] == [
        *((10_000_000 * p // 100, 1.0) for p in (1, 2, 5, 10, 20, 50)),
        (10_000_000, 0.1),
        (10_000_000, 1.0),
    ]
    assert [c.context_tokens for c in cells if c.histories] == [5_000_000]  # the largest that fits
    together = point_cells(made("strategy=paged", "fill=[0,1]", "sweep.one_process=true"))
    assert all(len(job) == 2 for job in together)
    assert not [c for job in together for c in job if c.fill == 0 and c.timing]
