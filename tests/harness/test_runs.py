"""Reading a run's folder: what is there arrives whole, what is hostile is refused in one line."""

from __future__ import annotations

import json
import math
import os

import pandas as pd
import pytest

from harness.columns import COLUMNS
from harness.runs import RunError, clean, find_folder, frame, load_run, trials, write_file
from tests.harness.run_fixture import cell, sweep, write_run


def edit(path, old, new, count=1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def test_rows_arrive_with_their_kinds(tmp_path):
    rows = sweep()
    run = load_run(write_run(tmp_path / "run", rows))
    assert len(run.rows) == len(rows) and list(run.rows)[: len(COLUMNS)] == list(COLUMNS)
    for got, given in zip(run.rows.to_dict("records"), rows, strict=True):
        for name in ("strategy", "status", "oom_phase", "trial_id"):
            assert got[name] == (given[name] or "")
        for name in ("context_tokens", "peak_device_bytes", "oom_requested_bytes"):
            assert got[name] == given[name] or (given[name] is None and math.isnan(got[name]))
    assert run.notes == ()
    assert run.run_id == run.manifest["run_id"]


def test_frame_takes_dicts_and_is_idempotent():
    rows = frame(sweep())
    pd.testing.assert_frame_equal(frame(rows), rows)


def test_a_line_cut_off_by_a_kill_is_left_out_and_noted(tmp_path):
    folder = write_run(tmp_path / "run")
    whole = len(load_run(folder).rows)
    text = (folder / "trials.csv").read_text()
    (folder / "trials.csv").write_text(text[:-40])
    run = load_run(folder)
    assert len(run.rows) == whole - 1
    assert any("cut off" in note for note in run.notes)


def test_missing_files_and_columns_are_noted(tmp_path):
    folder = write_run(tmp_path / "run")
    edit(folder / "trials.csv", "wall_seconds", "wall_hours")
    (folder / "timeline.csv").unlink()
    (folder / "manifest.json").unlink()
    notes = " ".join(load_run(folder).notes)
    assert "wall_seconds" in notes and "wall_hours" in notes
    assert "timeline.csv is absent" in notes and "manifest.json is absent" in notes


def test_samples_are_read_and_a_cut_line_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "samples.jsonl").unlink()
    assert load_run(folder).samples() == []
    (folder / "samples.jsonl").write_text('{"trial_id": "a", "ms": [1.0]}\n{"trial_id": "b", "m')
    assert load_run(folder).samples() == [{"trial_id": "a", "ms": [1.0]}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("trials.csv", b"", "no column strategy"),
        ("trials.csv", b"a,b\n1,2\n", "no column strategy"),
        ("trials.csv", b"strategy,context_tokens,status\n", "no rows"),
        ("trials.csv", b"strategy,strategy,context_tokens,status\n", "appears twice"),
        ("trials.csv", b"strategy,context_tokens,status\na,1,ok,9,9\n", "not a table"),
        ("trials.csv", b"strategy,context_tokens,status\na,ten,ok\n", "'ten' is no number"),
        ("trials.csv", b"strategy,context_tokens,status\na,inf,ok\n", "'inf' is no number"),
        ("trials.csv", b"strategy,context_tokens,status\na\0,1,ok\n", "NUL"),
        ("trials.csv", b"strategy,context_tokens,status\n\xff,1,ok\n", "not UTF-8"),
        ("summary.json", b"[]", "not a JSON object"),
        ("summary.json", b"{", "not JSON"),
        ("summary.json", b"[" * 200_000, "nested too deeply"),
        ("summary.json", b'{"schema": 99}', "schema 99"),
        ("summary.json", b'{"strategies": [1]}', "strategies"),
        ("summary.json", b'{"claims": {"a": 1}}', "claims"),
        ("manifest.json", b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
    ],
)
def test_hostile_files_are_refused_in_one_line(tmp_path, name, content, said):
    folder = write_run(tmp_path / "run")
    (folder / name).write_bytes(content)
    with pytest.raises(RunError) as error:
        load_run(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    folder = write_run(tmp_path / "run")
    secret = tmp_path / "secret.json"
    secret.write_text(json.dumps({"secret": 1}))
    (folder / "summary.json").unlink()
    (folder / "summary.json").symlink_to(secret)
    with pytest.raises(RunError, match="link"):
        load_run(folder)


def test_a_pipe_is_refused_without_waiting(tmp_path):
    folder = write_run(tmp_path / "run")
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(RunError, match="not a plain file"):
        load_run(folder)


def test_a_missing_folder_names_what_is_allowed(tmp_path):
    with pytest.raises(RunError, match="no such folder; allowed"):
        load_run(tmp_path / "none")


def test_a_relative_folder_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("harness").name == "harness"


def test_control_characters_never_arrive(tmp_path):
    rows = [cell("static", 1000, 1.0, strategy_options='{"x": "\x1b[31m"}', model="\x1b[2Jm")]
    run = load_run(write_run(tmp_path / "run", rows))
    assert "\x1b" not in "".join(map(str, run.rows.iloc[0]))
    assert clean("a\nb\x07") == "a b"


def test_ranks_of_a_trial_become_one_row_with_the_worst_end_and_slowest_speed():
    good = cell("paged", 1000, 1.0)
    slow = {**good, "rank": 1, "attention_decode_step_ms": good["attention_decode_step_ms"] * 2}
    big = {**good, "rank": 2, "peak_device_bytes": good["peak_device_bytes"] + 1}
    row = trials(frame([good, slow, big])).iloc[0]
    assert row["attention_decode_step_ms"] == slow["attention_decode_step_ms"]
    assert row["peak_device_bytes"] == big["peak_device_bytes"]
    bad = {**good, "rank": 3, "status": "oom"}
    merged = trials(frame([good, bad]))
    assert list(merged["status"]) == ["oom"]


def test_rows_that_one_trial_writes_in_turn_are_all_kept():
    first = cell("paged", 1000, 1.0)
    assert len(trials(frame([first, first]))) == 2


def test_writing_is_whole_or_not_at_all_and_follows_no_link(tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    link = tmp_path / "report.md"
    link.symlink_to(target)
    write_file(link, "report")
    assert target.read_text() == "mine" and link.read_text() == "report"
    (tmp_path / "figures").symlink_to(tmp_path)
    with pytest.raises(RunError, match="link"):
        write_file(tmp_path / "figures" / "a.png", b"")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["figures", "precious", "report.md"]
