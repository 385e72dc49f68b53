"""Every figure of a run: which can be drawn from its rows, and the files they go to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots_memory import figure_memory
from harness.plots_phases import figure_phases
from harness.plots_throughput import figure_throughput
from harness.runs import Run, frame

FIGURES_FOLDER = "figures"
TITLES = {
    "memory_against_context": "Memory against configured context",
    "memory_over_phases": "Memory over a trial's phases",
    "throughput": "Attention throughput against resident tokens",
}


def figures(
    rows: pd.DataFrame, timeline: pd.DataFrame | None = None, summary: dict[str, Any] | None = None
) -> dict[str, Figure]:
    """Draw every figure that these rows can make.

    Parameters
    ----------
    rows, timeline : pandas.DataFrame
        Rows of trials.csv and events of timeline.csv.
    summary : dict
        summary.json.

    Returns
    -------
    dict of str to matplotlib.figure.Figure
        By file name, in the order in which a reader wants them.
    """
    rows = frame(rows)
    events = frame(timeline if timeline is not None else [], TIMELINE_COLUMNS)
    out: dict[str, Figure] = {}
    for name, wanted, draw in _plan(rows, events, summary or {}):
        if wanted:
            out[name] = draw()
    return out


def draw_run(
    folder: Path, rows: pd.DataFrame, timeline: pd.DataFrame, summary: dict[str, Any]
) -> list[Path]:
    """Write every figure that these rows can make as PNG and SVG into ``folder/figures``.

    Returns
    -------
    list of Path
        The files, a PNG and an SVG for each figure.
    """
    out: list[Path] = []
    for name, figure in figures(rows, timeline, summary).items():
        out += style.save(figure, Path(folder) / FIGURES_FOLDER, name)
    return out


def figures_of(run: Run) -> dict[str, Figure]:
    """Draw every figure of a run that was read from its folder."""
    return figures(run.rows, run.timeline, run.summary)


def _plan(
    rows: pd.DataFrame, events: pd.DataFrame, summary: dict[str, Any]
) -> list[tuple[str, bool, Callable[[], Figure]]]:
    """Return each figure's name, whether the rows can make it, and how."""
    del summary
    if rows.empty:
        return []
    sweeps = rows[rows["context_tokens"].notna()]
    timed = rows["attention_decode_step_ms"].notna() | rows["attention_prefill_chunk_ms"].notna()
    rated = rows["attention_decode_tokens_per_second"].notna() | (
        rows["attention_prefill_tokens_per_second"].notna()
    )
    return [
        ("memory_against_context", not sweeps.empty, lambda: figure_memory(sweeps)),
        ("memory_over_phases", not sweeps.empty, lambda: figure_phases(sweeps, events)),
        ("throughput", bool((timed | rated).any()), lambda: figure_throughput(rows)),
    ]
