"""Pages whose figures come from rows: what is committed is what the rows give."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from harness.engines.stand_in import stand_in
from harness.explain import main as explain
from harness.pages import MARKED, main, renewed
from harness.runs import RunError
from harness.validate import compose_settings
from tests.harness.ranks_fixture import ROOT

PAGES = [
    p for p in (ROOT / "README.md", ROOT / "results/README.md") if MARKED.search(p.read_text())
]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_committed_page_says_what_its_rows_say(page: Path):
    assert renewed(page) == page.read_text()


def test_the_readme_says_of_every_reference_run_what_the_checks_say():
    words = next(m["words"] for m in MARKED.finditer((ROOT / "README.md").read_text())
                 if m["words"].startswith("trust "))  # fmt: skip
    runs = {p.parent for p in (ROOT / "results/reference").glob("*/trials.csv")}
    assert {ROOT / folder for folder in words.split()[1:]} == runs


def test_a_section_follows_its_rows(tmp_path: Path):
    run = ROOT / "results/reference/h200_report"
    page = tmp_path / "page.md"
    page.write_text(f"a\n<!-- rows: trust {run} -->\nstale\n<!-- rows: end -->\nb\n")
    assert main([str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text and text.startswith("a\n") and text.endswith("-->\nb\n")
    assert "| h200\\_report |" in text
    assert renewed(page) == text


def test_engines_own_rows_stand_behind_a_slash_in_the_table_of_trust(tmp_path: Path):
    run = ROOT / "results/reference/h200_real_engines"
    page = tmp_path / "page.md"
    page.write_text(f"<!-- rows: trust {run} -->\n<!-- rows: end -->\n")
    line = next(x for x in renewed(page).splitlines() if "h200\\_real" in x).split(" | ")
    rows = pd.read_csv(run / "trials.csv")
    engine = rows["engine_version"].notna()
    for cell, figure in (
        (line[4], rows["unexplained_bytes"].abs() / (1 << 20)),
        (line[8], _off_percent(rows[rows["status"] != "ok"])),
        (line[7], _off_percent(rows[rows["status"] == "ok"])),
    ):
        ours, theirs = (figure[which[figure.index]].max() for which in (~engine, engine))
        assert cell == f"{ours:.2f} / {theirs:.2f}"


def _off_percent(rows: pd.DataFrame) -> pd.Series:
    rows = rows[rows["status"] == rows["predicted_status"]]
    return (rows["peak_device_bytes"] / rows["predicted_peak_bytes"] - 1).abs() * 100


def test_an_unknown_section_and_a_missing_run_are_one_line(tmp_path: Path, capsys):
    page = tmp_path / "page.md"
    for words in ("prices x", "sweeps nowhere"):
        before = f"<!-- rows: {words} -->\n<!-- rows: end -->\n"
        page.write_text(before)
        assert main([str(page)]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
        assert page.read_text() == before
    with pytest.raises(RunError, match="allowed are"):
        page.write_text("<!-- rows: prices x -->\n<!-- rows: end -->\n")
        renewed(page)


ENDS = (5_893_888, 5_896_704)  # of static in h200_report


def copied(tmp_path: Path, ends: tuple[int, int] = ENDS) -> Path:
    """A page of the points of a run, of which static's measured ends are others."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("trials.csv", "config.yaml", "summary.json", "manifest.json"):
        shutil.copy(ROOT / "results/reference/h200_report" / name, run / name)
    summary = json.loads((run / "summary.json").read_text())
    for point in ("startup", "admit", "resident"):
        summary["strategies"]["static"][point] |= {"ok": ends[0], "not_ok": ends[1]}
    (run / "summary.json").write_text(json.dumps(summary))
    lines = (run / "trials.csv").read_text().splitlines()
    for old, new in zip(ENDS, ends, strict=True):
        lines = [x.replace(f",{old},", f",{new},") if ",static," in x else x for x in lines]
    (run / "trials.csv").write_text("\n".join(lines) + "\n")
    page = tmp_path / "page.md"
    page.write_text("<!-- rows: points run -->\n<!-- rows: end -->\n")
    return page


def cells_of(page: Path) -> list[list[str]]:
    """The cells of the lines of static and of paged."""
    lines = [x for x in renewed(page).splitlines() if x.startswith("| run |")][1:]
    return [[c.strip() for c in line.strip("|").split("|")] for line in lines]


def test_points_are_planned_from_a_runs_own_settings(tmp_path: Path):
    static, paged = cells_of(copied(tmp_path, (5_000_000, 5_000_100)))
    assert static[:4] == ["run", "static", "5,893,888", "5,000,000"] and static[5] == "5,000,000"
    assert static[-1] == f"{100 * (893_888 - 100) / 5_000_000:.2f}" == "17.88"
    assert paged[-1] == "0.00"


@pytest.mark.parametrize("repeat", [0, 1])
def test_a_point_that_one_trial_could_not_start_is_not_shown_as_measured(tmp_path: Path, repeat):
    page = copied(tmp_path)
    rows = pd.read_csv(tmp_path / "run/trials.csv", dtype=str, keep_default_na=False)
    held = (rows["purpose"] == "resident") & (rows["repeat"] == str(repeat))
    held &= rows["strategy"] == "static"
    assert held.sum() == 1
    ended = ["status", "oom_phase", "oom_allocation", "admitted"]
    rows.loc[held, ended] = ["oom", "workspace", "gate", ""]
    rows.to_csv(tmp_path / "run/trials.csv", index=False)
    static, paged = cells_of(page)
    assert static[3] == static[5] == static[7] == "not closed" and static[-1] == "–"
    assert paged[3] == "10M, no failure" and paged[-1] == "0.00"
    (why,) = [line for line in renewed(page).splitlines() if line.startswith("run, static: ")]
    assert "startup: 5,893,888 ended both ways" in why and "resident: 5,893,888 ran 1 times" in why


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("strategy: paged", "strategy: ${oc.env:HOME}"),
        ("kind: cuda", "kind: [cuda"),
        ("layers: 48", "layers: many"),
        ("  sequences: 1\n  brackets", "  _target_: os.system\n  brackets"),
        ("- experiment: sweep\n  strategy: paged", "- strategy: paged"),
    ],
)
def test_settings_that_are_none_are_one_line(tmp_path: Path, capsys, old, new):
    page = copied(tmp_path)
    config = tmp_path / "run/config.yaml"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    before = page.read_text()
    assert main([str(page)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "run/config.yaml" in line and page.read_text() == before


EXAMPLE = ROOT / "docs/example"


def test_the_example_is_an_error_that_an_engine_gave_of_the_model_that_was_started():
    samples = (ROOT / "results/reference/h200_real_engines/samples.jsonl").read_text()
    first = json.loads(samples.splitlines()[0])["failed"]
    where, message = (EXAMPLE / "error.log").read_text().splitlines()
    assert where == first["where"]
    assert message == f"torch.{first['error_type']}: {first['message']}"
    words = ["strategy=sglang", "model=qwen3_30b_a3b", "hardware=h200"]
    shape = stand_in(compose_settings(words, planning=True), 10_000_000)
    assert json.loads((EXAMPLE / "config.json").read_text()) == shape.config()


def test_an_example_shows_what_the_command_answers(tmp_path: Path, capsys):
    shutil.copytree(EXAMPLE, tmp_path / "mine")
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- rows: explain mine -->\nstale\n<!-- rows: end -->\nb\n")
    assert main([str(page)]) == 0
    text = page.read_text()
    assert "stale" not in text and renewed(page) == text
    command = (EXAMPLE / "command.txt").read_text().strip()
    assert f"--command '{command}'" in text
    files = [str(EXAMPLE / name) for name in ("error.log", "config.json")]
    capsys.readouterr()
    assert explain([files[0], "--config", files[1], "--command", command]) == 0
    assert capsys.readouterr().out in text
    (tmp_path / "mine/command.txt").write_text("sglang serve --context-length 128Ki\n")
    assert "context 131,072" in renewed(page)


@pytest.mark.parametrize(
    "words", ["explain", "explain docs more", "explain nowhere", "explain bad"]
)
def test_an_example_that_cannot_be_made_is_one_line(tmp_path: Path, capsys, words):
    shutil.copytree(EXAMPLE, tmp_path / "bad")
    (tmp_path / "bad/config.json").write_text("{")
    page = tmp_path / "page.md"
    before = f"<!-- rows: {words} -->\n<!-- rows: end -->\n"
    page.write_text(before)
    assert main([str(page)]) == 2
    said = capsys.readouterr().err
    assert len(said.strip().splitlines()) == 1 and said.startswith("harness.pages: ")
    assert page.read_text() == before
