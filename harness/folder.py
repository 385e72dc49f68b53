"""A run's folder: created once, appended to as trials end, resumed after a kill, never overwritten.

The commit point of a trial is its line in trials.csv: timeline and samples go first, and what a
kill leaves behind of them without a row is dropped at the next start.
"""

from __future__ import annotations

import contextlib
import csv
import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.columns import COLUMNS, TIMELINE_COLUMNS, ordered
from harness.launch import Outcome
from harness.rows import Row

SCHEMA = 1


class FolderError(OSError):
    """The results folder cannot be written: one clear line."""


def find_or_create(results: Path, experiment: str, config_hash: str) -> tuple[RunFolder, bool]:
    """The newest unfinished run of this configuration, or a new folder; True when resumed."""
    base = results / experiment
    try:
        base.mkdir(parents=True, exist_ok=True)
        for path in sorted(base.iterdir(), reverse=True):
            manifest = _read_manifest(path)
            if manifest.get("config_hash") == config_hash and not manifest.get("finished_utc"):
                with contextlib.suppress(BlockingIOError):  # another harness is at work in it
                    return RunFolder(path, resumed=True), True
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        for attempt in range(100):
            path = base / (f"{stamp}-{config_hash[:6]}" + (f"-{attempt}" if attempt else ""))
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return RunFolder(path), False
    except OSError as error:
        raise FolderError(f"results={results}: cannot be written ({error.strerror})") from None
    raise FolderError(f"results={results}: no free name for a run")


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """Replace a file whole: readers and a kill see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


class RunFolder:
    """``results/runs/<experiment>/<run id>/``."""

    def __init__(self, path: Path, resumed: bool = False) -> None:
        self.path = path
        # Held until the process ends, however it ends: two harnesses never share a folder.
        self._lock = open(path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.rows: list[Row] = []
        if resumed:
            self._recover()

    @property
    def run_id(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def scratch(self) -> Path:
        """Where the trial in hand keeps its spec, records and log."""
        return self.path / ".trial"

    def manifest(self) -> dict[str, Any]:
        """The manifest as it stands."""
        return _read_manifest(self.path)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest."""
        self._guard(lambda: write_atomic(self.path / "manifest.json", _json(manifest)))

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replace another JSON file of the folder."""
        self._guard(lambda: write_atomic(self.path / name, _json(data)))

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file of the folder."""
        self._guard(lambda: write_atomic(self.path / name, text))

    def done(self) -> set[str]:
        """Identities of the trials whose rows are safe."""
        return {str(r["trial_id"]) for r in self.rows}

    def add(self, outcome: Outcome) -> list[Row]:
        """Append a trial's records; the rows last, since they commit it."""
        rows = [ordered({**r, "run_id": self.run_id}) for r in outcome.rows]
        timeline = [
            {**t, "run_id": self.run_id, "rank": t.get("rank", 0)} for t in outcome.timeline
        ]
        self._guard(lambda: self._append(rows, timeline, outcome.samples))
        self.rows += rows
        shutil.rmtree(self.scratch, ignore_errors=True)
        return rows

    def _append(self, rows: Sequence[Row], timeline: Sequence[Row], samples: Sequence[Row]) -> None:
        _append_csv(self.path / "timeline.csv", TIMELINE_COLUMNS, timeline)
        _append_lines(self.path / "samples.jsonl", (json.dumps(s) + "\n" for s in samples))
        _append_csv(self.path / "trials.csv", COLUMNS, rows)

    def _guard(self, write: Any) -> None:  # noqa: ANN401
        try:
            write()
        except OSError as error:
            raise FolderError(f"{self.path}: cannot be written ({error.strerror})") from None

    def _recover(self) -> None:
        """Drop half lines, and timeline and samples of trials that have no row."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.rows = _read_csv(self.path / "trials.csv", COLUMNS)
        done = self.done()
        _rewrite_csv(self.path / "trials.csv", COLUMNS, self.rows)
        timeline = _read_csv(self.path / "timeline.csv", TIMELINE_COLUMNS)
        kept = [t for t in timeline if t["trial_id"] in done]
        _rewrite_csv(self.path / "timeline.csv", TIMELINE_COLUMNS, kept)
        samples = self.path / "samples.jsonl"
        if samples.exists():
            lines = samples.read_text(errors="replace").splitlines()
            write_atomic(samples, "".join(s + "\n" for s in lines if _sample_of(s) in done))


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=False) + "\n"


def _sample_of(line: str) -> str:
    try:
        return str(json.loads(line)["trial_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _cell_text(value: object) -> object:
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else value


def _append_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    fresh = not path.exists() or path.stat().st_size == 0
    with open(path, "a", newline="", encoding="utf-8") as out:
        writer = csv.writer(out, lineterminator="\n")
        if fresh:
            writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell_text(row.get(c)) for c in columns])
        out.flush()
        os.fsync(out.fileno())


def _append_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "a", encoding="utf-8") as out:
        out.writelines(lines)
        out.flush()
        os.fsync(out.fileno())


def _rewrite_csv(path: Path, columns: Sequence[str], rows: Iterable[Row]) -> None:
    if path.exists():
        temporary = path.with_name(f".{path.name}.new")
        temporary.unlink(missing_ok=True)
        _append_csv(temporary, columns, rows)
        os.replace(temporary, path)


def _read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """Whole rows only: a line cut off by a kill has too few fields, or no end."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    whole = text[: text.rfind("\n") + 1]
    lines = list(csv.reader(whole.splitlines(keepends=True)))
    if not lines or tuple(lines[0]) != tuple(columns):
        return []
    return [
        {c: parse_field(c, v) for c, v in zip(columns, line, strict=True)}
        for line in lines[1:]
        if len(line) == len(columns)
    ]


def parse_field(column: str, text: str) -> object:
    """A field of a CSV as it was: None, text, or a number."""
    from harness.columns import is_text

    if text == "":
        return None
    if is_text(column):
        return text
    try:
        return int(text)
    except ValueError:
        return float(text)
