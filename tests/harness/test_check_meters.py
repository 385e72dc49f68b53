"""What a row states is what its ledger's events and its raw samples say."""

from __future__ import annotations

import json

import pytest

from harness.check import check_run
from harness.runs import load_run
from tests.harness.checked import failures, write_run
from tests.harness.run_fixture import bracket, cell, sweep


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
