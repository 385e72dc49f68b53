"""Verdicts on the rows of earlier runs, without a trial."""

from __future__ import annotations

from harness.check import check_run
from harness.cli import main
from harness.plots import figures_of
from harness.report import write_report
from harness.runs import load_run
from tests.harness.command import read_json, rows, table


def test_rows_of_earlier_runs_are_judged_again(ten_million, timed, tmp_path, capsys):
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
    # Ledger events, timings and their figures stay where they are: in the runs' own folders.
    assert table(folder / "timeline.csv") == [] and (folder / "samples.jsonl").read_text() == ""
    drawn = {"verdicts.png", "verdicts.svg"}
    assert {p.name for p in (folder / "figures").iterdir()} == drawn

    told = {c["id"]: c for c in read_json(folder / "summary.json")["claims"]}
    first = {c["id"]: c for c in read_json(ten_million.folder / "summary.json")["claims"]}
    for claim in ("C2", "C3", "C5", "C14", "C16"):
        assert told[claim]["verdict"] == first[claim]["verdict"] != "undecided"
        assert told[claim]["measured"] == first[claim]["measured"]
        assert set(told[claim]["trials"]) >= set(first[claim]["trials"])
    assert told["C9"]["verdict"] == "undecided"
    assert "C20" in out  # an experiment on claims shows what arithmetic decides, too
    assert "C20" not in ten_million.out

    report = (folder / "report.md").read_text()
    assert "their ledger events, timings and figures lie in their own folders" in report
    for source in (ten_million.folder, timed.folder):
        assert f"Rows of sweep {source.name}: {len(rows(source))} of the scale model." in report
    carried = report.split("## Trials behind the verdicts")[1].split("##")[0]
    assert all(t in carried for t in told["C2"]["trials"])
    judged = load_run(folder)
    assert judged.of_earlier_runs and not load_run(timed.folder).of_earlier_runs
    assert list(figures_of(judged)) == ["verdicts"]
    found = check_run(judged)
    assert (found["samples"].outcome, found["samples"].reason) == ("n.a.", "rows of earlier runs")
    assert found["schema"].outcome == "pass", found["schema"].reason
    assert write_report([judged])
    assert {p.name for p in (folder / "figures").iterdir()} == drawn


def test_folders_that_are_no_runs(ten_million, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for folder in ("nowhere", "empty"):
        listed = f"claims.from=[{ten_million.folder},{tmp_path / folder}]"
        assert main(["experiment=claims", listed, f"results={tmp_path / 'runs'}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"claims.from={tmp_path / folder}" in line
        assert not (tmp_path / "runs").exists()
