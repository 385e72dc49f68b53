"""A CSV that a kill may cut off at any byte: rows are appended, and only whole ones are read."""

from __future__ import annotations

import contextlib
import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from harness.columns import is_text
from harness.rows import Row


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Append rows, after the header in a new file, and wait until they are on the disk."""
    fresh = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if fresh:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell_text(row.get(c)) for c in columns])
        out.flush()
        os.fsync(out.fileno())


def rewrite_rows(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    """Replace a table that exists by these rows, whole or not at all."""
    if path.exists():
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        append_rows(temporary, columns, rows)
        os.replace(temporary, path)


def whole_lines(text: str) -> tuple[str, bool]:
    """Text up to its last line's end, and whether a line after it was cut off."""
    at = text.rfind("\n") + 1
    return text[:at], at < len(text)


def parse_lines(text: str, strict: bool = False) -> list[list[str]]:
    """Fields of every line, the header's first; raises ``csv.Error`` for what is no CSV."""
    return list(csv.reader(io.StringIO(text, newline=""), strict=strict))


def has_columns(path: Path, columns: Sequence[str]) -> bool:
    """Whether a table has these columns; one without a header is as good as none."""
    lines = _lines(path)
    return not lines or tuple(lines[0]) == tuple(columns)


def read_rows(path: Path) -> list[Row]:
    """Whole rows only: one that a kill cut off, or a crash of the machine damaged, is left out.

    Such a row has too few fields, no end, or no number where there should be one.
    """
    header, *lines = _lines(path) or [[]]
    found = []
    for line in lines:
        if len(line) == len(header):
            with contextlib.suppress(ValueError):
                found.append({c: parse_field(c, v) for c, v in zip(header, line, strict=True)})
    return found


def parse_field(column: str, text: str) -> object:
    """A field of a CSV as it was: None, text, or a number."""
    if text == "":
        return None
    if is_text(column):
        return text
    try:
        return int(text)
    except ValueError:
        return float(text)


def _lines(path: Path) -> list[list[str]]:
    if not path.exists():
        return []
    text, _ = whole_lines(path.read_text(encoding="utf-8", errors="replace"))
    return parse_lines(text)


def _cell_text(value: object) -> object:
    """A field of a CSV: a row is one line, so that half of one is seen."""
    if value is None:
        return ""
    if isinstance(value, str):
        return "".join(c if c.isprintable() else " " for c in value)
    return repr(value) if isinstance(value, float) else value
