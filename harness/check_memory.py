"""Checks of a folder's memory: the meters agree, and peaks follow from the ledger's events."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from harness.check_rules import Result, failed, named, not_applicable, passed
from harness.runs import Run
from harness.sizes import MIB
from harness.summary import ENDED

# What trials of one process, which fills one context further and further, have in common.
OF_A_PROCESS = ("strategy", "arm", "model", "context_tokens", "strategy_options", "repeat")
PEAKS = {"peak_device_bytes": "device_used_bytes", "peak_ledger_bytes": "ledger_bytes"}


def reconciliation(run: Run) -> Result:
    """Check that ledger, torch and the device's meter agree in every row, however it ended."""
    rows = _ours(run.rows)
    ended = rows["status"].isin(ENDED)
    rows = rows[ended | rows["unexplained_bytes"].notna()]  # one that died may have read no meter
    if rows.empty:
        return not_applicable("no measured row")
    floor = rows["scale"].gt(1).map({True: MIB, False: 64 * MIB})
    tolerance = rows["tolerance_bytes"].fillna(
        pd.concat([floor, rows["chunk_bytes"].fillna(0)], axis=1).max(axis=1)
    )
    off = rows["unexplained_bytes"].abs()
    bad = rows[off.isna() | (off > tolerance)]
    if not bad.empty:
        return failed(f"{len(bad)} of {len(rows)} rows beyond tolerance: {named(bad)}")
    peak = rows["peak_device_bytes"]
    for what, more, less in (
        ("the ledger above the device's meter", rows["peak_ledger_bytes"], peak),
        ("more held than the device has", peak, rows["capacity_bytes"]),
        ("more free than the device has", rows["oom_free_bytes"], rows["capacity_bytes"]),
    ):
        bad = rows[more > less + tolerance]
        if not bad.empty:
            return failed(f"{what} in {len(bad)} of {len(rows)} rows: {named(bad)}")
    worst = (off / tolerance).max()
    return passed(f"{len(rows)} rows, at most {100 * worst:.0f} % of the tolerance unexplained")


def events(run: Run) -> Result:
    """Check that each row's peaks, and what is unexplained, are the largest of its events."""
    if run.of_earlier_runs:
        return not_applicable("rows of earlier runs")
    rows = _ours(run.rows)
    rows = rows[rows["peak_device_bytes"].notna()]
    if rows.empty:
        return not_applicable("no measured row")
    bad, without = [], []
    for at, found in _largest(rows, run.timeline):
        row = rows.loc[at]
        if found is None:
            without.append(at)
        elif not _follows(row, found):
            bad.append(at)
    if without:
        return failed(f"{len(without)} rows without events: {named(rows.loc[without])}")
    if bad:
        return failed(f"{len(bad)} rows whose peaks no event has: {named(rows.loc[bad])}")
    return passed(f"peaks of {len(rows)} rows are the largest of their ledger events")


def _ours(rows: pd.DataFrame) -> pd.DataFrame:
    """Measured rows of trials that keep a ledger: an engine itself keeps none."""
    return rows[(rows["basis"] != "planned") & (rows["engine_version"] == "")]


def _largest(
    rows: pd.DataFrame, timeline: pd.DataFrame
) -> Iterator[tuple[object, pd.Series | None]]:
    """Of each row's index the largest readings of its process up to then; None without events."""
    by_trial = _readings(timeline)
    for _, of_rank in rows.groupby("rank", sort=False):
        held: pd.Series | None = None
        process: tuple[object, ...] = ()
        for at, row in of_rank.iterrows():
            own = by_trial.get((row["trial_id"], row["rank"]))
            same = tuple(row[c] for c in OF_A_PROCESS)
            # A process begins with its context; its later rows may add no event.
            if own is not None and own["begins"]:
                held = None
            elif same != process:
                held, own = None, None
            process = same
            if own is not None:
                now = own.drop("begins")
                held = now if held is None else pd.concat([held, now], axis=1).max(axis=1)
            yield at, None if held is None else _as_stated(held, row)


def _readings(timeline: pd.DataFrame) -> dict[tuple[object, object], pd.Series]:
    """The largest readings of each trial's rank, and whether they begin with its context."""
    cached = timeline["torch_reserved_bytes"] - timeline["torch_requested_bytes"]
    no_torch = timeline["torch_reserved_bytes"].isna()
    off = timeline["device_used_bytes"] - cached.mask(no_torch, 0) - timeline["ledger_bytes"]
    table = timeline.assign(
        unexplained_bytes=off.abs(),
        begins=timeline["phase"] == "context",
        **{row: timeline[event] for row, event in PEAKS.items()},
    )
    columns = [*PEAKS, "unexplained_bytes", "begins"]
    found = table.groupby(["trial_id", "rank"])[columns].max()
    return {key: one for key, (_, one) in zip(found.index, found.iterrows(), strict=True)}


def _follows(row: pd.Series, found: pd.Series) -> bool:
    """Whether what a row states is what its events say; older timelines do not tell torch's use."""
    stated = [c for c in (*PEAKS, *found.index) if row[c] == row[c]]
    return all(c in found.index and row[c] == found[c] for c in stated)


def _as_stated(held: pd.Series, row: pd.Series) -> pd.Series:
    """Readings with the sign that the row states, without those that no event has."""
    out = held.dropna()
    if "unexplained_bytes" in out and row["unexplained_bytes"] < 0:
        out["unexplained_bytes"] *= -1
    return out
