"""Rows of earlier runs, taken as they are: ``claims.from=[RUN,...]`` judges them anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from harness.columns import is_text
from harness.folder import Outcome
from harness.rows import Row
from harness.sizes import BadValue

if TYPE_CHECKING:
    import pandas as pd


def read_runs(folders: Sequence[str], rows_only: bool = False) -> Outcome:
    """Rows, ledger events and timings of runs; of a trial that several hold, the last one's.

    Parameters
    ----------
    folders : sequence of str
    rows_only : bool
        Leave ledger events and timings where they are.

    Raises
    ------
    BadValue
        When one is no folder of a run.
    """
    from harness.runs import RunError, load_run

    rows: dict[tuple[Any, Any], Row] = {}
    timeline: dict[tuple[Any, Any], list[Row]] = {}
    samples: dict[Any, list[Row]] = {}
    for folder in folders:
        try:
            run = load_run(folder)
            own = _records(run.rows)
            events, raw = ([], []) if rows_only else (_records(run.timeline), run.samples())
        except RunError as error:
            raise BadValue("claims.from", folder, f"folders of runs ({error})") from None
        rows |= {_key(r): r for r in own}
        timeline |= _grouped(events, _key)
        samples |= _grouped(raw, lambda sample: sample.get("trial_id"))
    return Outcome(
        list(rows.values()),
        [event for events in timeline.values() for event in events],
        [sample for found in samples.values() for sample in found],
    )


def _grouped(records: Sequence[Row], key: Callable[[Row], Any]) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def without(found: Outcome, rows: Sequence[Row]) -> Outcome:
    """What of an outcome is not among rows that a folder has already."""
    have = {_key(r) for r in rows}
    fresh = [r for r in found.rows if _key(r) not in have]
    keys, ids = {_key(r) for r in fresh}, {r["trial_id"] for r in fresh}
    return Outcome(
        fresh,
        [e for e in found.timeline if _key(e) in keys],
        [s for s in found.samples if s.get("trial_id") in ids],
    )


def _key(row: Row) -> tuple[Any, Any]:
    return row["trial_id"], row.get("rank")


def _records(table: pd.DataFrame) -> list[Row]:
    """A table's rows as a run writes them: None for empty, whole numbers as int."""
    return [{str(c): _plain(str(c), v) for c, v in r.items()} for r in table.to_dict("records")]


def _plain(column: str, value: Any) -> Any:  # noqa: ANN401
    if is_text(column):
        return value or None
    if value is None or value != value:
        return None
    return int(value) if float(value).is_integer() else float(value)
