"""Reports: complete, self-contained, safe with a stranger's text, and sortable in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from harness import tables
from harness.report import answer, main, write_report, write_report_md
from harness.report_html import html_report
from harness.report_latex import bibtex, headline, letters, macro_lines, write_latex
from harness.runs import load_run
from harness.tabular import Table
from tests.harness.run_fixture import MANIFEST, SUMMARY, cell, sweep, write_run

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
ROOT = Path(__file__).resolve().parents[2]
REFERENCE = sorted(p.parent for p in (ROOT / "results/reference").glob("*/trials.csv"))
PDFLATEX = shutil.which("pdflatex")
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser")) if p), None)


class Page(HTMLParser):
    """Tags with their attributes, ids, links and text of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.links, self.sources, self.words = [], set(), [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.tags.append((tag, given))
        if "id" in given:
            assert given["id"] not in self.ids, f"id {given['id']} appears twice"
            self.ids.add(given["id"])
        self.links += [given["href"]] if "href" in given else []
        self.sources += [given["src"]] if "src" in given else []

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("runs") / "run", sweep(1))
    assert main([str(folder)]) == 0
    return load_run(folder)


def test_everything_is_written_beside_the_run(run):
    names = {p.name for p in run.folder.iterdir()}
    assert {"report.md", "report.html", "tables.tex", "numbers.tex", "run.bib"} <= names
    assert (run.folder / "figures" / "memory_against_context.svg").exists()


def test_markdown_shows_answers_tables_figures_and_where_it_came_from(run):
    text = (run.folder / "report.md").read_text()
    assert "paged starts at 10,000,000 tokens" in text
    assert "static starts at 5,800,000 tokens of context, not at 5,802,816" in text
    for path in re.findall(r"\]\((figures/[^)]+)\)", text):
        assert (run.folder / path).exists()
    assert text.count("figures/") >= 6
    assert MANIFEST["git"]["commit"] in text and MANIFEST["command"].split()[0] in text
    for row in run.rows.itertuples():
        assert row.trial_id in text


@pytest.mark.parametrize("folder", REFERENCE, ids=lambda p: p.name)
def test_every_number_of_a_reference_run_leads_to_its_rows(folder):
    run = load_run(folder)
    known = set(run.rows["trial_id"])

    def trials_in(text):
        return set(re.findall(r"\b[0-9a-f]{12}\b", text))

    points = tables.oom_points(run.summary, run.rows)
    for line in points.rows:
        assert trials_in(line[-1]) and trials_in(line[-1]) <= known, line
    for line in macro_lines(run):
        if "summary.json strategies" in line:
            assert trials_in(line) and trials_in(line) <= known, line
        assert line.startswith("% ") or re.search(r"\} % \S", line), line
    for table in (tables.verdict_sources(run.summary), tables.planner(run.rows, each=True)):
        assert all(trials_in(" ".join(line)) <= known for line in table.rows)
    text = (folder / "report.md").read_text()
    if not run.of_earlier_runs:  # their OOM points stand in their own reports
        assert all(" ".join(line[-1].split()) in text for line in points.rows)


def test_each_run_gets_its_own_page_and_the_first_one_those_of_all(run, tmp_path):
    first, other = (write_run(tmp_path / n, sweep(1), run_id=n) for n in ("first", "other"))
    assert main([str(first), str(other), "--keep-figures"]) == 0
    for folder, name in ((first, "first"), (other, "other")):
        assert (folder / "report.md").read_text().startswith(f"# sweep: {name}\n")
    assert "sweep: other" in (first / "report.html").read_text()
    assert not (other / "report.html").exists() and (first / "run.bib").read_text().count("@") == 2


def test_many_arms_are_counted_not_told_one_by_one(run):
    summary = {"strategies": {f"paged, {n}": SUMMARY["strategies"]["paged"] for n in range(9)}}
    assert answer(run.rows, summary)[0].startswith("9 configurations: ")
    assert len(answer(run.rows, SUMMARY)) == 3


def test_html_loads_nothing_and_every_link_leads_somewhere(run):
    page = Page((run.folder / "report.html").read_text())
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert len(page.sources) == 3
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    linked = {link.removeprefix("#trial-") for link in page.links}
    assert set(run.rows["trial_id"]) <= linked
    assert ("details", {}) in page.tags
    assert not any(tag in ("link", "iframe", "object") for tag, _ in page.tags)


def test_two_runs_make_one_page_without_clashing_ids(run, tmp_path):
    other = load_run(write_run(tmp_path / "other", sweep(1), run_id="other"))
    page = Page(html_report([run, other]))
    assert all(link[1:] in page.ids for link in page.links)
    assert "sweep: other" in "".join(page.words)


def test_a_strangers_text_stays_text(tmp_path):
    rows = [cell("paged", 1000, 1.0) | {"strategy": EVIL, "trial_id": EVIL, "model": EVIL}]
    rows += [cell("static", 1000, 1.0) | {"error": EVIL, "device_name": EVIL}]
    summary = {
        "strategies": {EVIL: SUMMARY["strategies"]["static"]},
        "claims": [{"id": EVIL, "verdict": EVIL, "condition": EVIL, "measured": {EVIL: EVIL}}],
    }
    keys = dict.fromkeys(("run_id", "command", "started_utc"), EVIL)
    folder = write_run(tmp_path / "run", rows, summary, **keys, gpus=[{"name": EVIL}, 3])
    run = load_run(folder)
    page = html_report([run])
    assert [tag for tag, _ in Page(page).tags].count("script") == 1
    assert not any("onerror" in attrs for _, attrs in Page(page).tags)
    text = write_report_md(folder, run.rows, run.timeline, summary, run.manifest).read_text()
    assert "<script" not in text and "<img" not in text
    for line in macro_lines(run):
        macro = re.fullmatch(r"\\newcommand\{\\kv[A-Za-z]+\}\{.*\} % .*", line)
        assert line.startswith("%") or macro
    assert bibtex(run).count("@") == 1


def test_macros_are_letters_and_unique_and_say_where_the_number_stands(run):
    lines = (run.folder / "numbers.tex").read_text().splitlines()
    names = re.findall(r"\\newcommand\{\\(\w+)\}", "\n".join(lines))
    assert len(names) == len(set(names)) > 10
    assert all(re.fullmatch("[A-Za-z]+", name) for name in names)
    assert (
        r"\newcommand{\kvStaticStartupOk}{5,800,000} % summary.json strategies.static.startup.ok"
        in lines
    )
    where = "summary.json claims.C1; trials abc"
    assert rf"\newcommand{{\kvClaimCOneVerdict}}{{conditional}} % {where}" in lines
    paged = [r for r in sweep(1) if (r["strategy"], r["context_tokens"]) == ("paged", 1_000_000)]
    (row,) = [r for r in paged if r["attention_decode_step_ms"]]
    ms = f"{row['attention_decode_step_ms']:.4g}"
    (told,) = [x for x in lines if x.startswith(rf"\newcommand{{\kvPagedDecodeMsAtOneM}}{{{ms}}}")]
    assert "attention_decode_step_ms x 1 at 1000000; trials " in told and row["trial_id"] in told
    assert letters("eager_pages v2") == "EagerPagesVTwo"
    assert letters("2.5M") != letters("25M")


def test_headline_numbers_of_the_scale_model_are_the_modelled_devices(tmp_path):
    rows = sweep(1, scale=192)
    summary = {"strategies": {"paged": {"peak_device_bytes": (1 << 30) / 192}}}
    run = load_run(write_run(tmp_path / "run", rows, summary))
    assert ("PagedPeak", "1.00 GiB") in [(n, v) for n, v, _ in headline(run)]


def test_latex_tables_are_balanced_booktabs(run):
    text = (run.folder / "tables.tex").read_text()
    rules = [text.count(rf"\{r}") for r in ("toprule", "midrule", "bottomrule", "begin{table}")]
    assert len(set(rules)) == 1 and rules[0] >= 3
    for body in re.findall(r"\\midrule\n(.*?)\\bottomrule", text, re.S):
        columns = {line.replace(r"\&", "").count("&") for line in body.strip().splitlines()}
        assert len(columns) == 1


def test_bibtex_names_run_commit_and_date(run):
    text = (run.folder / "run.bib").read_text()
    assert MANIFEST["run_id"] in text and MANIFEST["git"]["commit"] in text
    assert text.count("{") == text.count("}")
    fields = dict(re.findall(r"^  (\w+) = \{(.*)\},?$", text, re.M))
    # All that plain BibTeX's styles print of @misc: nothing is in a field that they drop.
    assert set(fields) == {"title", "author", "year", "month", "note"}
    assert (fields["year"], fields["month"]) == ("2026", "11")
    assert fields["note"].startswith(f"Run of 2026-11-24. Commit {'c' * 40}. Command: ")
    software = (ROOT / "CITATION.cff").read_text()
    assert f"name: {fields['author'].strip('{}')}\n" in software


def test_the_same_run_gives_the_same_report(run):
    names = ("report.md", "report.html", "tables.tex", "numbers.tex", "run.bib")
    before = [(run.folder / n).read_bytes() for n in names]
    write_report([run], redraw=False)
    assert [(run.folder / n).read_bytes() for n in names] == before


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_long_table_breaks_over_pages_and_long_words_inside_their_column():
    rows = tuple(
        (f"a_rather_long_name_of_an_arm={n}, more words", f"{n}", "x " * 40) for n in range(60)
    )
    text = Table("Long", ("arm", ">n", "condition"), rows, ("A note.",)).latex("t")
    assert text.count("{longtable}") == 2 and "\\begin{table}" not in text
    assert (
        text.count(r"\toprule") == text.count(r"\midrule") == 2 and text.count(r"\bottomrule") == 1
    )
    assert "long\\_\\allowbreak{}name" in text and r"\par\smallskip A note." in text
    shares = [float(n) for n in re.findall(r"p\{([0-9.]+)\\linewidth\}", text)]
    assert len(shares) == 2 and sum(shares) < 1
    short = Table("Short", ("arm", ">n"), (("static", "1"),)).latex("t")
    assert r"\begin{tabular}{lr}" in short and "allowbreak" not in short


@pytest.mark.skipif(PDFLATEX is None, reason="no LaTeX here")
def test_tex_sets_tables_and_macros_without_an_error_or_a_line_beyond_the_margin(tmp_path):
    rows = [r | {"strategy": r"a<b> | c\"d $#_^~", "model": "model_" * 5} for r in sweep(1)]
    rows += [r | {"arm": f"chunk_{n}MiB", "trial_id": f"{n}"} for n, r in enumerate(sweep(4))]
    claims = [
        SUMMARY["claims"][0] | {"id": f"C{n}", "condition": "0.5.12.post1 " * 9} for n in range(30)
    ]
    folder = write_run(tmp_path / "run", rows, SUMMARY | {"claims": claims})
    write_latex(folder, [load_run(folder)])
    (folder / "doc.tex").write_text(
        r"\documentclass{article}\usepackage{array,booktabs,longtable}\begin{document}"
        r"\input{numbers}Holds \kvStaticStartupOk.\input{tables}\end{document}"
    )
    shell = [PDFLATEX, "-interaction=nonstopmode", "-halt-on-error", "doc.tex"]
    out = subprocess.run(shell, cwd=folder, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stdout[-800:]
    beyond = [float(n) for n in re.findall(r"Overfull \\hbox \(([0-9.]+)pt", out.stdout)]
    assert not [n for n in beyond if n > 6] and "Float too large" not in out.stdout, beyond


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here")
def test_in_a_real_browser_the_table_sorts_and_figures_show(run, tmp_path):
    """The page's own script sorts by a clicked column; numbers as numbers, empty ones last."""
    page = (run.folder / "report.html").read_text()
    probe = """<script>
      const table = [...document.querySelectorAll("table.sortable")].find(t =>
        [...t.querySelectorAll("th")].some(h => h.textContent === "peak"));
      const column = [...table.querySelectorAll("th")].findIndex(h => h.textContent === "peak");
      const read = () => [...table.tBodies[0].rows].map(
        r => parseFloat(r.cells[column].textContent));
      const click = () => table.querySelectorAll("th button")[column].click();
      click(); const up = read(); click(); const down = read();
      const mine = document.getElementById("ours");
      const shown = column => [...mine.tBodies[0].rows].map(r => r.cells[column].textContent);
      const sorted = column => {
        mine.querySelectorAll("th button")[column].click(); return shown(column); };
      const sizes = sorted(0), falling = sorted(0), words = sorted(1);
      document.title = JSON.stringify({up, down, sizes, falling, words,
        shown: [...document.images].every(i => i.complete && i.naturalWidth > 0),
        wide: document.documentElement.scrollWidth > window.innerWidth});
    </script></body>"""
    contexts = ["2M", "128Ki", "", "999K", "5,896,704", "≥ 10M", "1Mi", "x"]
    cells = "".join(f"<tr><td class=number>{c}</td><td>{c}</td></tr>" for c in contexts)
    heads = "<tr><th><button>n</button></th><th><button>t</button></th></tr>"
    ours = f"<table class=sortable id=ours><thead>{heads}</thead><tbody>{cells}</tbody></table>"
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', page)[0]
    assert "default-src 'none'" in policy
    page = page.replace(policy, "").replace("<body>", f"<body>{ours}", 1)
    assert ours in page
    (tmp_path / "page.html").write_text(page.replace("</body>", probe))
    shell = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900"]
    shell += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=3000", "--dump-dom"]
    out = subprocess.run(
        [*shell, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=60
    ).stdout
    found = re.search(r"<title>(\{.*?\})</title>", out)
    assert found, out[:500]
    state = json.loads(found[1].replace("&quot;", '"'))
    assert state["up"] == sorted(state["up"]) and state["down"] == sorted(state["up"])[::-1]
    assert len(set(state["up"])) > 3
    rising = ["128Ki", "999K", "1Mi", "2M", "5,896,704", "≥ 10M"]
    assert state["sizes"][:6] == rising and state["falling"][:6] == rising[::-1]
    assert set(state["sizes"][6:]) == set(state["falling"][6:]) == {"", "x"}  # no figure: last
    assert sorted(state["words"]) == sorted(contexts) and state["words"].index("x") > 5
    assert state["shown"] and not state["wide"]
