"""A run's report: report.md, and by ``python -m harness.report`` report.html, LaTeX and BibTeX."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from harness import tables
from harness.plots import FIGURES_FOLDER, TITLES
from harness.runs import clean, frame, lookup, write_file
from harness.series import is_scale_model
from harness.tabular import EMPTY, Table, markdown_text


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
    lines = [f"# {markdown_text(title(folder, manifest))}", "", *_answer(rows, summary)]
    found = report_tables(rows, summary)
    lines += _sections(found[:-1]) + _figures(folder) + _sections(found[-1:])
    lines += ["", "## Provenance", "", *provenance_lines(manifest)]
    lines += ["", "Every figure is drawn from `trials.csv` (a row a trial) and `timeline.csv`."]
    return write_file(Path(folder) / "report.md", "\n".join(lines) + "\n")


def _sections(found: list[Table]) -> list[str]:
    return [line for t in found for line in ("", f"## {t.title}", "", t.markdown())]


def title(folder: Path, manifest: dict[str, Any]) -> str:
    """Return the run's experiment and id."""
    experiment = clean(lookup(manifest, "experiment", default="")) or "sweep"
    return f"{experiment}: {clean(lookup(manifest, 'run_id', default='')) or Path(folder).name}"


def report_tables(rows: pd.DataFrame, summary: dict[str, Any]) -> list[Table]:
    """Return the tables of a report that have a line; the last one is of every trial."""
    found = [
        tables.oom_points(summary),
        tables.verdicts(summary),
        tables.planner(rows),
        tables.sweep(rows, each=True),
    ]
    return [t for t in found if t.rows]


def _answer(rows: pd.DataFrame, summary: dict[str, Any]) -> list[str]:
    """Say in a sentence a strategy what happened at the largest context."""
    out = []
    for name, one in tables.strategies(summary):
        startup, resident = lookup(one, "startup", "ok"), lookup(one, "resident", "ok")
        said = []
        if isinstance(startup, (int, float)):
            failed = lookup(one, "startup", "not_ok")
            end = f", not at {tables.count(failed)}" if failed else " (the sweep's end)"
            said.append(f"starts at {tables.count(startup)} tokens of context{end}")
        if isinstance(resident, (int, float)):
            said.append(f"holds {tables.count(resident)} tokens")
        if said:
            out.append(f"* **{markdown_text(name)}** {'; '.join(said)}.")
    if is_scale_model(rows):
        out += [
            "",
            "Scale model on a host: OOM points transfer to the modelled device, speeds do not.",
        ]
    status = rows["status"].value_counts()
    out += ["", "Trials: " + ", ".join(f"{n} {s}" for s, n in sorted(status.items())) + "."]
    return out


def _figures(folder: Path) -> list[str]:
    lines: list[str] = []
    for path in sorted((Path(folder) / FIGURES_FOLDER).glob("*.png"), key=figure_order):
        name = TITLES.get(path.stem, path.stem.replace("_", " "))
        svg = f"{FIGURES_FOLDER}/{path.stem}.svg"
        lines += [
            "",
            f"## {name}",
            "",
            f"![{name}]({FIGURES_FOLDER}/{path.name})",
            f"([SVG]({svg}))",
        ]
    return lines


def figure_order(path: Path) -> tuple[int, str]:
    """Return a sorting key that puts figures in the order of :data:`harness.plots.TITLES`."""
    names = list(TITLES)
    return (names.index(path.stem) if path.stem in names else len(names), path.stem)


def provenance(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what made the run, as pairs of a name and a value."""
    gpus = lookup(manifest, "gpus", default=[])
    names = [clean(lookup(g, "name", default="")) for g in gpus] if isinstance(gpus, list) else []
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
