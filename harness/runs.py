"""A run's folder, read as data: nothing in it is executed, and what is odd is refused in one line.

A folder may come from a stranger. Links that leave it, devices, huge files, numbers that are none
and objects of the wrong shape raise :class:`RunError`, whose message is one clear line.
"""

from __future__ import annotations

import csv
import json
import os
import stat
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.columns import (
    ADDED_LATER,
    COLUMNS,
    OF_ALL_RANKS,
    PERFORMANCE,
    TIMELINE_COLUMNS,
    is_text,
)
from harness.csv_table import parse_lines, whole_lines
from harness.safe_text import at_home

MAX_FILE_BYTES = 512 << 20
SCHEMA = 1
_ALL_COLUMNS = frozenset((*COLUMNS, *TIMELINE_COLUMNS))
REQUIRED_COLUMNS = ("strategy", "context_tokens", "status")


RUN_FILES = "trials.csv, timeline.csv, samples.jsonl, summary.json, manifest.json, config.yaml"


class RunError(ValueError):
    """A folder that cannot be read as a run; the message is one line."""


@dataclass(frozen=True)
class Run:
    """One run: its rows, ledger events, summary and provenance.

    Parameters
    ----------
    folder : Path
    rows : pandas.DataFrame
        ``trials.csv`` with every column of :data:`harness.columns.COLUMNS`; empty text is ``""``,
        an empty number NaN. Bytes are the row's own (times ``scale``: the modelled device's).
    timeline : pandas.DataFrame
        ``timeline.csv`` likewise; empty when the folder has none.
    summary, manifest : dict
    notes : tuple of str
        What reading had to mend: missing columns, a last line cut off by a kill, absent files.
    """

    folder: Path
    rows: pd.DataFrame
    timeline: pd.DataFrame
    summary: dict[str, Any]
    manifest: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def run_id(self) -> str:
        """The run's own name: the manifest's, else the folder's."""
        return clean(lookup(self.manifest, "run_id", default="")) or self.folder.name

    @property
    def of_earlier_runs(self) -> bool:
        """Whether its rows are those of other folders (``claims.from``), judged anew."""
        return rows_of_others(self.rows, self.run_id)

    def samples(self) -> list[dict[str, Any]]:
        """Every raw timing of ``samples.jsonl``, a dict a line; a last line cut off is left out."""
        path = self.folder / "samples.jsonl"
        if not path.exists():
            return []
        lines = whole_lines(read_text(path, self.folder))[0].split("\n")
        return [_object(line, f"{path.name} line {n}") for n, line in enumerate(lines, 1) if line]


def load_run(folder: str | Path) -> Run:
    """Read a run's folder; a relative path is also looked for in the checkout's root.

    Raises
    ------
    RunError
        When there is no such folder, or it holds no readable run.
    """
    path = find_folder(folder)
    if not os.path.lexists(path / "trials.csv"):
        raise RunError(f"{clean(folder)}: no trials.csv; a run's folder holds {RUN_FILES}")
    notes: list[str] = []
    rows = _table(path, "trials.csv", COLUMNS, notes)
    if rows.empty:
        raise RunError(f"{path}: trials.csv has no rows; allowed: the folder of a run with trials")
    timeline = pd.DataFrame(columns=list(TIMELINE_COLUMNS))
    if (path / "timeline.csv").exists():
        timeline = _table(path, "timeline.csv", TIMELINE_COLUMNS, notes)
    else:
        notes.append("timeline.csv is absent")
    summary, manifest = (_json(path, name, notes) for name in ("summary.json", "manifest.json"))
    _check_summary(path, summary)
    return Run(
        path, frame(rows), frame(timeline, TIMELINE_COLUMNS), summary, manifest, tuple(notes)
    )


def load_runs(folders: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """Read the folders that are runs; of each other one, a line that says why it is none."""
    found: list[Run] = []
    faults: list[str] = []
    for folder in folders:
        try:
            found.append(load_run(folder))
        except RunError as error:
            faults.append(str(error))
    return found, faults


def find_folder(folder: str | Path) -> Path:
    """Return the folder as given, else below the checkout's root; ``RunError`` if neither is."""
    given = at_home(folder)
    for path in (given, Path(__file__).resolve().parents[1] / given):
        if os.path.isdir(path):
            return path
    raise RunError(f"{clean(folder)}: no such folder; allowed: a run's folder, with a trials.csv")


def frame(rows: Any, columns: Iterable[str] = COLUMNS) -> pd.DataFrame:  # noqa: ANN401
    """Return rows (a DataFrame or a list of dicts) with every column, each in its kind.

    Text is stripped of control characters, so that a row cannot drive a terminal.

    Raises
    ------
    RunError
        When a number column holds something else.
    """
    out = pd.DataFrame(rows)
    names = [*columns, *(c for c in out.columns if c not in set(columns))]
    out = out.reindex(columns=names).reset_index(drop=True)
    return pd.DataFrame({c: _kind(out[c], str(c)) for c in names}, index=out.index)


def trials(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a trial: of its ranks, the one that ended it, else the one with the highest peak.

    Peaks are the largest, resident tokens the smallest, speeds those of the slowest rank. A trial
    that writes several rows keeps them all.
    """
    rows = frame(rows)
    named = rows[rows["trial_id"] != ""]
    if named.empty or not named.duplicated("trial_id").any():
        return rows
    rows = rows.assign(
        _turn=rows.groupby(["trial_id", "rank"], dropna=False).cumcount(),
        _bad=rows["status"] != "ok",
        _ended=rows["rank"] == rows["failed_rank"],
        _key=rows["trial_id"].where(rows["trial_id"] != "", rows.index.astype(str)),
    )
    out = []
    for _, group in rows.groupby(["_key", "_turn"], sort=False):
        order = group.sort_values(["_bad", "_ended", "peak_device_bytes"], ascending=False)
        row = order.iloc[0].copy()
        row["peak_device_bytes"] = group["peak_device_bytes"].max()
        row["resident_tokens"] = group["resident_tokens"].min()
        slow = group.sort_values("attention_decode_step_ms", ascending=False).iloc[0]
        if not row["_bad"]:
            for name in PERFORMANCE:
                row[name] = slow[name]
            for time, told in OF_ALL_RANKS.items():
                slow = group.sort_values(time, ascending=False).iloc[0]
                for name in (time, *told):
                    row[name] = slow[name]
        out.append(row)
    return frame(pd.DataFrame(out).drop(columns=["_turn", "_bad", "_ended", "_key"]))


def rows_of_others(rows: pd.DataFrame, run_id: str) -> bool:
    """Whether every row names a run, and none this one."""
    named = rows["run_id"]
    return bool(named.ne("").all() and named.ne(run_id).all())


def lookup(data: Any, *path: str, default: Any = None) -> Any:  # noqa: ANN401
    """``data[path[0]][path[1]]...`` of untrusted JSON; ``default`` where a step is missing."""
    for step in path:
        if not isinstance(data, Mapping) or step not in data:
            return default
        data = data[step]
    return data


def dicts(data: Any, *path: str) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the objects of a list at a path of untrusted JSON; what is no object is left out."""
    found = lookup(data, *path)
    return [v for v in found if isinstance(v, dict)] if isinstance(found, list) else []


def clean(text: object) -> str:
    """Text of a stranger on one printable line."""
    return "".join(c if c.isprintable() else " " for c in str(text)).strip()


def read_text(path: Path, folder: Path) -> str:
    """Return a file's text, when it is a plain UTF-8 file that lies inside ``folder``."""
    where = f"{folder.name}/{path.name}"
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            raise RunError(f"{where}: a link out of the run's folder; allowed: a plain file")
        # Non-blocking, so that a pipe in the file's place is refused instead of waited for.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise RunError(f"{where}: not a plain file")
            if status.st_size > MAX_FILE_BYTES:
                raise RunError(f"{where}: {status.st_size} bytes; allowed: up to {MAX_FILE_BYTES}")
            text = file.read().decode("utf-8")
    except OSError as error:
        raise RunError(f"{where}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RunError(f"{where}: not UTF-8 text") from None
    if "\0" in text:
        raise RunError(f"{where}: holds NUL bytes; allowed: text")
    return text


def write_file(path: Path, data: str | bytes) -> Path:
    """Write a file whole or not at all; a link in its place is replaced, never followed.

    Raises
    ------
    RunError
        When the file's folder is a link or cannot be written.
    """
    try:
        if path.parent.is_symlink():
            raise RunError(f"{path.parent.name}: a link; allowed: a folder of the run")
        path.parent.mkdir(exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
            Path(name).chmod(0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror})") from None
    return path


def _table(folder: Path, name: str, columns: tuple[str, ...], notes: list[str]) -> pd.DataFrame:
    where = f"{folder.name}/{name}"
    text, cut = whole_lines(read_text(folder / name, folder))
    if cut:
        notes.append(f"{name}: the last line was cut off and is left out")
    try:
        header, *lines = [line for line in parse_lines(text, strict=True) if line] or [[]]
    except csv.Error as error:
        raise RunError(f"{where}: not a table ({clean(error)})") from None
    if len(set(header)) != len(header):
        raise RunError(f"{where}: a column appears twice")
    missing = [c for c in REQUIRED_COLUMNS if c not in header]
    if name == "trials.csv" and missing:
        raise RunError(f"{where}: no column {missing[0]}; allowed: a table of trials")
    longest = max(map(len, lines), default=0)
    if longest > len(header):
        raise RunError(f"{where}: not a table ({longest} fields under {len(header)} columns)")
    padded = [line + [""] * (len(header) - len(line)) for line in lines]
    out = pd.DataFrame(padded, columns=header, dtype=object)
    absent = [c for c in columns if c not in header and c not in ADDED_LATER]
    if absent:
        notes.append(f"{name}: no column {', '.join(absent)}")
    unknown = [clean(c) for c in header if c not in columns]
    if unknown:
        notes.append(f"{name}: unknown column {', '.join(unknown)}")
    try:
        return frame(out, columns)
    except RunError as error:
        raise RunError(f"{where}: {error}") from None


def _kind(column: pd.Series, name: str) -> np.ndarray:
    if is_text(name) or name not in _ALL_COLUMNS:
        out = np.empty(len(column), dtype=object)
        out[:] = [_text(v) for v in column.to_numpy(dtype=object)]
        return out
    if column.dtype == float:
        numbers: np.ndarray = column.to_numpy()
    else:
        numbers = np.array([_number(v) for v in column.to_numpy(dtype=object)], dtype=float)
    if np.isinf(numbers).any():
        at = int(np.isinf(numbers).argmax())
        raise RunError(f"column {name}, row {at + 1}: {clean(column.iloc[at])!r} is no number")
    return numbers


def _number(value: object) -> float:
    """Return a field as a number; NaN for an empty one, infinity for what is no number."""
    if value is None or value is pd.NA or value in ("", "None", "nan"):
        return float("nan")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return float("inf")


def _text(value: object) -> str:
    if isinstance(value, str) and value.isprintable():
        return value.strip()
    return "" if pd.isna(value) else clean(value)


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else clean(error)
        raise RunError(f"{where}: not JSON ({reason})") from None
    if not isinstance(value, dict):
        raise RunError(f"{where}: not a JSON object")
    return value


def _json(folder: Path, name: str, notes: list[str]) -> dict[str, Any]:
    if not (folder / name).exists():
        notes.append(f"{name} is absent")
        return {}
    value = _object(read_text(folder / name, folder), f"{folder.name}/{name}")
    schema = value.get("schema", SCHEMA)
    if schema != SCHEMA:
        raise RunError(f"{folder.name}/{name}: schema {clean(schema)}; allowed: {SCHEMA}")
    return value


def _check_summary(folder: Path, summary: dict[str, Any]) -> None:
    strategies, claims = summary.get("strategies", {}), summary.get("claims", [])
    if not isinstance(strategies, dict) or not all(
        isinstance(v, dict) for v in strategies.values()
    ):
        raise RunError(f"{folder.name}/summary.json: strategies is no object of objects")
    if not isinstance(claims, list) or not all(isinstance(c, dict) for c in claims):
        raise RunError(f"{folder.name}/summary.json: claims is no list of objects")
