"""Checks: a sound folder passes, and each fault fails its own check and no other."""

from __future__ import annotations

import json

import pytest

from harness import report
from harness.check import check_run, main
from harness.columns import ordered
from harness.runs import load_run
from tests.harness import run_fixture
from tests.harness.run_fixture import MANIFEST, bracket, cell, of_rows, sweep


def write_run(folder, rows=None, summary=None, **manifest):
    """A folder whose summary is that of its rows, as a run leaves it."""
    rows = sweep() + bracket() if rows is None else rows
    return run_fixture.write_run(folder, rows, summary or of_rows(rows), **manifest)


def first_ok(rows):
    return next(r for r in rows if r["status"] == "ok" and r["attention_decode_step_ms"])


def unexplained(rows, manifest):
    first_ok(rows)["unexplained_bytes"] = 1 << 40


def no_reconciliation(rows, manifest):
    first_ok(rows)["unexplained_bytes"] = None


def first_oom(rows):
    return next(r for r in rows if r["status"] == "oom")


def unexplained_where_memory_ended(rows, manifest):
    first_oom(rows)["unexplained_bytes"] = 10 << 30


def no_reconciliation_where_memory_ended(rows, manifest):
    first_oom(rows)["unexplained_bytes"] = None


def ledger_above_the_meter(rows, manifest):
    row = first_oom(rows)
    row["peak_ledger_bytes"] = row["peak_device_bytes"] + (10 << 30)


def more_free_than_there_is(rows, manifest):
    row = first_oom(rows)
    row["oom_free_bytes"] = row["capacity_bytes"] + (10 << 30)


def unrepeatable(rows, manifest):
    row = first_ok(rows)
    row["attention_decode_step_ms"] *= 1.05
    row["attention_decode_tokens_per_second"] /= 1.05


def unrepeatable_memory(rows, manifest):
    row = first_ok(rows)
    row["peak_device_bytes"] = row["predicted_peak_bytes"] = row["peak_device_bytes"] + (1 << 30)


def bracket_once(rows, manifest):
    del rows[-1]


def resident_once(rows, manifest):
    rows.remove(next(r for r in rows if r["purpose"] == "resident"))


def never_filled(rows, manifest):
    rows[:] = [r for r in rows if r["purpose"] != "resident"]


def held_less_the_second_time(rows, manifest):
    last = [r for r in rows if r["purpose"] == "resident"][-1]
    last["resident_tokens"] -= 6_000


def filled_where_it_does_not_start_each_time(rows, manifest):
    """It was filled twice at the upper end, of which another trial says that it does not start."""
    for row in list(rows):
        if row["purpose"] == "resident":
            row |= {"context_tokens": 5_802_816, "resident_tokens": 5_802_816}
        elif row["purpose"] == "bracket" and row["status"] == "oom":
            rows.append(row | {"context_tokens": 5_802_817, "trial_id": f"{row['trial_id']}b"})


def wide_bracket(rows, manifest):
    for row in rows[-4:]:
        if row["context_tokens"] == 5_802_816:
            row["context_tokens"] = 5_900_000


def bracket_both_ways(rows, manifest):
    """An end that was ok in one trial and not in its repeat."""
    ends = [r for r in rows if r["purpose"] == "bracket"]
    ok, oom = (next(r for r in ends if r["status"] == s) for s in ("ok", "oom"))
    again = {"context_tokens": ok["context_tokens"], "trial_id": "z" * 12, "repeat": 9}
    rows.append(ordered(oom | again))


def dirty(rows, manifest):
    manifest["git"] = {"commit": "c" * 40, "dirty": True}


def speed_in_a_failed_row(rows, manifest):
    next(r for r in rows if r["status"] == "oom")["attention_decode_step_ms"] = 1.0


def ungated(rows, manifest):
    first_ok(rows)["gate_error"] = None


def gate_beyond_its_limit(rows, manifest):
    first_ok(rows)["gate_error"] = 0.9


def lse_beyond_its_limit(rows, manifest):
    first_ok(rows)["gate_lse_error"] = -0.9


def merged_gate_beyond_its_limit(rows, manifest):
    first_ok(rows)["merged_gate_error"] = 0.9


def another_configuration(rows, manifest):
    manifest["config_hash"] = "fedcba9876543210"


def renamed(rows, manifest):
    manifest["run_id"] = "the best of three"
    for row in rows:
        row["run_id"] = manifest["run_id"]


def resumed_on_another_gpu(rows, manifest):
    manifest["attempts"] = [*manifest["attempts"], {"pid": 2, "gpu_uuids": ["GPU-1"]}]


def attempt_without_a_gpu(rows, manifest):
    manifest["attempts"] = [*manifest["attempts"], {"pid": 2}]


def row_of_another_gpu(rows, manifest):
    rows[-1]["gpu_uuid"] = "GPU-1"


def row_without_a_gpu(rows, manifest):
    rows[-1]["gpu_uuid"] = None


def unplanned(rows, manifest):
    first_ok(rows)["predicted_peak_bytes"] *= 1.02


def another_end(rows, manifest):
    first_ok(rows)["predicted_status"] = "oom"


def hot(rows, manifest):
    manifest["gpus_after"] = [{"throttle_reasons": "0x40"}]


def unfinished(rows, manifest):
    manifest["finished_utc"] = None


def crashed(rows, manifest):
    rows.append(ordered(rows[0] | {"status": "crash", "signal": "SIGSEGV", "trial_id": "z"}))


def unknown_status(rows, manifest):
    rows[-1]["status"] = "fine"


def twice_the_same_trial(rows, manifest):
    rows[1]["trial_id"] = rows[0]["trial_id"]


FAULTS = {
    unexplained: {"reconciliation"},
    no_reconciliation: {"reconciliation"},
    unexplained_where_memory_ended: {"reconciliation"},
    no_reconciliation_where_memory_ended: {"reconciliation"},
    ledger_above_the_meter: {"reconciliation", "events"},
    more_free_than_there_is: {"reconciliation"},
    unrepeatable: {"repeatability"},
    unrepeatable_memory: {"repeatability", "events"},
    bracket_once: {"brackets"},
    resident_once: {"brackets"},
    never_filled: {"brackets"},
    held_less_the_second_time: {"brackets"},
    filled_where_it_does_not_start_each_time: {"brackets"},
    wide_bracket: {"brackets"},
    bracket_both_ways: {"brackets"},
    dirty: {"tree"},
    speed_in_a_failed_row: {"speeds"},
    ungated: {"gate"},
    gate_beyond_its_limit: {"gate"},
    lse_beyond_its_limit: {"gate"},
    merged_gate_beyond_its_limit: {"gate"},
    another_configuration: {"identity"},
    renamed: {"identity"},
    resumed_on_another_gpu: {"one gpu"},
    attempt_without_a_gpu: {"one gpu"},
    row_of_another_gpu: {"one gpu"},
    row_without_a_gpu: {"one gpu"},
    unplanned: {"planner"},
    another_end: {"planner"},
    hot: {"throttling"},
    unfinished: {"finished"},
    crashed: {"statuses"},
    unknown_status: {"schema"},
    twice_the_same_trial: {"schema"},
}


def failures(folder):
    return {name for name, r in check_run(load_run(folder)).items() if r.outcome == "fail"}


def test_a_sound_folder_passes(tmp_path, capsys):
    folder = write_run(tmp_path / "run")
    assert main([str(folder)]) == 0
    assert "pass" in capsys.readouterr().out
    assert failures(folder) == set()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_fails_its_checks_and_no_other(tmp_path, fault):
    rows, manifest = sweep() + bracket(), dict(MANIFEST)
    fault(rows, manifest)
    folder = write_run(tmp_path / "run", rows, **manifest)
    assert failures(folder) == FAULTS[fault]


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
    unrepeatable_memory(rows, {})
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


@pytest.mark.parametrize("status", ["ok", "oom"])
@pytest.mark.parametrize("column", ["peak_device_bytes", "unexplained_bytes"])
def test_a_figure_that_no_event_of_the_ledger_has_fails(tmp_path, status, column):
    folder = write_run(tmp_path / "run")
    rows = sweep() + bracket()
    row = next(r for r in rows if r["status"] == status)
    row[column] += 1 << 20  # within every tolerance
    timeline = (folder / "timeline.csv").read_text()
    other = write_run(tmp_path / "other", rows)
    (other / "timeline.csv").write_text(timeline)
    assert failures(other) == {"events"}


def test_a_row_whose_events_are_gone_fails(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "timeline.csv"
    gone = (sweep() + bracket())[-1]["trial_id"]
    lines = path.read_text().splitlines()
    kept = [line for line in lines if f",{gone}," not in line]
    assert len(kept) < len(lines)
    path.write_text("\n".join(kept) + "\n")
    assert failures(folder) == {"events"}
    path.write_text(lines[0] + "\n")
    assert failures(folder) == {"events"}


def test_later_rows_of_a_process_hold_what_its_earlier_ones_did(tmp_path):
    """Static commits at start-up: the row of a further fill adds no event of its own."""
    rows = [cell("static", 1_000_000, fill) for fill in (0.1, 1.0)]
    folder = write_run(tmp_path / "run", rows, {})
    path = folder / "timeline.csv"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(x for x in lines if f",{rows[1]['trial_id']}," not in x) + "\n")
    assert check_run(load_run(folder))["events"].outcome == "pass"
    rows[1]["peak_device_bytes"] += 1
    other = write_run(tmp_path / "other", rows, {})
    (other / "timeline.csv").write_text(path.read_text())
    assert check_run(load_run(other))["events"].outcome == "fail"


def test_a_time_that_does_not_follow_from_its_samples_fails(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "samples.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[1:]) + "\n")
    assert failures(folder) == {"samples"}
    path.write_text("\n".join([lines[0].replace("[", "[999999, 999998, "), *lines[1:]]) + "\n")
    assert failures(folder) == {"samples"}
    prefill = next(n for n, line in enumerate(lines) if '"prefill"' in line)
    path.write_text("\n".join(lines[:prefill] + lines[prefill + 1 :]) + "\n")
    assert failures(folder) == {"samples"}
    path.unlink()
    assert failures(folder) == {"samples"}


def test_a_spread_that_its_samples_do_not_have_fails(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "samples.jsonl"
    first, *rest = map(json.loads, path.read_text().splitlines())
    assert first["what"] == "decode"
    first["ms"] = [sum(first["ms"]) / 10] * 10
    path.write_text("".join(json.dumps(s) + "\n" for s in (first, *rest)))
    assert failures(folder) == {"samples"}


PARALLEL = {
    "parallel_decode_step_ms": 3.0,
    "parallel_decode_step_ms_iqr": 0.5,
    "parallel_decode_samples": 10,
    "collective_ms": 1.0,
    "collective_ms_iqr": 0.25,
    "collective_samples": 10,
}


def of_two_ranks():
    """Rows of a timed sweep on two ranks; collectives last longer on the second."""
    rows = []
    for row in sweep(1):
        for rank in range(2):
            timed = PARALLEL | {"collective_ms": 1.0 + rank} if row["status"] == "ok" else {}
            rows.append(row | timed | {"rank": rank, "world_size": 2, "gpu_uuid": f"GPU-{rank}"})
    return rows


def test_times_with_collectives_are_held_to_the_samples_of_their_rank(tmp_path):
    folder = write_run(tmp_path / "run", of_two_ranks())
    found = check_run(load_run(folder))["samples"]
    count = sum(r["status"] == "ok" for r in of_two_ranks())
    assert found.outcome == "pass"
    assert f"{count} decode all ranks, {count} collectives" in found.reason
    path = folder / "samples.jsonl"
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(s | {"rank": 1 - s["rank"]}) + "\n" for s in raw))
    found = check_run(load_run(folder))["samples"]
    assert found.outcome == "fail" and "collectives times do not follow" in found.reason


@pytest.mark.parametrize("column", PARALLEL)
def test_a_figure_of_collectives_that_is_not_its_samples_fails(tmp_path, column):
    folder = write_run(tmp_path / "run", of_two_ranks())
    rows = [r | {column: r[column] * 2 if r[column] else None} for r in of_two_ranks()]
    samples = (folder / "samples.jsonl").read_text()
    other = write_run(tmp_path / "other", rows)
    (other / "samples.jsonl").write_text(samples)
    assert check_run(load_run(other))["samples"].outcome == "fail"


def test_a_folder_written_before_collectives_had_a_spread_is_sound(tmp_path):
    later = [c for c in PARALLEL if c not in ("parallel_decode_step_ms", "collective_ms")]
    rows = [r | dict.fromkeys(later) for r in of_two_ranks()]
    folder = write_run(tmp_path / "run", rows)
    path = folder / "trials.csv"
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    kept = [n for n, name in enumerate(header) if name not in later]
    assert len(kept) == len(header) - 4
    path.write_text("\n".join(",".join(line[n] for n in kept) for line in (header, *lines)) + "\n")
    results = check_run(load_run(folder))
    assert {results[name].outcome for name in ("schema", "samples")} == {"pass"}
