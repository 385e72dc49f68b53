"""Write the tables of a result file into Markdown pages: ``python -m bench.table CSV PAGE...``.

A page has two marker lines; what lies between them is replaced::

    <!-- bench.table: begin -->
    <!-- bench.table: end -->
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path

from bench.manifest import cited

BEGIN, END = "<!-- bench.table: begin -->", "<!-- bench.table: end -->"
PEERS = ("FA3", "XQA", "cuDNN")
Row = dict[str, str]


def read(path: Path) -> list[Row]:
    """Rows of a result file, in the order in which they were made."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def figure(row: Row | None, unit: str) -> str:
    """A cell: the figure with its median time, or why there is none."""
    if row is None:
        return "–"
    if not row[unit]:
        return row["gate"].split(":")[0] or "–"
    if unit == "tb_per_s":
        return f"{float(row[unit]):.2f} ({_time(float(row['median_us']))})"
    return f"{float(row[unit]):.0f}"


def _time(us: float) -> str:
    return f"{us:.1f} µs" if us < 10_000 else f"{us / 1000:.2f} ms"


def _table(head: list[str], body: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cells) + " |" for cells in body]


def _pick(rows: list[Row], kernel: str, **want: str) -> Row | None:
    for row in rows:
        if row["kernel"] == kernel and all(row[key] == value for key, value in want.items()):
            return row
    return None


def works(rows: list[Row], start: str) -> list[str]:
    """Names of the works of one kind that have a timing, in order."""
    return list(
        dict.fromkeys(r["work"] for r in rows if r["work"].startswith(start) and r["timing"])
    )


def decode_table(rows: list[Row]) -> list[str]:
    """Decode: bandwidth of one layer's step, with the merge."""
    body = []
    for work in works(rows, "decode"):
        mine = [row for row in rows if row["work"] == work]
        shuffled = _pick(mine, "ours", table_order="shuffled")
        if shuffled is None or "needle" in work:
            continue
        identity = _pick(mine, "ours", table_order="identity")
        body.append(
            [work.removeprefix("decode "), shuffled["target"] or "–"]
            + [figure(shuffled, "tb_per_s"), figure(identity, "tb_per_s")]
            + [figure(_pick(mine, name), "tb_per_s") for name in PEERS[:2]]
            + [shuffled["error"] or "–"]
        )
    head = ["decode", "at least", "shuffled table, TB/s", "identity table", "FA3", "XQA", "error"]
    return _table(head, body)


def prefill_table(rows: list[Row]) -> list[str]:
    """Prefill: useful operations a second, short after a rest and sustained."""
    body = []
    for work in works(rows, "prefill"):
        mine = [row for row in rows if row["work"] == work]
        pairs = {
            name: [_pick(mine, name, timing=timing) for timing in ("short", "sustained")]
            for name in ("ours", "FA3", "cuDNN")
        }
        found = next((row for row in pairs["ours"] if row), None)
        if found is None or "needle" in work:
            continue
        targets = " / ".join((row or {}).get("target") or "–" for row in pairs["ours"])
        cells = [" / ".join(figure(row, "tflop_per_s") for row in pair) for pair in pairs.values()]
        body.append(
            [work.removeprefix("prefill "), targets, *cells, found["variant"], found["error"]]
        )
    head = ["prefill, short / sustained", "at least", "TFLOP/s", "FA3", "cuDNN, no mask", "kernel"]
    return _table([*head, "error"], body)


def other_table(rows: list[Row]) -> list[str]:
    """Append, needles, and the device's own rates."""
    body = []
    for row in rows:
        if row["work"].startswith(("append", "rate")) or "needle" in row["work"]:
            value = row["gate"]
            if row["tflop_per_s"]:
                value = f"{float(row['tflop_per_s']):.0f} TFLOP/s"
            elif row["median_us"]:
                value = f"{float(row['tb_per_s']):.2f} TB/s ({_time(float(row['median_us']))})"
            kernel = row["kernel"] if row["kernel"] == "cast" else ""
            what = " ".join(filter(None, (row["work"], row["variant"], row["timing"], kernel)))
            body.append([what, value, row["gate"], row["note"]])
    return _table(["other", "figure", "gate", ""], body)


def page(rows: list[Row], source: str, provenance: Sequence[str] = ()) -> str:
    """All tables, with what they were measured on; ``provenance``: what its manifest adds."""
    first = rows[0]
    about = [f"One {first['device_name']}", f"torch {first['torch']}", f"Triton {first['triton']}"]
    lines = [f"{', '.join([*about, *provenance])}; medians, from `{source}`.", ""]
    for table in (decode_table(rows), prefill_table(rows), other_table(rows)):
        if len(table) > 2:
            lines += [*table, ""]
    absent = [row for row in rows if row["gate"].startswith(("absent", "not run", "failed"))]
    for row in absent:
        lines.append(f"* {row['work']} {row['kernel']}: {row['gate']}".replace("  ", " "))
    return "\n".join(lines).rstrip() + "\n"


def insert(path: Path, text: str) -> None:
    """Replace what lies between the markers of a page.

    Raises
    ------
    ValueError
        When the page does not have each marker once.
    """
    content = path.read_text()
    if content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ValueError(f"{path}: needs the lines {BEGIN} and {END} once each")
    before, rest = content.split(BEGIN)
    path.write_text(before + BEGIN + "\n\n" + text + "\n" + END + rest.split(END)[1])


def main(words: Sequence[str] | None = None) -> None:
    """Fill the pages."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("pages", type=Path, nargs="+")
    parsed = parser.parse_args(words)
    rows = read(parsed.csv)
    for target in parsed.pages:
        insert(target, page(rows, parsed.csv.as_posix(), cited(parsed.csv)))


if __name__ == "__main__":
    main()
