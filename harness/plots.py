"""Every figure of a run: which can be drawn from its rows, and the files they go to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots_churn import figure_churn, figure_fragmentation
from harness.plots_engines import figure_root_cause
from harness.plots_fractions import figure_mem_fraction
from harness.plots_granularity import figure_granularity
from harness.plots_memory import figure_memory
from harness.plots_phases import figure_phases
from harness.plots_precision import figure_precision
from harness.plots_real import drawable, figure_real_engines
from harness.plots_remedies import figure_remedies
from harness.plots_scaling import figure_capacity_over_ranks
from harness.plots_sharing import figure_waste
from harness.plots_throughput import figure_throughput
from harness.plots_verdicts import figure_verdicts
from harness.runs import Run, dicts, frame

FIGURES_FOLDER = "figures"
ENGINES = ("sglang", "vllm")
RATES = ("attention_decode_tokens_per_second", "attention_prefill_tokens_per_second")
# Experiments that ask a question of their own: only the figures that answer it show their rows. Any
# other one sweeps contexts, and gets the figures of a sweep.
QUESTIONS = {
    "claims": ("verdicts", "root_cause", "mem_fraction"),
    "root_cause": ("root_cause",),
    "real_engines": ("real_engines",),
    "mem_fraction": ("mem_fraction",),
    "waste": ("waste",),
    "fragmentation": ("fragmentation", "churn"),
    "granularity": ("granularity",),
    "precision": ("precision",),
    "remedies": ("remedies",),
    "scaling": ("capacity_over_ranks",),
}
OF_A_SWEEP = (
    "root_cause",
    "memory_against_context",
    "memory_over_phases",
    "throughput",
    "mem_fraction",
)
TITLES = {
    "verdicts": "Verdicts at a glance",
    "memory_against_context": "Memory against configured context",
    "memory_over_phases": "Memory over a trial's phases",
    "throughput": "Attention throughput against resident tokens",
    "real_engines": "The engines themselves beside their emulations",
    "root_cause": "What the engines ask for at start-up",
    "mem_fraction": "A lower memory fraction",
    "waste": "Where KV memory goes, and sequences admitted",
    "fragmentation": "What churn loses, and what it costs",
    "churn": "Committed and live memory over churn",
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

    A figure of ours that lies there and that they cannot make is removed.

    Returns
    -------
    list of Path
        The files, a PNG and an SVG for each figure.
    """
    return _saved(folder, figures(rows, timeline, summary))


def draw_judged(folder: Path, summary: dict[str, Any]) -> list[Path]:
    """The same of a run that judges rows of earlier ones: their figures lie in their folders."""
    return _saved(folder, _of_verdicts(summary))


def _saved(folder: Path, drawn: dict[str, Figure]) -> list[Path]:
    out: list[Path] = []
    for name, figure in drawn.items():
        out += style.save(figure, Path(folder) / FIGURES_FOLDER, name)
    _remove_others(Path(folder) / FIGURES_FOLDER, out)
    return out


def _of_verdicts(summary: dict[str, Any]) -> dict[str, Figure]:
    claims = dicts(summary, "claims")
    return {"verdicts": figure_verdicts(claims)} if claims else {}


def _remove_others(folder: Path, drawn: list[Path]) -> None:
    """Remove what an earlier version drew of these rows; nothing through a link."""
    if folder.is_symlink() or not drawn:
        return
    for name in TITLES:
        for path in (folder / f"{name}.{kind}" for kind in ("png", "svg")):
            if path not in drawn and path.is_file() and not path.is_symlink():
                path.unlink()


def figures_of(run: Run) -> dict[str, Figure]:
    """Draw every figure of a run that was read from its folder; of earlier runs' rows verdicts."""
    if run.of_earlier_runs:
        return _of_verdicts(run.summary)
    return figures(run.rows, run.timeline, run.summary)


def _plan(
    rows: pd.DataFrame, events: pd.DataFrame, summary: dict[str, Any]
) -> list[tuple[str, bool, Callable[[], Figure]]]:
    """Return each figure's name, whether the rows can make it, and how."""

    def of(figure: str) -> pd.DataFrame:
        wanted = [figure in QUESTIONS.get(name, OF_A_SWEEP) for name in rows["experiment"]]
        return rows[pd.Series(wanted, index=rows.index, dtype=bool)]

    def have(part: pd.DataFrame, *columns: str) -> bool:
        return not part.empty and bool(part[list(columns)].notna().any(axis=None))

    beside = of("real_engines")
    real = drawable(beside) if not beside.empty else beside
    engines = of("root_cause")
    engines = engines[engines["strategy"].isin(ENGINES)]
    fractions = of("mem_fraction")
    fractions = fractions[fractions["strategy"].eq("static") & fractions["mem_fraction"].notna()]
    asked = fractions.groupby(["model", "context_tokens"])["mem_fraction"].transform("nunique")
    fractions = fractions[asked > 1]
    judged = dicts(summary, "claims") if not of("verdicts").empty else []
    curves, speeds = of("memory_against_context"), of("throughput")
    waste, churn, grains = of("waste"), of("fragmentation"), of("granularity")
    precision, remedies, scaled = of("precision"), of("remedies"), of("capacity_over_ranks")
    return [
        ("verdicts", bool(judged), lambda: figure_verdicts(judged)),
        ("real_engines", not real.empty, lambda: figure_real_engines(beside, events)),
        ("root_cause", not engines.empty, lambda: figure_root_cause(engines, events)),
        ("memory_against_context", not curves.empty, lambda: figure_memory(curves)),
        ("memory_over_phases", not curves.empty, lambda: figure_phases(curves, events)),
        ("throughput", have(speeds, *RATES), lambda: figure_throughput(speeds)),
        ("mem_fraction", not fractions.empty, lambda: figure_mem_fraction(fractions)),
        ("waste", have(waste, "live_share"), lambda: figure_waste(waste)),
        ("fragmentation", not churn.empty, lambda: figure_fragmentation(churn)),
        ("churn", not churn.empty, lambda: figure_churn(churn, events)),
        ("granularity", not grains.empty, lambda: figure_granularity(grains)),
        ("precision", not precision.empty, lambda: figure_precision(precision)),
        ("remedies", not remedies.empty, lambda: figure_remedies(remedies, summary)),
        ("capacity_over_ranks", not scaled.empty, lambda: figure_capacity_over_ranks(scaled)),
    ]
