"""Every figure of a run: which can be drawn from its rows, and the files they go to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots_costs import (
    figure_granularity,
    figure_precision,
    figure_remedies,
)
from harness.plots_engines import figure_mem_fraction, figure_root_cause
from harness.plots_memory import figure_memory
from harness.plots_phases import figure_phases
from harness.plots_real import drawable, figure_real_engines
from harness.plots_scaling import figure_capacity_over_ranks
from harness.plots_sharing import figure_fragmentation, figure_waste
from harness.plots_throughput import figure_throughput
from harness.runs import Run, frame

FIGURES_FOLDER = "figures"
ENGINES = ("sglang", "vllm")
RATES = ("attention_decode_tokens_per_second", "attention_prefill_tokens_per_second")
# Experiments whose rows only their own figure shows.
OWN_FIGURES = (
    "root_cause",
    "real_engines",
    "mem_fraction",
    "waste",
    "fragmentation",
    "granularity",
    "precision",
    "remedies",
    "scaling",
)
TITLES = {
    "memory_against_context": "Memory against configured context",
    "memory_over_phases": "Memory over a trial's phases",
    "throughput": "Attention throughput against resident tokens",
    "real_engines": "The engines themselves beside their emulations",
    "root_cause": "What the engines ask for at start-up",
    "mem_fraction": "A lower memory fraction",
    "waste": "Where KV memory goes, and sequences admitted",
    "fragmentation": "Committed and live memory over churn",
    "granularity": "Page, block and chunk size",
    "precision": "FP8 against BF16",
    "remedies": "How far each remedy moves the OOM points, and its price",
    "capacity_over_ranks": "Capacity and decode step by number of ranks",
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

    def of(*names: str) -> pd.DataFrame:
        return rows[rows["experiment"].isin(names)]

    def have(part: pd.DataFrame, *columns: str) -> bool:
        return not part.empty and bool(part[list(columns)].notna().any(axis=None))

    beside = of("real_engines")
    real = drawable(beside) if not beside.empty else beside
    engine = rows["strategy"].isin(ENGINES) & ~rows["experiment"].eq("real_engines")
    own_question = rows["experiment"].isin(OWN_FIGURES)
    whole = rows["mem_fraction"].isna() | rows["mem_fraction"].eq(1)
    # Start-up at few contexts and many fractions or flags is no curve of memory against context.
    curves = rows[
        ~own_question
        & ((~rows["strategy"].isin(ENGINES) & whole) | ~rows["experiment"].eq("claims"))
    ]
    fractions = rows[rows["strategy"].eq("static") & rows["mem_fraction"].notna()]
    asked = fractions.groupby(["model", "context_tokens"])["mem_fraction"].transform("nunique")
    fractions = fractions[asked > 1]
    waste, churn, precision = of("waste"), of("fragmentation"), of("precision")
    scaled = of("scaling")
    return [
        ("real_engines", not real.empty, lambda: figure_real_engines(beside, events)),
        ("root_cause", bool(engine.any()), lambda: figure_root_cause(rows[engine], events)),
        ("memory_against_context", not curves.empty, lambda: figure_memory(curves)),
        ("memory_over_phases", not curves.empty, lambda: figure_phases(curves, events)),
        ("throughput", have(rows[~own_question], *RATES), lambda: figure_throughput(rows)),
        ("mem_fraction", not fractions.empty, lambda: figure_mem_fraction(fractions)),
        ("waste", have(waste, "live_share"), lambda: figure_waste(waste)),
        ("fragmentation", not churn.empty, lambda: figure_fragmentation(churn, events)),
        ("granularity", not of("granularity").empty, lambda: figure_granularity(of("granularity"))),
        ("precision", not precision.empty, lambda: figure_precision(precision)),
        ("remedies", not of("remedies").empty, lambda: figure_remedies(summary)),
        ("capacity_over_ranks", not scaled.empty, lambda: figure_capacity_over_ranks(scaled)),
    ]
