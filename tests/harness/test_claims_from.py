"""Verdicts on the rows of earlier runs, without a trial."""

from __future__ import annotations

from harness.cli import main
from tests.harness.command import read_json, rows, table


def test_rows_of_earlier_runs_are_judged_again(ten_million, timed, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.outcome.draw", lambda *drawn: [])  # figures are not its matter
    before = {p: p.read_bytes() for p in ten_million.folder.rglob("*") if p.is_file()}
    listed = f"claims.from=[{ten_million.folder},{timed.folder},{ten_million.folder}]"
    code = main(["experiment=claims", listed, f"results={tmp_path / 'runs'}"])
    out, err = capsys.readouterr()
    assert code == 0, err
    (folder,) = (p.parent for p in tmp_path.glob("runs/*/*/manifest.json"))
    assert folder.parent.name == "claims" and "no trial is run" in out
    assert {p: p.read_bytes() for p in ten_million.folder.rglob("*") if p.is_file()} == before

    own = rows(folder)
    assert own == rows(ten_million.folder) + rows(timed.folder)  # each once, with its run's name
    events = {e["trial_id"] for e in table(folder / "timeline.csv")}
    assert events == {r["trial_id"] for r in own}
    samples = (folder / "samples.jsonl").read_text().splitlines()
    assert len(samples) == len((timed.folder / "samples.jsonl").read_text().splitlines())

    told = {c["id"]: c for c in read_json(folder / "summary.json")["claims"]}
    first = {c["id"]: c for c in read_json(ten_million.folder / "summary.json")["claims"]}
    for claim in ("C2", "C3", "C5", "C14", "C16"):
        assert told[claim]["verdict"] == first[claim]["verdict"] != "undecided"
        assert told[claim]["measured"] == first[claim]["measured"]
        assert set(told[claim]["trials"]) >= set(first[claim]["trials"])
    assert told["C9"]["verdict"] == "undecided"
    assert "C20" in out  # an experiment on claims shows what arithmetic decides, too
    assert "C20" not in ten_million.out


def test_folders_that_are_no_runs(ten_million, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        listed = f"claims.from=[{ten_million.folder},{tmp_path / folder}]"
        assert main(["experiment=claims", listed, f"results={tmp_path / 'runs'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"claims.from={tmp_path / folder}" in line
        assert not (tmp_path / "runs").exists()
