"""A run's folder: whole lines only, resumed by content, never shared, never overwritten."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.columns import COLUMNS, is_text
from harness.folder import FolderError, Outcome, RunFolder, find_or_create, write_atomic
from tests.harness.command import rows
from tests.harness.run_fixture import cell
from tests.harness.somebody_else import somebody_else

HASH = "0123456789abcdef"


def outcome(*cells):
    events = [
        {"trial_id": c["trial_id"], "seconds": 0.1, "phase": "pool", "allocation": "kv_pool"}
        for c in cells
    ]
    samples = [{"trial_id": c["trial_id"], "what": "decode", "ms": [1.0]} for c in cells]
    own = [{k: v for k, v in c.items() if k != "run_id"} for c in cells]
    return Outcome(own, events, samples)


def begun(results, config_hash=HASH, **manifest):
    folder, resumed = find_or_create(results, "sweep", config_hash)
    assert not resumed
    folder.write_json(
        "manifest.json", {"config_hash": config_hash, "finished_utc": None, **manifest}
    )
    return folder


ONE, TWO = cell("static", 1_000_000, 1.0), cell("paged", 1_000_000, 0.1)


def test_rows_come_back_as_they_were(tmp_path):
    folder = begun(tmp_path)
    folder.add(outcome(ONE, TWO))
    folder.close()
    again, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert resumed and again.path == folder.path
    assert again.rows == [{**r, "run_id": folder.run_id} for r in (ONE, TWO)]
    assert rows(again.path) == again.rows


@settings(max_examples=30)
@given(
    error=st.text(max_size=40),
    number=st.none() | st.integers(0, 1 << 60) | st.floats(allow_nan=False),
)
def test_any_text_and_number_survive(tmp_path_factory, error, number):
    results = tmp_path_factory.mktemp("any")
    folder = begun(results)
    row = ONE | {"error": error, "gate_error": number, "status": "ok"}
    folder.add(outcome(row, TWO))
    folder.close()
    again, _ = find_or_create(results, "sweep", HASH)
    assert len(again.rows) == 2
    assert again.rows[0]["gate_error"] == number
    shown = "".join(c if c.isprintable() else " " for c in error)
    assert again.rows[0]["error"] == (shown or None)
    again.close()


@pytest.mark.parametrize("name", ["trials.csv", "timeline.csv", "samples.jsonl"])
@pytest.mark.parametrize("part", [0.02, 0.3, 0.7, 0.98])
def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path, name, part):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    before = (folder.path / name).read_bytes()
    folder.add(outcome(TWO))
    after = (folder.path / name).read_bytes()
    folder.close()
    (folder.path / name).write_bytes(after[: len(before) + int(part * (len(after) - len(before)))])
    again, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert resumed
    kept = {r["trial_id"] for r in again.rows}
    assert kept == (
        {ONE["trial_id"]} if name == "trials.csv" else {ONE["trial_id"], TWO["trial_id"]}
    )
    for other in ("timeline.csv", "samples.jsonl"):
        lines = (again.path / other).read_text().splitlines()
        assert all(any(i in line for i in kept) for line in lines[other.endswith(".csv") :])
    again.add(outcome(TWO) if name == "trials.csv" else outcome())
    assert len(rows(again.path)) == 2


def test_events_without_a_row_are_dropped(tmp_path):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    lost = outcome(TWO)
    folder._append([], [{"run_id": folder.run_id, "rank": 0, **lost.timeline[0]}], lost)
    assert TWO["trial_id"] in (folder.path / "timeline.csv").read_text()
    folder.close()
    again, _ = find_or_create(tmp_path, "sweep", HASH)
    for name in ("timeline.csv", "samples.jsonl"):
        text = (again.path / name).read_text()
        assert TWO["trial_id"] not in text and ONE["trial_id"] in text


def test_a_finished_run_and_another_configuration_are_not_touched(tmp_path):
    finished = begun(tmp_path, finished_utc="2026-11-24T00:00:00+00:00")
    finished.add(outcome(ONE))
    finished.close()
    other = begun(tmp_path, config_hash="f" * 16)
    assert other.path != finished.path
    other.close()
    before = {p.name: p.read_bytes() for p in finished.path.iterdir()}
    third, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and third.path not in (finished.path, other.path)
    assert {p.name: p.read_bytes() for p in finished.path.iterdir()} == before


def test_a_folder_that_is_being_written_is_not_shared(tmp_path):
    first = begun(tmp_path)
    second, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and second.path != first.path
    first.close()
    third, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert resumed and third.path == first.path


def test_a_run_that_ends_while_we_look_at_it_is_not_resumed(tmp_path, monkeypatch):
    folder = begun(tmp_path)
    folder.close()
    opened = RunFolder.__init__

    def ends_first(self, path):
        write_atomic(path / "manifest.json", json.dumps({"config_hash": HASH, "finished_utc": "x"}))
        opened(self, path)

    monkeypatch.setattr(RunFolder, "__init__", ends_first)
    other, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and other.path != folder.path


def test_tables_of_another_version_are_left_alone(tmp_path):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    folder.close()
    table = folder.path / "trials.csv"
    table.write_text(table.read_text().replace("run_id,", "run_id,old_column,", 1))
    before = table.read_bytes()
    other, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and other.path != folder.path
    assert table.read_bytes() == before


ODD_MANIFESTS = [
    *("", "{", "[]", "null", "\0\0", '{"config_hash": 3}'),
    *("[" * 200_000, '{"config_hash": ' + "9" * 10_000 + "}"),
]


@pytest.mark.parametrize("content", ODD_MANIFESTS, ids=lambda content: content[:20])
def test_a_folder_with_an_odd_manifest_is_passed_over(tmp_path, content):
    odd = tmp_path / "sweep" / "odd"
    odd.mkdir(parents=True)
    (odd / "manifest.json").write_text(content)
    (tmp_path / "sweep" / "a file").write_text("x")
    folder, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and folder.path.parent == tmp_path / "sweep"
    assert (odd / "manifest.json").read_text() == content


def _pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def _link(path):
    """To a file of somebody else, with the same content."""
    target = path.parent.parent / "precious"
    target.write_text(path.read_text() if path.exists() else "mine")
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def _folder(path):
    path.unlink(missing_ok=True)
    path.mkdir()


HARMS = {
    "pipe": _pipe,
    "link": _link,
    "folder": _folder,
}


@pytest.mark.parametrize("harm", ["pipe", "link", "folder"])
@pytest.mark.parametrize("name", ["manifest.json", "trials.csv", "samples.jsonl", ".lock"])
def test_a_folder_that_is_not_plain_is_neither_waited_for_nor_written_through(tmp_path, name, harm):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    folder.close()
    HARMS[harm](folder.path / name)
    precious = folder.path.parent / "precious"
    before = precious.read_bytes() if precious.exists() else None
    other, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and other.path != folder.path
    assert (precious.read_bytes() if precious.exists() else None) == before


def test_a_link_to_a_run_is_not_resumed(tmp_path):
    folder = begun(tmp_path / "elsewhere")
    folder.close()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "run").symlink_to(folder.path)
    other, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert not resumed and not other.path.is_symlink()


@pytest.mark.parametrize("name", ["trials.csv", "timeline.csv"])
@pytest.mark.parametrize("junk", ["\0\0\0\n", "a,b\n", "x,", '"' + "a" * 200_000 + "\n"])
def test_a_damaged_line_costs_no_other_and_no_traceback(tmp_path, name, junk):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    folder.close()
    table = folder.path / name
    fields = table.read_text().split("\n")[0].count(",") + 1
    with open(table, "a") as out:
        out.write(junk if junk != "x," else ",".join("x" * fields) + "\n")
    again, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert resumed is (len(junk) < 1000)  # beyond what a reader of CSV takes: no table of ours
    assert [r["trial_id"] for r in again.rows] == ([ONE["trial_id"]] if resumed else [])


def test_what_a_kill_left_half_written_is_gone(tmp_path):
    folder = begun(tmp_path)
    folder.add(outcome(ONE))
    folder.close()
    for name in (".manifest.json.4711", ".trials.csv.new"):
        (folder.path / name).write_text("half")
    (folder.path / ".trial").mkdir()
    again, resumed = find_or_create(tmp_path, "sweep", HASH)
    assert resumed
    assert sorted(p.name for p in again.path.glob(".*")) == [".lock"]


def test_the_output_of_a_trial_that_died_is_kept(tmp_path):
    folder = begun(tmp_path)
    died = outcome(ONE | {"status": "crash"}, TWO)
    died.log = "Traceback\nof the trial\n"
    folder.add(died)
    assert [p.name for p in (folder.path / "logs").iterdir()] == [f"{ONE['trial_id']}.txt"]
    assert (folder.path / "logs" / f"{ONE['trial_id']}.txt").read_text() == died.log


def test_a_row_that_is_not_ok_carries_no_speed_and_no_unknown_column(tmp_path):
    folder = begun(tmp_path)
    speed = {"attention_decode_step_ms": 1.0, "decode_samples": 3, "status": "invalid"}
    (row,) = folder.add(outcome(ONE | speed))
    assert row["attention_decode_step_ms"] is None and row["decode_samples"] is None
    with pytest.raises(KeyError, match="unhelpful"):
        folder.add(outcome(ONE | {"unhelpful": 1}))


def test_a_file_in_the_way_is_said_in_one_line(tmp_path):
    (tmp_path / "runs").write_text("x")
    with pytest.raises(FolderError, match="cannot be written") as refused:
        find_or_create(tmp_path / "runs", "sweep", HASH)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_folder_that_is_not_ours_is_said_in_one_line():
    with tempfile.TemporaryDirectory() as name:
        with (
            somebody_else(),
            pytest.raises(FolderError, match="cannot be written") as refused,
        ):
            find_or_create(Path(name) / "runs", "sweep", HASH)
        assert "Permission denied" in str(refused.value)


def test_replacing_a_file_leaves_the_old_one_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="space"):
        write_atomic(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["summary.json"]


def test_every_column_has_a_kind():
    assert len(set(COLUMNS)) == len(COLUMNS)
    assert all(isinstance(is_text(c), bool) for c in COLUMNS)
