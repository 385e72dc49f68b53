"""A run's report: report.md, and by ``python -m harness.report`` report.html, LaTeX and BibTeX."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness import tables
from harness.arguments import OneLineParser
from harness.closed_pipe import ends_quietly
from harness.engines.tables import engine_tables
from harness.plots import FIGURES_FOLDER, TITLES, draw_judged, draw_run
from harness.precision import precision_table
from harness.ranks_scaling import scaling_table
from harness.remedies import remedies_table
from harness.runs import (
    Run,
    RunError,
    clean,
    dicts,
    frame,
    load_runs,
    lookup,
    rows_of_others,
    trials,
    write_file,
)
from harness.series import is_scale_model
from harness.sharing import sharing_table
from harness.sources import as_written
from harness.tables_ranks import ranks_table
from harness.tabular import EMPTY, Table, markdown_text

FIGURES_NOTE = "Every figure is drawn from `trials.csv` (a row a trial) and `timeline.csv`."
JUDGED_NOTE = (
    "The rows are those of earlier runs, which the command names: their ledger events, timings and "
    "figures lie in their own folders."
)
MOST_ANSWERS = 8
SCALE_NOTE = "Scale model on a host: OOM points transfer to the modelled device, speeds do not."


def write_report_md(
    folder: Path,
    rows: pd.DataFrame,
    timeline: pd.DataFrame,
    summary: dict[str, Any],
    manifest: dict[str, Any],
) -> Path:
    """Write ``report.md`` into a run's folder, with the figures that lie in ``figures/``.

    Parameters
    ----------
    folder : Path
    rows, timeline : pandas.DataFrame
    summary, manifest : dict

    Returns
    -------
    Path
        The file.
    """
    del timeline
    rows = frame(rows)
    run_id = clean(lookup(manifest, "run_id", default=""))
    lines = [f"# {markdown_text(title(folder, manifest))}", ""]
    lines += [f"* {markdown_text(line)}" for line in said_of(rows, summary, run_id)]
    said, evidence = report_parts(rows, summary, run_id)
    lines += _sections(said) + _figures(folder) + _sections(evidence)
    lines += ["", "## Provenance", "", *provenance_lines(manifest)]
    lines += ["", JUDGED_NOTE if rows_of_others(rows, run_id) else FIGURES_NOTE]
    return write_file(Path(folder) / "report.md", "\n".join(lines) + "\n")


def _sections(found: list[Table]) -> list[str]:
    return [line for t in found for line in ("", f"## {t.title}", "", t.markdown())]


def title(folder: Path, manifest: dict[str, Any]) -> str:
    """Return the run's experiment and id."""
    experiment = clean(lookup(manifest, "experiment", default="")) or "sweep"
    return f"{experiment}: {clean(lookup(manifest, 'run_id', default='')) or Path(folder).name}"


def report_parts(
    rows: pd.DataFrame, summary: dict[str, Any], run_id: str
) -> tuple[list[Table], list[Table]]:
    """Return the tables of a report that have a line: answers, and what they rest on.

    Of rows of earlier runs, whose own reports say the rest, only the verdicts and the rows.
    """
    judged_only = rows_of_others(rows, run_id)
    said = [
        *([] if judged_only else _answers(rows, summary)),
        tables.verdicts(summary),
        *engine_tables(summary),
    ]
    evidence = [
        tables.verdict_sources(summary),
        tables.planner(rows, each=True),
        tables.sweep(rows, each=True),
    ]
    return [t for t in said if t.rows], [t for t in evidence if t.rows]


def _answers(rows: pd.DataFrame, summary: dict[str, Any]) -> list[Table]:
    return [
        remedies_table(rows, summary),
        sharing_table(rows),
        precision_table(rows),
        tables.oom_points(summary, rows),
        ranks_table(summary, rows),
        scaling_table(as_written(rows)),
    ]


def answer(rows: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    """Return a sentence a strategy on where it starts and what it holds, and how trials ended.

    Of more strategies than a reader takes in, only their number.
    """
    out = []
    for name, one in tables.strategies(summary):
        startup, admit, resident = (lookup(one, p, "ok") for p in ("startup", "admit", "resident"))
        said = []
        if isinstance(startup, (int, float)):
            failed = lookup(one, "startup", "not_ok")
            end = f", not at {tables.count(failed)}" if failed else " (the sweep's end)"
            said.append(f"starts at {tables.count(startup)} tokens of context{end}")
        if isinstance(admit, (int, float)) and admit != startup:
            said.append(f"admits a request of {tables.count(admit)}")
        if isinstance(resident, (int, float)):
            said.append(f"holds {tables.count(resident)} tokens")
        if said:
            out.append(f"{name} {'; '.join(said)}.")
    if len(out) > MOST_ANSWERS:
        out = [f"{len(out)} configurations: the table of OOM points says where each of them ends."]
    if is_scale_model(rows):
        out.append(SCALE_NOTE)
    status = trials(rows)["status"].value_counts()
    return [*out, "Trials: " + ", ".join(f"{n} {s}" for s, n in sorted(status.items())) + "."]


def said_of(rows: pd.DataFrame, summary: dict[str, Any], run_id: str) -> list[str]:
    """Return the first sentences of a report: a run's answer, or whose rows are judged."""
    return judged(rows) if rows_of_others(rows, run_id) else answer(rows, summary)


def judged(rows: pd.DataFrame) -> list[str]:
    """Return a sentence an earlier run whose rows are judged: how many, and on what they rest."""
    bases = {"measured": "measured", "scale_model": "of the scale model", "planned": "planned"}
    out = []
    for (experiment, name), own in rows.groupby(["experiment", "run_id"], sort=False):
        kinds = ", ".join(f"{n} {bases.get(b, b)}" for b, n in own["basis"].value_counts().items())
        out.append(f"Rows of {experiment} {name}: {kinds}.")
    return out


def _figures(folder: Path) -> list[str]:
    lines: list[str] = []
    for path in figure_files(folder):
        name = TITLES[path.stem]
        svg = f"{FIGURES_FOLDER}/{path.stem}.svg"
        lines += [
            "",
            f"## {name}",
            "",
            f"![{name}]({FIGURES_FOLDER}/{path.name})",
            f"([SVG]({svg}))",
        ]
    return lines


def figure_files(folder: Path) -> list[Path]:
    """Return a run's own figures (not those of comparisons), in the order of ``TITLES``."""
    names = list(TITLES)
    found = (Path(folder) / FIGURES_FOLDER).glob("*.png")
    return sorted((p for p in found if p.stem in names), key=lambda p: names.index(p.stem))


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what made the run, as pairs of a name and a value."""
    names = [clean(lookup(g, "name", default="")) for g in dicts(manifest, "gpus")]
    dirty = lookup(manifest, "git", "dirty")
    versions = lookup(manifest, "versions", default={})
    pairs = [
        ("command", clean(lookup(manifest, "command", default=""))),
        ("commit", clean(lookup(manifest, "git", "commit", default=""))),
        ("working tree", {True: "with uncommitted changes", False: "clean"}.get(dirty, "")),
        ("started", clean(lookup(manifest, "started_utc", default=""))),
        ("finished", clean(lookup(manifest, "finished_utc", default=""))),
        ("configuration hash", clean(lookup(manifest, "config_hash", default=""))),
        ("GPU", ", ".join(n for n in names if n)),
        ("hardware", tables.value(lookup(manifest, "hardware"))),
        ("seeds", tables.value(lookup(manifest, "seeds"))),
        ("versions", tables.value(versions) if versions else ""),
    ]
    return [(k, v) for k, v in pairs if v and v != EMPTY]


def provenance_lines(manifest: dict[str, Any]) -> list[str]:
    """Return the provenance as a Markdown list."""
    return [f"* {k}: {markdown_text(v)}" for k, v in provenance(manifest)] or ["No manifest."]


def write_report(runs: Sequence[Run], redraw: bool = True) -> list[Path]:
    """Write report.md into each run's folder; report.html, LaTeX and BibTeX into the first one's.

    Parameters
    ----------
    runs : sequence of Run
    redraw : bool
        Draw the figures anew, else take those that lie in ``figures/``.

    Returns
    -------
    list of Path
    """
    from harness.report_html import html_report
    from harness.report_latex import write_latex

    for run in runs if redraw else ():
        if run.of_earlier_runs:
            draw_judged(run.folder, run.summary)
        else:
            draw_run(run.folder, run.rows, run.timeline, run.summary)
    first = runs[0]
    pages = [
        write_report_md(run.folder, run.rows, run.timeline, run.summary, run.manifest)
        for run in runs
    ]
    return [
        *pages,
        write_file(first.folder / "report.html", html_report(runs)),
        *write_latex(first.folder, runs),
    ]


@ends_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report of those folders that are runs; 0, or 2 when one is none."""
    parser = OneLineParser(
        prog="python -m harness.report",
        description="Write report.md into each run's folder, and report.html (self-contained), "
        "*.tex (booktabs tables, a macro for each headline number) and BibTeX entries of all runs "
        "into the first one's.",
        epilog="Exit status: 0, or 2 when a folder is no run (the report is of the others).",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--keep-figures", action="store_true", help="do not draw figures anew")
    options = parser.parse_args(arguments)
    runs, faults = load_runs(options.runs)
    paths: list[Path] = []
    try:
        paths = write_report(runs, not options.keep_figures) if runs else []
    except RunError as error:
        faults.append(str(error))
    for path in paths:
        print(path)
    for fault in faults:
        print(f"harness.report: {fault}", file=sys.stderr)
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
