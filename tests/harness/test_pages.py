"""Pages whose figures come from rows: what is committed is what the rows give."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness.pages import MARKED, main, renewed
from harness.runs import RunError
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
