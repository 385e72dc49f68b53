"""The table of what several ranks came to: the extremes, and how far ranks lie apart."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.runs import clean, lookup
from harness.tables import count, strategies, without_empty
from harness.tabular import EMPTY, Table, figure_of, known, scaled_bytes

# What is told, where it stands in an arm's `ranks`, and its column.
FIGURES = (
    ("largest peak", ("largest_peak",), "peak_device_bytes"),
    ("smallest OOM, start-up: context", ("smallest_oom", "startup"), "context_tokens"),
    ("smallest OOM, resident: tokens of the rank", ("smallest_oom", "resident"), "resident_tokens"),
    *(
        (f"slowest {name}", ("slowest", column), column)
        for name, column in (
            ("attention decode step", "attention_decode_step_ms"),
            ("collectives", "collective_ms"),
            ("decode step with collectives", "parallel_decode_step_ms"),
            ("start", "startup_seconds"),
        )
    ),
)
NOTES = (
    "Over every rank of every trial; apart: the smallest and the largest figure of the ranks of "
    "one trial, of that in which they differ most, among those that are ok.",
)


def ranks_table(summary: dict[str, Any], rows: pd.DataFrame) -> Table:
    """Return a line a strategy and figure of a run on several ranks; none for any other run."""
    scales = dict(zip(rows["trial_id"], rows["scale"], strict=True))
    lines = []
    for name, one in strategies(summary):
        found = lookup(one, "ranks")
        for title, path, column in FIGURES:
            extreme = lookup(found, *path)
            # An OOM is of trials that are not ok: no rank of them came as far as it could.
            apart = None if path[0] == "smallest_oom" else lookup(found, "spread", column)
            if not known(lookup(extreme, column)):
                continue
            ends = [_text(column, lookup(apart, k), apart, scales) for k in ("smallest", "largest")]
            lines.append(
                (
                    name,
                    title,
                    _text(column, lookup(extreme, column), extreme, scales),
                    count(lookup(extreme, "rank")),
                    clean(lookup(extreme, "trial_id", default="")) or EMPTY,
                    *ends,
                    clean(lookup(apart, "trial_id", default="")) or EMPTY,
                )
            )
    columns = ("strategy", "figure", ">value", ">rank", "trial", ">apart: from", ">to", "in trial")
    return without_empty(Table("Ranks", columns, tuple(lines), NOTES), keep=columns[:4])


def _text(column: str, value: Any, of: Any, scales: dict[str, float]) -> str:  # noqa: ANN401
    if not known(value):
        return EMPTY
    if column.endswith("_bytes"):
        return scaled_bytes(value, scales.get(clean(lookup(of, "trial_id", default="")), 1))
    if column.endswith("_tokens"):
        return count(value)
    return f"{figure_of(value)} {'ms' if column.endswith('_ms') else 's'}"
