"""From one rank to 64: measured where ranks exist, planned beyond; what pages gain over heads."""

from __future__ import annotations

import pytest

from harness.cell import Cell
from harness.claims import decide
from harness.claims_planned import context_parallelism
from harness.earlier import read_runs
from harness.evidence import Evidence
from harness.forecast import context_beyond_capacity
from harness.launch import Job, run_job
from harness.plots_scaling import figure_capacity_over_ranks
from harness.ranks_scaling import gains, scaling, scaling_table
from harness.ranks_summary import per_trial
from harness.runs import load_run
from harness.validate import compose_settings
from tests.harness.ranks_fixture import ROOT, ranks, rows_of


@pytest.fixture(scope="module")
def run(scaled):
    """The experiment's run, and what the command said."""
    assert scaled.code == 0, scaled.err
    return load_run(scaled.folder), scaled.out


def records(run) -> list[dict]:
    return [
        {k: None if v == "" or v != v else v for k, v in row.items()}
        for row in run.rows.to_dict("records")
    ]


def test_ranks_run_where_they_exist_and_are_planned_beyond(run):
    found = scaling(records(run[0]))
    assert {s.ranks for s in found} == {1, 2, 4, 8, 16, 32, 64}
    assert {s.basis for s in found if s.ranks <= 2} == {"scale_model"}
    assert {s.basis for s in found if s.ranks > 2} == {"planned"}
    rows = run[0].rows
    ran = rows[rows["basis"] != "planned"].groupby("trial_id")["rank"].count()
    assert set(ran) == {1, 2}
    assert rows[rows["basis"] == "planned"]["attention_decode_step_ms"].isna().all()


def test_two_ranks_hold_twice_what_one_does_less_weights(run):
    held = {(s.ranks, s.context_ranks): s.capacity_tokens for s in scaling(records(run[0]))}
    assert held[2, 1] == pytest.approx(2 * held[1, 1], rel=0.03)
    assert held[2, 2] == pytest.approx(held[2, 1], rel=0.03)


def test_the_gain_of_pages_is_how_often_heads_are_copied(run):
    ratios = {g.pages.ranks: g for g in gains(records(run[0]))}
    assert ratios[2].basis == "scale_model"
    assert ratios[2].ratio == pytest.approx(1, rel=0.03)
    for count, copies in ((4, 1), (8, 2), (16, 4), (32, 8)):
        assert ratios[count].basis == "planned"
        assert ratios[count].ratio == pytest.approx(copies, rel=0.05)


def test_the_run_ends_with_the_table_and_its_figure(run):
    run, said = run
    report = (run.folder / "report.md").read_text()
    assert "## Scaling" in report and "pages / heads" in report
    assert "pages x 16, heads x 4" in said
    assert (run.folder / "figures" / "capacity_over_ranks.svg").is_file()


def test_the_product_holds_as_much_as_pages_alone(run):
    held = {(s.ranks, s.context_ranks): s.capacity_tokens for s in scaling(records(run[0]))}
    assert held[64, 16] == pytest.approx(held[64, 64], rel=0.03)


def test_planned_marks_are_hollow(run):
    capacity = figure_capacity_over_ranks(run[0].rows).axes[0]
    faces = {
        float(line.get_xdata()[0]): line.get_markerfacecolor()
        for line in capacity.lines
        if len(line.get_xdata()) == 1
    }
    assert faces[16.0] == "white"
    assert faces[1.0] != "white"


def planned(model: str, kind: str, count: int) -> dict:
    words = ["hardware=scale_model", f"model={model}", f"parallel={kind}"]
    words += [f"parallel.ranks={count}", f"parallel.processes={count}", "parallel.plan_beyond=1"]
    settings = compose_settings(words)
    context = context_beyond_capacity(settings)
    cell = Cell(settings, context, purpose="resident", timing=False)
    (row,) = run_job(Job([cell]), None).rows
    return row


def test_c19_is_decided_by_ranks_that_ran():
    # What would have run, were there eight devices: the planner's rows, taken as measured.
    rows = [planned(m, k, 8) for m in ("report", "qwen3_30b_a3b") for k in ("tp", "context")]
    before = context_parallelism(Evidence(rows))
    assert before.basis == "planned"
    measured = context_parallelism(Evidence([r | {"basis": "measured"} for r in rows]))
    assert measured.basis == "planned"  # of the models beside: the rows' own comes before it
    assert measured.condition.endswith("; planned: llama4_scout 1.00x, qwen3_next_80b 4.00x")
    assert measured.verdict == "conditional"
    assert measured.measured == pytest.approx(2, rel=0.03)
    assert len(measured.rows) == 4


def test_c19_names_the_rows_of_the_committed_ranks():
    folder = str(ROOT / "results" / "reference" / "scale_model_scaling")
    rows = read_runs([folder], rows_only=True).rows
    (told,) = [c for c in decide(per_trial(rows)) if c["id"] == "C19"]
    assert told["basis"] == "scale model; planned"
    assert "qwen3_30b_a3b 2.00x on 8 ranks, report 1.00x on 8 ranks; planned: " in told["condition"]
    assert told["measured"] == 2.0
    behind = {r["trial_id"]: r for r in per_trial(rows)}
    assert {behind[t]["world_size"] for t in told["trials"]} == {8}
    assert len(told["trials"]) == 4


def test_one_number_of_ranks_makes_no_table():
    assert scaling_table([planned("report", "tp", 8)]).rows == ()


def test_times_are_told_with_their_spread():
    whole = planned("report", "tp", 8) | {"status": "ok", "purpose": "point"}
    times = {
        "attention_decode_step_ms": 2.0,
        "attention_decode_step_ms_iqr": 0.25,
        "collective_ms": 1.0,
        "collective_ms_iqr": 0.125,
        "parallel_decode_step_ms": 3.5,  # a row of before there was a spread
    }
    rows = [whole | times, planned("report", "context", 8)]
    (line,) = [s for s in scaling_table(rows).text().splitlines() if "(0.250)" in s]
    assert " ".join(line.split()).endswith(" 2.000 (0.250) 1.000 (0.125) 3.500")


def test_collectives_are_timed_and_merged_outputs_checked(tmp_path):
    cell = ranks(2, "parallel=context", "trial.max_samples=2", "context=4K", timing=True, fill=1.0)
    rows = rows_of(cell, tmp_path)
    assert [r["status"] for r in rows] == ["ok", "ok"]
    sizes = rows[0]["sequences"] * 4 * (64 + 1) * 4  # outputs and LSE of 4 query heads, float32
    for row in rows:
        assert row["merged_gate_error"] < 1e-3
        for what in ("collective", "parallel_decode_step"):
            assert row[f"{what}_ms"] > 0
            assert row[f"{what}_ms_iqr"] >= 0
        assert row["collective_samples"] == row["parallel_decode_samples"] == 3
        assert row["collective_bytes"] == sizes
        assert row["resident_tokens_all_ranks"] == 4000
    assert [r["resident_tokens"] for r in rows] == [2048, 1952]
