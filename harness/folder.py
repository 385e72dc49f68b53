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
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.columns import COLUMNS, TIMELINE_COLUMNS, ordered
from harness.csv_table import append_rows, has_columns, read_rows, rewrite_rows
from harness.ranks_summary import complete
from harness.rows import Row
from harness.safe_text import read_text
from harness.sizes import BadValue

MAX_MANIFEST_BYTES = 64 << 20
# Endings whose output is kept beside the rows, for whoever wants to know why.
LOGGED = ("crash", "timeout", "oom_host")


class FolderError(OSError):
    """The results folder cannot be written: one clear line."""


@dataclass
class Outcome:
    """What a trial left behind: rows, ledger events, raw timings, and what it printed."""

    rows: list[Row]
    timeline: list[Row]
    samples: list[Row]
    log: str = ""


def find_or_create(
    results: Path,
    experiment: str,
    config_hash: str,
    hash_in: Callable[[Path], str] | None = None,
) -> tuple[RunFolder, bool]:
    """The newest unfinished run of this configuration, or a new folder; True when resumed.

    ``hash_in`` hashes the configuration that a folder holds, where the hash in its manifest is
    another one.

    Raises
    ------
    FolderError
        When it cannot be written.
    """
    base = results / experiment
    try:
        base.mkdir(parents=True, exist_ok=True)
        for path in sorted(base.iterdir(), reverse=True):
            found = _resumed(path, config_hash, hash_in)
            if found is not None:
                return found, True
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        for attempt in range(100):
            path = base / (f"{stamp}-{config_hash[:6]}" + (f"-{attempt}" if attempt else ""))
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return RunFolder(path), False
    except OSError as error:
        raise FolderError(f"results={results}: cannot be written ({error.strerror})") from None
    raise FolderError(f"results={results}: no free name for a run")


def _resumed(
    path: Path, config_hash: str, hash_in: Callable[[Path], str] | None
) -> RunFolder | None:
    """An unfinished run of this configuration, mended; None when it is not one that we may take."""
    said = _unfinished(path) if _is_plain(path) else None
    if said is None or (said != config_hash and (hash_in is None or hash_in(path) != config_hash)):
        return None
    try:
        folder = RunFolder(path)
    except OSError:  # another harness, or another user, has it
        return None
    try:
        # It may have ended between the look and the lock; other columns are another version's.
        if _unfinished(path) == said and folder.recover():
            return folder
    except (csv.Error, IsADirectoryError):  # no table of ours
        pass
    folder.close()
    return None


def _is_plain(path: Path) -> bool:
    """Whether it is a folder of plain files and folders: writing there follows no link out of it.

    What is neither, such as a pipe, would be waited for.
    """
    if path.is_symlink() or not path.is_dir():
        return False
    with os.scandir(path) as entries:
        return all(
            e.is_file(follow_symlinks=False) or e.is_dir(follow_symlinks=False) for e in entries
        )


def _unfinished(path: Path) -> str | None:
    """The hash in the manifest of a run that has not ended; None for any other folder."""
    manifest = read_manifest(path)
    said = manifest.get("config_hash")
    return said if isinstance(said, str) and not manifest.get("finished_utc") else None


def read_manifest(path: Path) -> dict[str, Any]:
    """A run's manifest.json as data; empty where there is no plain file with a JSON object."""
    name = "manifest.json"
    try:
        loaded = json.loads(read_text(path / name, name, MAX_MANIFEST_BYTES))
    except (BadValue, OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def write_atomic(path: Path, text: str) -> None:
    """Replace a file whole: readers and a kill see the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class RunFolder:
    """``results/runs/<experiment>/<run id>/``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Held until the process ends, however it ends: two harnesses never share a folder.
        self._lock = open(path / ".lock", "w", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise
        self.rows: list[Row] = []

    def close(self) -> None:
        """Let others have it."""
        self._lock.close()

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
        return read_manifest(self.path)

    def write_json(self, name: str, data: dict[str, Any]) -> None:
        """Replace a JSON file of the folder."""
        self._guard(lambda: write_atomic(self.path / name, _json(data)))

    def write_text(self, name: str, text: str) -> None:
        """Replace a text file of the folder."""
        self._guard(lambda: write_atomic(self.path / name, text))

    def add(self, outcome: Outcome) -> list[Row]:
        """Append a trial's records; the rows last, since they commit it.

        Rows of an earlier run keep its ``run_id``.
        """
        rows = [ordered({"run_id": self.run_id, **r}) for r in outcome.rows]
        timeline = [{"run_id": self.run_id, "rank": 0, **t} for t in outcome.timeline]
        self._guard(lambda: self._append(rows, timeline, outcome))
        self.rows += rows
        shutil.rmtree(self.scratch, ignore_errors=True)
        return rows

    def _append(self, rows: Sequence[Row], timeline: Sequence[Row], outcome: Outcome) -> None:
        for row in rows:
            if row["status"] in LOGGED and outcome.log:
                (self.path / "logs").mkdir(exist_ok=True)
                write_atomic(self.path / "logs" / f"{row['trial_id']}.txt", outcome.log)
        samples = (json.dumps(s) + "\n" for s in outcome.samples)
        append_rows(self.path / "timeline.csv", TIMELINE_COLUMNS, timeline)
        _append_lines(self.path / "samples.jsonl", samples)
        append_rows(self.path / "trials.csv", COLUMNS, rows)

    def _guard(self, write: Any) -> None:  # noqa: ANN401
        try:
            write()
        except OSError as error:
            raise FolderError(f"{self.path}: cannot be written ({error.strerror})") from None

    def recover(self) -> bool:
        """Drop half lines, timeline and samples of trials without a row, and half-written files.

        False, and nothing is touched, when the tables have other columns than this version's.
        """
        trials, timeline = self.path / "trials.csv", self.path / "timeline.csv"
        if not (has_columns(trials, COLUMNS) and has_columns(timeline, TIMELINE_COLUMNS)):
            return False
        shutil.rmtree(self.scratch, ignore_errors=True)
        for left in self.path.glob(".*"):
            if re.fullmatch(r"\..+\.(\d+|new)", left.name):  # was to replace another file
                left.unlink()
        self.rows = complete(read_rows(trials))
        done = {str(r["trial_id"]) for r in self.rows}
        rewrite_rows(trials, COLUMNS, self.rows)
        kept = [t for t in read_rows(timeline) if t["trial_id"] in done]
        rewrite_rows(timeline, TIMELINE_COLUMNS, kept)
        samples = self.path / "samples.jsonl"
        if samples.exists():
            lines = samples.read_text(errors="replace").split("\n")
            write_atomic(samples, "".join(s + "\n" for s in lines if _sample_of(s) in done))
        return True


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1, sort_keys=False) + "\n"


def _sample_of(line: str) -> str:
    try:
        return str(json.loads(line)["trial_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _append_lines(path: Path, lines: Iterable[str]) -> None:
    with open(path, "a", encoding="utf-8") as out:
        out.writelines(lines)
        out.flush()
        os.fsync(out.fileno())
