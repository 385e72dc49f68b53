"""Comparisons: planted differences are found, equal things stay equal, pairs are right."""

from __future__ import annotations

import csv
import math

import numpy as np
import pytest

from harness.compare import compare, main
from harness.pairing import MEMORY, interval, pair, ratios, student_t, verdict
from harness.plots_compare import figure_compare
from harness.runs import frame, load_run
from tests.harness.run_fixture import cell, sweep, write_run

M = 1_000_000
DECODE = "attention_decode_tokens_per_second"


def rows_with(factor, repeats=5, **given):
    """Rows whose decode rate is ``factor`` times the fixture's, with a little noise."""
    noise = np.random.default_rng(7).normal(1, 0.001, 1000)
    out = []
    for n, row in enumerate(sweep(repeats, **given)):
        if row[DECODE]:
            row = row | {DECODE: row[DECODE] * factor * noise[n]}
        out.append(row)
    return out


def decode(found, cell_name="all cells"):
    return next(r for r in found if r.metric == DECODE and r.cell == cell_name)


@pytest.mark.parametrize(
    ("factor", "said"),
    [(1.05, "B higher"), (0.95, "B lower"), (1.0, "same within 2 %"), (1.01, "same within 2 %")],
)
def test_a_planted_difference_is_found(factor, said):
    found = ratios(pair(frame(rows_with(1.0)), frame(rows_with(factor))))
    total = decode(found)
    assert total.verdict == said
    assert total.low <= total.ratio <= total.high
    assert total.ratio == pytest.approx(factor, rel=0.005)


def test_strategies_of_one_run_pair_by_question_and_repeat():
    rows = frame(sweep(3))
    pairs = pair(rows[rows["strategy"] == "static"], rows[rows["strategy"] == "paged"])
    assert (pairs.both["pair_id_a"] == pairs.both["pair_id_b"]).all()
    assert (pairs.both["context_tokens_a"] == pairs.both["context_tokens_b"]).all()
    assert len(pairs.both) == 15 and pairs.only_a == pairs.only_b == 0
    assert pairs.changed["strategy"] == ("static", "paged")


def test_two_commits_pair_each_strategy_with_itself():
    pairs = pair(frame(sweep(2)), frame(sweep(2)))
    assert (pairs.both["strategy_a"] == pairs.both["strategy_b"]).all()
    assert len(pairs.both) == 20 and "strategy" not in pairs.changed


def test_without_shared_pair_ids_the_configuration_pairs():
    other = [r | {"pair_id": f"other {r['pair_id']}", "hardware": "h100"} for r in sweep(2)]
    pairs = pair(frame(sweep(2)), frame(other))
    assert len(pairs.both) == 20
    assert pairs.changed["hardware"] == ("h200", "h100")
    assert (pairs.both["fill_a"] == pairs.both["fill_b"]).all()


def test_what_ran_keeps_no_trials_apart_though_some_ended_before_it_was_known():
    def ran(kernel):
        rows = [r | {"pair_id": f"{kernel} {r['pair_id']}"} for r in sweep(2)]
        return [r | {"kernel_variant": kernel if r["status"] == "ok" else None} for r in rows]

    first, second = ran("tma"), ran("host")
    second[2] |= {"status": "crash", "kernel_variant": None}
    pairs = pair(frame(first), frame(second))
    assert len(pairs.both) == 20 and pairs.apart == {}
    assert pairs.changed["kernel_variant"] == ("tma, (empty)", "host, (empty)")
    assert (pairs.both["status_a"] != pairs.both["status_b"]).sum() == 1
    same = pair(frame(first), frame(ran("tma")))
    assert len(same.both) == 20 and "kernel_variant" not in same.changed


def test_a_key_that_keeps_trials_apart_is_named(tmp_path, capsys, monkeypatch):
    small = [r | {"page_tokens": 16, "pair_id": ""} for r in sweep(2)]
    far = cell("static", 7, 1.0, pair_id="", page_tokens=128)
    pairs = pair(frame(sweep(2, pair_id="")), frame([*small, far]))
    assert pairs.both.empty and pairs.apart == {"page_tokens": 20}
    assert pair(frame(sweep(2)), frame(sweep(2))).apart == {}
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "A", sweep(2, pair_id=""))
    write_run(tmp_path / "B", [*small, far], run_id="second")
    assert main(["A", "B"]) == 2
    said = capsys.readouterr().err
    assert "share no cell" in said and "page_tokens (20)" in said and said.count("\n") == 1
    write_run(tmp_path / "C", [*sweep(2, pair_id="")[:10], *small[10:]], run_id="third")
    assert main(["A", "C"]) == 0
    assert (
        "trials of A differ from the nearest of B in page_tokens (10)." in capsys.readouterr().out
    )


def test_a_brackets_trials_pair_whatever_fill_an_old_row_says():
    old = [cell("static", c, 1.0, purpose="bracket", pair_id=f"old {c}") for c in (5 * M, 6 * M)]
    new = [r | {"fill": 0.0, "pair_id": ""} for r in old]
    pairs = pair(frame(old), frame(new))
    assert (len(pairs.both), pairs.only_a, pairs.only_b) == (2, 0, 0) and pairs.changed == {}


def test_trials_without_a_partner_are_counted():
    some = [r for r in sweep(2) if r["context_tokens"] < 5_000_000]
    pairs = pair(frame(sweep(2)), frame(some))
    assert (len(pairs.both), pairs.only_a, pairs.only_b) == (8, 12, 0)


def test_rows_that_are_not_ok_never_enter_a_ratio():
    bad = [r | {"status": "invalid", "error": "gate"} for r in rows_with(9.0)]
    assert ratios(pair(frame(rows_with(1.0)), frame(bad))) == []


def test_few_pairs_decide_no_speed_but_memory():
    found = ratios(pair(frame(rows_with(1.0, repeats=1)), frame(rows_with(2.0, repeats=1))))
    speeds = {r.verdict for r in found if r.metric == DECODE and r.cell != "all cells"}
    assert speeds == {"undecided: 1 pair, 3 needed"}
    peak = [r.verdict for r in found if r.metric == "peak_device_bytes"]
    assert set(peak) == {"same within 2 %"}


def test_memory_of_different_scales_is_compared_as_the_modelled_devices():
    found = ratios(pair(frame(sweep(1)), frame(sweep(1, scale=192))))
    peaks = [r.ratio for r in found if r.metric == "peak_device_bytes"]
    assert len(peaks) > 3 and peaks == pytest.approx([1] * len(peaks), abs=0.01)
    pooled = {r.metric for r in found if r.cell == "all cells"}
    assert DECODE in pooled and not pooled & set(MEMORY)


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (1.021, 1.03, "B higher"),
        (0.9, 0.979, "B lower"),
        (0.981, 1.02, "same within 2 %"),
        (1.0, 1.05, "undecided: the interval crosses 2 %"),
    ],
)
def test_the_gate(low, high, said):
    assert verdict(low, high, 5) == said


@pytest.mark.parametrize(
    ("freedom", "t"),
    [
        (1, 12.7062),
        (2, 4.3027),
        (3, 3.1824),
        (5, 2.5706),
        (9, 2.2622),
        (30, 2.0423),
        (5000, 1.9604),
    ],
)
def test_students_t_is_the_tables(freedom, t):
    assert student_t(freedom) == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("pairs", [2, 3, 5, 12])
def test_the_interval_covers_the_truth_in_95_percent(pairs):
    """An interval that is too narrow turns noise into a finding."""
    drawn = np.random.default_rng(pairs).normal(0.01, 0.02, (4000, pairs))
    ends = np.array([interval(logs) for logs in drawn])
    covered = ((ends[:, 0] <= 0.01) & (ends[:, 1] >= 0.01)).mean()
    assert covered == pytest.approx(0.95, abs=0.012)


def test_one_pair_has_no_interval_and_equal_pairs_none_to_speak_of():
    assert interval(np.log([1.1])) == pytest.approx((math.log(1.1),) * 2)
    assert interval(np.log([1.1] * 3)) == pytest.approx((math.log(1.1),) * 2)


def test_a_trial_that_only_fills_is_no_repeat_of_a_timed_one():
    timed = [cell("paged", 1_000_000, 1.0, repeat=n, kernel_variant="tma") for n in range(2)]
    fills = [
        cell("paged", 1_000_000, 1.0, repeat=n, purpose="resident", fill_seconds=0.1)
        for n in range(2)
    ]
    timed = [r | {"fill_seconds": 3.0} for r in timed]
    found = ratios(pair(frame(timed + fills), frame(timed + fills)))
    seen = {(r.metric, r.cell): r.pairs for r in found}
    assert seen["fill_seconds", "1M"] == seen["fill_seconds", "1M, resident trial"] == 2
    assert not any("variant" in cell_name for _, cell_name in seen)


def everything(folder):
    """Every file below a folder, by its path, with its bytes."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_command_writes_table_figure_and_csv(tmp_path, capsys, monkeypatch):
    first = write_run(tmp_path / "a", rows_with(1.0, repeats=3))
    second = write_run(
        tmp_path / "b",
        rows_with(1.1, repeats=3),
        run_id="second",
        git={"commit": "d" * 40, "dirty": True},
    )
    (second / "config.yaml").write_text("model:\n  name: report\nseed: 1\n")
    before = [everything(folder) for folder in (first, second)]
    monkeypatch.chdir(tmp_path)
    assert main([str(first), str(second)]) == 0
    said = capsys.readouterr().out
    assert "B higher" in said and "d" * 40 in said and "config.yaml seed" in said
    assert "diff_sha" not in said and "None" not in said
    assert [everything(folder) for folder in (first, second)] == before
    out = tmp_path / "results" / "runs" / "compare"
    assert sorted(p.suffix for p in out.iterdir()) == [".csv", ".png", ".svg"]
    assert main([str(first), str(second), "--out", "elsewhere/deep"]) == 0
    assert everything(tmp_path / "elsewhere" / "deep") == everything(out)
    with open(next(out.glob("*.csv")), newline="") as file:
        lines = list(csv.DictReader(file))
    total = next(x for x in lines if x["metric"] == DECODE and x["cell"] == "all cells")
    assert math.isclose(float(total["ratio"]), 1.1, rel_tol=0.01)
    assert len(total["trials_a"].split()) == int(total["pairs"])


def test_two_strategies_of_one_run(tmp_path):
    run = load_run(write_run(tmp_path / "a", sweep(3)))
    text, found, names = compare([run], ["static", "paged"])
    assert names == ("static", "paged")
    assert "oom in pool/kv_pool" in text
    assert decode(found).verdict == "same within 2 %"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["A"], "two runs, or one and --strategies"),
        (["A", "A"], "the same run twice"),
        (["A", "A", "A"], "3 runs given"),
        (["A", "--strategies", "static", "pagd"], "allowed: paged, static"),
        (["A", "--strategies", "static", "static"], "two different ones"),
        (["A", "A", "--strategies", "static", "static"], "two different ones"),
        (["A", "B", "--out", "A/trials.csv"], "cannot be written"),
        (["nowhere", "A"], "no such folder"),
        (["A", "C"], "share no cell"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "A", run_id="first")
    write_run(tmp_path / "B", run_id="second")
    write_run(tmp_path / "C", [cell("paged", 77, 1.0, model="other")])
    before = everything(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert everything(tmp_path) == before


def test_the_same_strategy_of_two_runs_is_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "AB":
        write_run(tmp_path / name, run_id=name)
    assert main(["A", "B", "--strategies", "static", "static"]) == 0


def test_without_a_cell_that_both_measured_there_is_no_comparison(tmp_path, capsys, monkeypatch):
    failed = {"strategy": "sglang", "status": "oom"}
    engine = [r | failed for r in sweep(2) if r["strategy"] == "static"]
    write_run(tmp_path / "A", sweep(2) + [r | {"trial_id": f"s{n}"} for n, r in enumerate(engine)])
    monkeypatch.chdir(tmp_path)
    before = everything(tmp_path)
    assert main(["A", "--strategies", "sglang", "static"]) == 1
    said = capsys.readouterr()
    assert "no cell is ok in both" in said.err and said.err.count("\n") == 1
    assert "Cells that ended differently" in said.out
    assert everything(tmp_path) == before


def test_every_ratio_is_in_the_figure():
    found = ratios(pair(frame(rows_with(1.0)), frame(rows_with(1.05))))
    figure = figure_compare(found, "a", "b")
    drawn = sum(len(axes.get_yticks()) for axes in figure.axes)
    assert drawn == len(found)


def test_configurations_are_compared_key_by_key_without_being_parsed(tmp_path):
    first, second = (write_run(tmp_path / n, sweep(1), run_id=n) for n in "ab")
    text = (
        "arms:\n- strategy: static\n  options:\n    fraction: {}\n- strategy: paged\n  seed: {}\n"
    )
    (first / "config.yaml").write_text(text.format(1.0, 0))
    (second / "config.yaml").write_text(text.format(0.5, 0) + "bomb: &a [*a, *a]\n")
    said, _, _ = compare([load_run(first), load_run(second)])
    assert "config.yaml arms.[0].options.fraction  1.0" in said
    assert "config.yaml bomb" in said and "arms.[1]" not in said
