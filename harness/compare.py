"""``python -m harness.compare A B``: what differs between two runs, strategies or commits.

The runs' own folders are only read. Exit 0; 1 when not one cell can be compared; 2 for bad input.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import pandas as pd

from harness import style
from harness.arguments import OneLineParser
from harness.closed_pipe import ends_quietly
from harness.pairing import MEMORY, METRICS, Pairs, Ratio, cell_names, pair, ratios
from harness.phases import place_name
from harness.plots_compare import figure_compare
from harness.runs import Run, RunError, clean, load_run, lookup, read_text, write_file
from harness.series import is_scale_model
from harness.tabular import EMPTY, Table, figure_of, gib

OUT = Path("results/runs/compare")
PROVENANCE = (("git", "commit"), ("git", "dirty"), ("git", "diff_sha"), ("config_hash",))
SCALE_NOTE = (
    "Rows of the scale model: bytes are the modelled device's; no speed is a GPU's, whatever its "
    "ratio."
)


def ratio_table(found: Sequence[Ratio], a: str, b: str) -> Table:
    """Return a line a metric and cell: medians, B / A with its interval, the verdict."""
    first = {r.metric: r for r in reversed(found)}
    lines = tuple(
        (
            METRICS[r.metric] if first[r.metric] is r else "",
            r.cell,
            str(r.pairs),
            _median(r, r.median_a),
            _median(r, r.median_b),
            f"{r.ratio:.4f}",
            f"{r.low:.4f} to {r.high:.4f}" if r.pairs > 1 else EMPTY,
            r.verdict,
        )
        for r in found
    )
    columns = ("metric", "cell", ">pairs", ">A", ">B", ">B/A", ">95 % interval", "at the 2 % gate")
    return Table(f"A = {a}, B = {b}", columns, lines)


def _median(r: Ratio, value: float) -> str:
    if r.cell == "all cells":
        return EMPTY
    return gib(value) if r.metric in MEMORY else figure_of(value)


def end_table(pairs: Pairs) -> Table:
    """Return the cells that ended differently in A and in B."""
    differ = pairs.both[pairs.both["status_a"] != pairs.both["status_b"]]
    lines: dict[tuple[str, ...], None] = {}
    if not differ.empty:
        for (_, row), cell in zip(differ.iterrows(), cell_names(differ), strict=True):
            lines[(cell, _end(row, "a"), _end(row, "b"))] = None
    return Table("Cells that ended differently", ("cell", "A", "B"), tuple(lines))


def changed_table(pairs: Pairs, a: Run, b: Run) -> Table:
    """Return what differs in configuration, code and machine."""
    lines = [(name, *values) for name, values in pairs.changed.items()]
    if a.folder != b.folder:
        lines += _differences(_flat(a), _flat(b), "config.yaml ")
        manifests = [
            {" ".join(path): lookup(m, *path) for path in PROVENANCE}
            | {f"version of {k}": v for k, v in (lookup(m, "versions", default={}) or {}).items()}
            for m in (a.manifest, b.manifest)
        ]
        lines += _differences(manifests[0], manifests[1], "")
    return Table("What changed", ("what", "A", "B"), tuple(dict.fromkeys(lines)))


def write_comparison(
    folder: Path, name: str, found: Sequence[Ratio], labels: tuple[str, str]
) -> list[Path]:
    """Write a comparison's CSV, and its figure as PNG and SVG, into ``folder``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([f.name for f in fields(Ratio)])
    writer.writerows([_cell(v) for v in astuple(r)] for r in found)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: cannot be written ({error.strerror})") from None
    out = [write_file(folder / f"{name}.csv", text.getvalue())]
    return out + style.save(figure_compare(found, *labels), folder, name)


def arms(
    first: Run, second: Run | None, strategies: Sequence[str] | None
) -> tuple[tuple[str, pd.DataFrame], tuple[str, pd.DataFrame]]:
    """Return the two sides of a comparison, each its name and rows.

    Raises
    ------
    RunError
        When one folder is given without two of its strategies, or a strategy is not there.
    """
    runs = (first, second or first)
    if not strategies:
        if second is None:
            raise RunError("one run given; allowed: two runs, or one and --strategies X Y")
        if first.folder.resolve() == second.folder.resolve():
            raise RunError("the same run twice; allowed: two runs, or one and --strategies X Y")
        return (first.run_id, first.rows), (second.run_id, second.rows)
    same = second is None or first.folder.resolve() == second.folder.resolve()
    if same and strategies[0] == strategies[1]:
        twice = " ".join(clean(s) for s in strategies)
        raise RunError(f"--strategies {twice}: allowed: two different ones of one run")
    sides = []
    for run, strategy in zip(runs, strategies, strict=True):
        rows = run.rows[run.rows["strategy"] == strategy]
        if rows.empty:
            have = ", ".join(sorted(run.rows["strategy"].unique()))
            raise RunError(f"--strategies {clean(strategy)}: not in {run.run_id}; allowed: {have}")
        sides.append((strategy if second is None else f"{run.run_id} {strategy}", rows))
    return sides[0], sides[1]


@ends_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write a comparison; 0, 1 when no cell can be compared, or 2 for bad input."""
    options = _parser().parse_args(arguments)
    try:
        if len(options.runs) > 2:
            raise RunError(f"{len(options.runs)} runs given; allowed: one or two")
        runs = [load_run(folder) for folder in options.runs]
        text, found, names = compare(runs, options.strategies)
        folder = Path(options.out)
        slug = re.sub(r"[^A-Za-z0-9_-]+", "-", f"compare_{names[0]}_{names[1]}")[:120]
        if not found:
            print(text)
            print(f"harness.compare: {nothing_in_common(*names)}", file=sys.stderr)
            return 1
        paths = write_comparison(folder, slug, found, names)
    except RunError as error:
        print(f"harness.compare: {error}", file=sys.stderr)
        return 2
    print("\n".join([text, *map(str, paths)]))
    return 0


def nothing_in_common(a: str, b: str) -> str:
    """Return why there is no ratio."""
    measured = ", ".join(METRICS.values())
    return f"{a} and {b}: no cell is ok in both with the same figure measured ({measured})"


def apart_line(pairs: Pairs, most: int = 3) -> str:
    """Return what keeps the trials of A without a partner from those of B that are nearest."""
    shown = [f"{clean(key)} ({count})" for key, count in list(pairs.apart.items())[:most]]
    return "trials of A differ from the nearest of B in " + ", ".join(shown)


def compare(
    runs: Sequence[Run], strategies: Sequence[str] | None = None
) -> tuple[str, list[Ratio], tuple[str, str]]:
    """Compare one or two runs.

    Parameters
    ----------
    runs : sequence of Run
        A and B, or one run of which two strategies are compared.
    strategies : sequence of str, optional
        Of A and of B.

    Returns
    -------
    tuple
        The text that is printed, the ratios (none when no cell is ok in both), and the names of A
        and B.

    Raises
    ------
    RunError
        When there is nothing to compare.
    """
    first, second = runs[0], runs[1] if len(runs) > 1 else None
    (name_a, rows_a), (name_b, rows_b) = arms(first, second, strategies)
    pairs = pair(rows_a, rows_b)
    if pairs.both.empty:
        why = f" ({apart_line(pairs)})" if pairs.apart else ""
        raise RunError(f"{name_a} and {name_b} share no cell{why}; allowed: runs of the same cells")
    found = ratios(pairs)
    on_host = is_scale_model(rows_a) or is_scale_model(rows_b)
    parts = [f"{SCALE_NOTE}\n"] if on_host else []
    parts += [
        table.text({"A": 40, "B": 40}) + "\n"
        for table in (changed_table(pairs, first, second or first), end_table(pairs))
        if table.rows
    ]
    if found:
        table = ratio_table(found, name_a, name_b)
        parts.append(table.text({"at the 2 % gate": 36, "cell": 40}))
    parts.append(f"{len(pairs.both)} pairs; without one: {pairs.only_a} of A, {pairs.only_b} of B.")
    if pairs.apart:
        parts.append(f"{apart_line(pairs)}.")
    return "\n".join(parts), found, (name_a, name_b)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m harness.compare",
        description="Compare two runs (of two commits, say), or two strategies of one run: paired "
        "ratios with confidence intervals, what changed, what is significant at the 2 % gate.",
        epilog=f"Writes compare_*.csv, .png and .svg into {OUT}. Exit status: 0; 1 when not one "
        "cell can be compared; 2 for bad input.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="A, or A and B: runs' folders")
    parser.add_argument(
        "--strategies", nargs=2, metavar=("X", "Y"), help="compare strategy X (of A) with Y (of B)"
    )
    parser.add_argument("--out", metavar="DIR", default=OUT, help=f"write there (default {OUT})")
    return parser


def _end(row: pd.Series, side: str) -> str:
    where = place_name(row[f"oom_phase_{side}"], row[f"oom_allocation_{side}"])
    return f"{row[f'status_{side}']}{f' in {where}' if where else ''}"


def _differences(a: dict[str, Any], b: dict[str, Any], prefix: str) -> list[tuple[str, str, str]]:
    both = {k: (_said(a.get(k)), _said(b.get(k))) for k in dict.fromkeys([*a, *b])}
    return [(f"{prefix}{clean(k)}", *said) for k, said in both.items() if said[0] != said[1]]


def _said(value: Any) -> str:  # noqa: ANN401
    return EMPTY if value is None else clean(value) or EMPTY


def _flat(run: Run) -> dict[str, Any]:
    """Return config.yaml as dotted keys and their text, read by its indentation only.

    It is not parsed as YAML: a stranger's file can hold aliases that expand without end.
    """
    path = run.folder / "config.yaml"
    if not path.exists():
        return {}
    out: dict[str, Any] = {}
    stack: list[tuple[int, str]] = []
    items: dict[str, int] = {}
    for line in read_text(path, run.folder).splitlines():
        match = re.fullmatch(r"( *)(- )?([\w.-]+):(?: (.*))?", line)
        if not match:
            continue
        indent = len(match[1])
        # An item's dash may stand at its list's own indent.
        stack = [
            (n, k) for n, k in stack if n < indent or (match[2] and n == indent and k[0] != "[")
        ]
        if match[2]:
            above = ".".join(k for _, k in stack)
            items[above] = items.get(above, -1) + 1
            stack.append((indent, f"[{items[above]}]"))
            indent += 2
        stack.append((indent, match[3]))
        if match[4]:
            out[".".join(k for _, k in stack)] = match[4]
    return out


def _cell(value: object) -> object:
    """Return a CSV field; text that a spreadsheet would take for a formula is quoted."""
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return value


if __name__ == "__main__":
    sys.exit(main())
