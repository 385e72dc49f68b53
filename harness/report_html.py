"""A run's report as one HTML file: figures inline, tables that sort, the manifest one click away.

Nothing is loaded from elsewhere, and everything that comes from the run is escaped. The page may
run only its own sorting script (its hash is in the content security policy).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from pathlib import Path

from harness.columns import is_text
from harness.plots import TITLES
from harness.report import figure_files, provenance, report_parts, said_of, title
from harness.runs import Run
from harness.tabular import EMPTY, Table, known

TALL = 40  # rows of a table that scrolls by itself
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:75rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.5rem;margin-bottom:.2rem}h2{font-size:1.15rem;margin-top:2.2rem}
nav a{margin-right:1rem}a{color:#0072B2}.note,figcaption{color:#555;font-size:.85rem;margin:.3rem 0}
.scroll{overflow-x:auto;border:1px solid #ddd}
.tall{max-height:36rem;overflow-y:auto}
table{border-collapse:collapse;font-size:.82rem;width:100%}
td,th{padding:.25rem .6rem;text-align:left}
th{position:sticky;top:0;background:#f3f3f3;white-space:nowrap}
tbody tr:nth-child(even){background:#fafafa}tr:target{outline:2px solid #D55E00}
.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.sortable th{cursor:pointer}th button{all:unset;cursor:pointer}
th button:focus-visible{outline:2px solid #0072B2}
th button::after{content:" \\2195";color:#999}
th[aria-sort=ascending] button::after{content:" \\2191";color:#000}
th[aria-sort=descending] button::after{content:" \\2193";color:#000}
.wide td{white-space:nowrap}
.figures{columns:22rem;column-gap:1.5rem}
figure{margin:0 0 1.5rem;break-inside:avoid;max-width:27rem}figure img{width:100%}
details{margin:1rem 0}summary{cursor:pointer;font-weight:600}
pre{background:#f6f6f6;padding:.8rem;overflow:auto;max-height:40rem;font-size:.8rem}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem}dt{color:#555}dd{margin:0}
dd{overflow-wrap:anywhere}
@media print{.tall{max-height:none}.scroll{border:0}th button::after{content:""}}
"""
_SCRIPT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = row => {
        const cell = row.cells[column], text = cell.textContent.trim();
        if (!cell.classList.contains("number")) return text;
        const sizes = {K: 1e3, M: 1e6, Ki: 1024, Mi: 1048576};
        const figure = /^(?:≥ )?([+-]?[0-9.]+(?:e[+-]?[0-9]+)?)(Ki|Mi|K|M)?/;
        const found = text.replace(/,/g, "").match(figure);
        return found ? parseFloat(found[1]) * (sizes[found[2]] || 1) : NaN;
      };
      const compare = (a, b) => typeof a === "number"
        ? (isNaN(a) ? 1 : isNaN(b) ? -1 : a - b) : a.localeCompare(b);
      Array.from(body.rows).map(row => [key(row), row])
        .sort((a, b) => Number.isNaN(a[0]) || Number.isNaN(b[0])
          ? compare(a[0], b[0]) : (down ? -1 : 1) * compare(a[0], b[0]))
        .forEach(pair => body.appendChild(pair[1]));
    });
  });
});
"""


def html_report(runs: Sequence[Run]) -> str:
    """Return the page of one or more runs.

    Parameters
    ----------
    runs : sequence of Run
        Their figures must lie in each run's ``figures/`` already.

    Returns
    -------
    str
        A whole HTML document.
    """
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'"
    )
    name = " and ".join(title(run.folder, run.manifest) for run in runs)
    body = "\n".join(_run(run, n, len(runs)) for n, run in enumerate(runs))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(name)}</title><style>{_STYLE}</style></head>\n"
        f"<body>{body}<script>{_SCRIPT}</script></body></html>\n"
    )


def _run(run: Run, number: int, count: int) -> str:
    prefix = f"run{number}-" if count > 1 else ""
    said, evidence = report_parts(run.rows, run.summary, run.run_id)
    trials = frozenset(run.rows["trial_id"]) - {""}
    sections = [
        f'<h2 id="{prefix}table{n}">{html.escape(t.title)}</h2>\n'
        + t.html(prefix, "tall" if len(t.rows) > TALL else "", trials)
        for n, t in enumerate([*said, *evidence])
    ]
    names = [(f"{prefix}table{n}", t.title) for n, t in enumerate([*said, *evidence])]
    names.insert(len(said), (f"{prefix}figures", "Figures"))
    names += [(f"{prefix}rows", "Every row"), (f"{prefix}provenance", "Provenance")]
    links = "".join(f'<a href="#{i}">{html.escape(t)}</a>' for i, t in names)
    lines = said_of(run.rows, run.summary, run.run_id)
    points = "".join(f"<li>{html.escape(s)}</li>" for s in lines)
    return (
        f"<h1>{html.escape(title(run.folder, run.manifest))}</h1>\n<ul>{points}</ul>"
        f"<nav>{links}</nav>\n{_manifest(run)}"
        + "\n".join(sections[: len(said)])
        + f'<h2 id="{prefix}figures">Figures</h2>{_figures(run.folder)}\n'
        + "\n".join(sections[len(said) :])
        + f'<h2 id="{prefix}rows">Every row of trials.csv</h2>{every_row(run, prefix)}\n'
        + f'<h2 id="{prefix}provenance">Provenance</h2>{_provenance(run)}'
    )


def every_row(run: Run, prefix: str = "") -> str:
    """Return all rows with every column that is not empty, an anchor for each trial."""
    columns = [c for c in run.rows if (run.rows[c].notna() & (run.rows[c] != "")).any()]
    columns = ["trial_id", *(c for c in columns if c not in ("trial_id", "run_id"))]
    rows = [[_value(row[c]) for c in columns] for _, row in run.rows.iterrows()]
    heads = tuple(c if is_text(c) else f">{c}" for c in columns)
    ids, seen = [], set()
    for row in rows:
        ids.append("" if row[0] in seen else row[0])
        seen.add(row[0])
    return Table("", heads, tuple(map(tuple, rows)), row_ids=tuple(ids)).html(prefix, "wide tall")


def _value(value: object) -> str:
    if isinstance(value, float):
        if not known(value):
            return ""
        return f"{value:.0f}" if value.is_integer() else f"{value:.6g}"
    return str(value)


def _figures(folder: Path) -> str:
    out = []
    for path in figure_files(folder):
        if path.is_symlink() or not path.is_file():
            continue
        name = html.escape(TITLES[path.stem])
        data = base64.b64encode(path.read_bytes()).decode()
        out.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    return f"<div class=figures>{''.join(out)}</div>" if out else f"<p>{EMPTY}</p>"


def _manifest(run: Run) -> str:
    text = html.escape(json.dumps(run.manifest, indent=1, ensure_ascii=False))
    return f"<details><summary>Manifest</summary><pre>{text}</pre></details>\n"


def _provenance(run: Run) -> str:
    items = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in provenance(run.manifest)
    )
    return f"<dl>{items}</dl>" if items else "<p>No manifest.</p>"
