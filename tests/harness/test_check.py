"""Checks: a sound folder passes, and what a folder lacks or was given falsely is named."""

from __future__ import annotations

import pytest

from harness import report
from harness.check import check_run, main
from harness.columns import ordered
from harness.runs import load_run
from tests.harness.checked import failures, first_ok, first_oom, write_run
from tests.harness.run_fixture import GPU_UUID, bracket, of_rows, sweep


def test_a_sound_folder_passes(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert "pass" in capsys.readouterr().out
    assert failures(folder) == set()


@pytest.mark.parametrize(
    "rate",
    [
        "attention_decode_tokens_per_second",
        "attention_decode_bytes_per_second",
        "attention_prefill_tokens_per_second",
    ],
)
def test_a_rate_that_does_not_follow_from_its_time_fails(tmp_path, rate):
    rows = sweep() + bracket()
    row = next(r for r in rows if r["status"] == "ok" and r["attention_decode_step_ms"])
    row["attention_decode_bytes_per_second"] = (
        row["kv_live_bytes"] * 1e3 / row["attention_decode_step_ms"]
    )
    assert failures(write_run(tmp_path / "sound", rows)) == set()
    row[rate] *= 1.001
    assert failures(write_run(tmp_path / "forged", rows)) == {"rates"}


@pytest.mark.parametrize("forged", ["startup", "peak_device_bytes", "arm", "verdict", "measured"])
def test_a_summary_that_does_not_follow_from_the_rows_fails(tmp_path, forged):
    rows = sweep() + bracket()
    summary = of_rows(rows)
    claim = next(c for c in summary["claims"] if c["trials"] and c["measured"] is not None)
    if forged == "startup":
        summary["strategies"]["paged"]["startup"]["ok"] = 100_000_000
    elif forged == "arm":
        summary["strategies"]["invented"] = summary["strategies"]["paged"]
    elif forged in claim:
        claim[forged] = "invented"
    else:
        summary["strategies"]["paged"][forged] = 1 << 30
    assert failures(write_run(tmp_path / "run", rows, summary)) == {"summary"}


@pytest.mark.parametrize("text", ["", "a: &a [*a]\n_target_: os.system\n", "arms: [{}]", "seed: 0"])
def test_a_configuration_that_is_none_fails(tmp_path, text):
    folder = write_run(tmp_path / "run")
    (folder / "config.yaml").write_text(text)
    assert failures(folder) == {"identity"}


def test_a_row_of_a_run_that_cannot_be_fails(tmp_path):
    rows = sweep() + bracket()
    rows[0]["run_id"] = "../../evil"
    assert "identity" in failures(write_run(tmp_path / "run", rows))


@pytest.mark.parametrize("beyond", [0, 1])
def test_reconciliation_ends_at_the_rows_own_tolerance(tmp_path, beyond):
    rows = sweep() + bracket()
    row = first_ok(rows)
    row["unexplained_bytes"] = row["tolerance_bytes"] + beyond
    assert failures(write_run(tmp_path / "run", rows)) == ({"reconciliation"} if beyond else set())


@pytest.mark.parametrize(
    ("reasons", "slowed"),
    [(0x1, False), (0x4, False), (0x8, True), (0x20, True), (0x40, True), (0x80, True)],
)
def test_slowdowns_of_a_gpu_are_its_drivers_and_no_idle_clock(tmp_path, reasons, slowed):
    gpus = [{"name": "NVIDIA H200", "uuid": GPU_UUID, "throttle_reasons": hex(reasons)}]
    assert failures(write_run(tmp_path / "run", gpus=gpus)) == ({"throttling"} if slowed else set())


def test_a_failed_check_is_named_and_ends_with_status_one(tmp_path, capsys):
    good = write_run(tmp_path / "good", sweep(1))
    bad = write_run(tmp_path / "bad", sweep(1), git={"commit": "c" * 40, "dirty": True})
    assert main([str(good), str(bad)]) == 1
    lines = [x.split()[:2] for x in capsys.readouterr().out.splitlines()]
    assert lines.count(["tree", "fail"]) == lines.count(["tree", "pass"]) == 1


@pytest.mark.parametrize("end", ["ok", "not_ok"])
def test_only_the_upper_end_may_end_both_ways(tmp_path, end):
    rows = sweep() + bracket()
    point = of_rows(rows)["strategies"]["static"]["startup"]
    at = [r for r in rows if r["purpose"] == "bracket" and r["context_tokens"] == point[end]]
    assert len(at) == 2 and at[0]["status"] == at[1]["status"]
    like = {r["context_tokens"]: r for r in rows if r["purpose"] == "bracket"}
    other = like[point["not_ok" if end == "ok" else "ok"]]
    before = of_rows(rows)
    at[1] |= {k: other[k] for k in ("status", "oom_phase", "admitted")}
    found = check_run(load_run(write_run(tmp_path / "run", rows, before)))["brackets"]
    if end == "ok":
        assert found.outcome == "fail" and "ended both ways" in found.reason
    else:
        assert found.outcome == "pass" and "was also granted once" in found.reason


def test_an_item_that_is_named_excuses_the_planner(tmp_path):
    rows = sweep() + bracket()
    row = first_ok(rows)
    row["predicted_peak_bytes"] *= 1.5
    row["predicted_off_by"] = "workspace"
    assert failures(write_run(tmp_path / "run", rows)) == set()


def test_a_strangers_folder_that_lacks_figures_is_judged_all_the_same(tmp_path):
    rows = sweep() + bracket()
    summary = of_rows(rows)
    summary["strategies"]["static"]["startup"]["not_ok"] = "none"
    for row in rows:
        row["context_tokens"] = None if row["purpose"] == "resident" else row["context_tokens"]
    folder = write_run(tmp_path / "run", rows, summary)
    (folder / "timeline.csv").write_text("trial_id,phase\nx,context\n")
    assert {"events", "schema", "summary"} <= failures(folder)


@pytest.mark.parametrize("status", ["oom", "refused", "crash"])
def test_what_was_held_where_a_trial_failed_as_foreseen_is_held_to_the_plan(tmp_path, status):
    rows = sweep() + bracket()
    row = first_oom(rows)
    row |= {"status": status, "predicted_status": status}
    row["predicted_peak_bytes"] = row["peak_device_bytes"] * 1.005
    folder = write_run(tmp_path / "near", rows)
    assert "1 of trials that failed as foreseen" in check_run(load_run(folder))["planner"].reason
    assert failures(folder) == set()
    row["predicted_peak_bytes"] = row["peak_device_bytes"] * 1.02
    assert failures(write_run(tmp_path / "far", rows)) == {"planner"}
    row["predicted_off_by"] = "peak -1"
    assert failures(write_run(tmp_path / "named", rows)) == set()


def test_the_scale_models_speeds_are_not_judged(tmp_path):
    rows = sweep(scale=192)
    first_ok(rows)["attention_decode_step_ms"] *= 3
    results = check_run(load_run(write_run(tmp_path / "run", rows, {})))
    assert results["repeatability"].outcome == "pass"
    assert "not judged" in results["repeatability"].reason
    assert results["one gpu"].outcome == "n.a."


@pytest.mark.parametrize("scale", [1, 192])
def test_without_a_timed_repeat_no_spread_is_told(tmp_path, scale):
    untimed = dict.fromkeys(("attention_decode_step_ms", "attention_prefill_chunk_ms"))
    rows = [*sweep(1, scale=scale), *(r | untimed for r in sweep(2, scale=scale)[10:])]
    folder = write_run(tmp_path / "run", rows, {})
    found = check_run(load_run(folder))["repeatability"]
    assert found.outcome == "n.a." and "no timed cell ran twice" in found.reason
    next(r for r in rows[10:] if r["status"] == "ok")["peak_device_bytes"] += (
        1 << 40
    )  # what else repeats is judged all the same
    found = check_run(load_run(write_run(tmp_path / "other", rows, {})))["repeatability"]
    assert found.outcome == "fail" and "peak memory" in found.reason


def test_rows_without_a_chunk_repeat_within_their_tolerance(tmp_path):
    rows = [r | {"chunk_bytes": None} for r in sweep() + bracket()]
    assert failures(write_run(tmp_path / "run", rows)) == set()
    row = first_ok(rows)
    row["peak_device_bytes"] = row["predicted_peak_bytes"] = row["peak_device_bytes"] + (1 << 30)
    assert failures(write_run(tmp_path / "other", rows)) == {"repeatability", "events"}


def test_ranks_have_a_gpu_each_and_jobs_of_a_cluster_too(tmp_path):
    ranks = [r | {"rank": n, "gpu_uuid": f"GPU-{n}"} for r in sweep(1) for n in range(2)]
    began = [{"gpu_uuids": ["GPU-0"]}]
    rules = {"attempts": began}
    assert one_gpu(tmp_path / "ranks", ranks, **rules).outcome == "pass"
    ranks[3] |= {"gpu_uuid": "GPU-2"}
    found = one_gpu(tmp_path / "moved", ranks, **rules)
    assert found.outcome == "fail" and "rank 1: 2 GPUs" in found.reason
    arms = [r | {"gpu_uuid": f"GPU-{r['strategy']}"} for r in sweep(1)]
    assert one_gpu(tmp_path / "one", arms).outcome == "fail"
    jobs = [{"hardware": {}}, {"hardware": {}}]
    assert one_gpu(tmp_path / "jobs", arms, jobs=jobs, attempts=[{}]).outcome == "pass"


def test_an_engine_and_its_emulation_have_one_gpu_and_the_next_pair_may_have_another(tmp_path):
    """Starts take a minute each: a run of them may be taken up on another machine."""
    emulated = [r for r in sweep(1) if r["strategy"] == "static"][:2]
    real = [r | {"engine_version": "0.1", "trial_id": f"e{n}"} for n, r in enumerate(emulated)]
    for n, own in enumerate(zip(emulated, real, strict=True)):
        for row in own:
            row.update(pair_id=f"pair{n}", gpu_uuid=f"GPU-{n}")
    began = {"attempts": [{"gpu_uuids": [f"GPU-{n}"]} for n in range(2)]}
    assert len(emulated) == 2
    found = one_gpu(tmp_path / "two", [*emulated, *real], **began)
    assert (found.outcome, found.reason) == ("pass", "2 attempts, GPU-0, GPU-1")
    real[0]["gpu_uuid"] = "GPU-1"
    assert one_gpu(tmp_path / "apart", [*emulated, *real], **began).outcome == "fail"


def test_rows_of_earlier_runs_are_their_own_folders_to_judge(tmp_path):
    rows = [r | {"run_id": "20261123-000000-fedcba", "gpu_uuid": "GPU-9"} for r in sweep(1)]
    found = one_gpu(tmp_path / "run", rows)
    assert (found.outcome, found.reason) == ("n.a.", "rows of earlier runs")


def test_a_trial_that_died_need_not_say_where(tmp_path):
    died = ordered(sweep(1)[0] | {"status": "crash", "trial_id": "z", "gpu_uuid": None})
    assert one_gpu(tmp_path / "run", [*sweep(1), died]).outcome == "pass"


def one_gpu(folder, rows, **manifest):
    return check_run(load_run(write_run(folder, rows, **manifest)))["one gpu"]


def test_a_folder_written_before_rows_named_their_gpu_lacks_nothing_else(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "trials.csv"
    lines = [line.rpartition(",")[0] for line in path.read_text().splitlines()]
    assert path.read_text().split("\n", 1)[0] == f"{lines[0]},gpu_uuid"
    path.write_text("\n".join(lines) + "\n")
    assert failures(folder) == {"one gpu"}


def test_a_missing_column_fails_the_schema(tmp_path):
    folder = write_run(tmp_path / "run")
    text = (folder / "trials.csv").read_text()
    (folder / "trials.csv").write_text(text.replace("kv_scales", "kv_other", 1))
    assert failures(folder) == {"schema"}


def test_what_cannot_be_judged_says_so(tmp_path):
    row = sweep(1)[0] | {"attention_decode_step_ms": None, "attention_prefill_chunk_ms": None}
    folder = write_run(tmp_path / "run", [row], {"strategies": {"static": {}}}, gpus=[], git={})
    results = check_run(load_run(folder))
    for name in ("throttling", "repeatability", "brackets", "tree", "gate"):
        assert results[name].outcome == "n.a.", name
        assert results[name].reason


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "trials.csv" in error and "manifest.json" in error and error.count("\n") == 1


@pytest.mark.parametrize("command", [main, report.main], ids=["check", "report"])
def test_a_folder_that_is_no_run_is_named_and_the_others_are_read(
    tmp_path, capsys, command, monkeypatch
):
    monkeypatch.setattr("harness.report.draw_run", lambda *drawn: [])  # figures are not its matter
    first, second = (write_run(tmp_path / n, sweep(1)) for n in ("first-run", "second-run"))
    (tmp_path / "kernels").mkdir()
    assert command([str(first), str(tmp_path / "kernels"), str(second)]) == 2
    said = capsys.readouterr()
    assert first.name in said.out
    assert said.err.count("\n") == 1 and "kernels" in said.err and "holds trials.csv" in said.err
    assert command([str(tmp_path / "kernels")]) == 2
