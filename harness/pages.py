"""Figures in Markdown pages, made from rows: ``python -m harness.pages PAGE…``.

A page marks where they belong, what is wanted, and the folders that it comes from, as seen from
the page::

    <!-- rows: sweeps results/reference/h200_report results/reference/h200_qwen3_30b_a3b -->
    <!-- rows: end -->

The first word is one of :data:`SECTIONS`, or of :data:`EXAMPLES`, whose one folder holds no run.
What lies between the two lines is replaced. A test makes the committed pages again and compares.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from harness import check, check_brackets, tables
from harness.arguments import OneLineParser
from harness.closed_pipe import ends_quietly
from harness.engines.section import engines
from harness.page_example import explained
from harness.page_points import NOT_CLOSED, points
from harness.runs import Run, RunError, clean, dicts, load_run, lookup, trials, write_file
from harness.series import is_scale_model, scale
from harness.sizes import GIB, MIB
from harness.tabular import EMPTY, Table, figure_of, known, tokens

MARKED = re.compile(
    r"(<!-- rows: (?!end)(?P<words>[^>]*?) -->\n).*?(<!-- rows: end -->)", re.DOTALL
)


def sweeps(runs: list[Run], folders: list[str]) -> str:
    """A line a configuration: its three OOM points, and what the longest timed row measured.

    Bytes are the modelled device's; the scale model's speeds are left out.
    """
    lines = []
    for run, folder in zip(runs, folders, strict=True):
        faults = check_brackets.found_of(run)
        for name, one in tables.strategies(run.summary):
            own = trials(run.rows)
            own = own[own["strategy"] == name.split(",")[0]]
            timed = own[(own["status"] == "ok") & own["attention_decode_step_ms"].notna()]
            lines.append(
                (
                    Path(folder).name,
                    name,
                    figure_of((own["kv_bytes_per_token"] * scale(own)).iloc[0] / 1024, 3),
                    *(
                        NOT_CLOSED if faults.get((name, point)) else _bracket(one, point)
                        for point in check_brackets.POINTS
                    ),
                    f"{(own['peak_device_bytes'] * scale(own)).max() / GIB:.2f}",
                    *((EMPTY,) * 4 if is_scale_model(own) else _speeds(timed)),
                )
            )
    columns = ("run", "strategy", ">KiB a token", ">start-up", ">admit", ">resident",
               ">peak, GiB", ">timed at", ">decode, ms", ">TB/s", ">prefill, TFLOP/s")  # fmt: skip
    return Table("", columns, tuple(lines)).markdown()


def _bracket(one: dict[str, Any], point: str) -> str:
    ok, bad = lookup(one, point, "ok"), lookup(one, point, "not_ok")
    upper = f" – {bad:,}" if bad else ", no failure"
    return EMPTY if not known(ok) else (f"{ok:,}" if bad else tokens(ok)) + upper


def _speeds(timed: pd.DataFrame) -> tuple[str, str, str, str]:
    if timed.empty:
        return (EMPTY,) * 4
    longest = timed[timed["resident_tokens"] == timed["resident_tokens"].max()]

    def median(column: str, factor: float) -> str:
        return figure_of(longest[column].median() * factor, 4)

    return (
        tokens(longest["resident_tokens"].iloc[0]),
        median("attention_decode_step_ms", 1.0),
        median("attention_decode_bytes_per_second", 1e-12),
        median("attention_prefill_flops_per_second", 1e-12),
    )


def claims(runs: list[Run], folders: list[str]) -> str:
    """Every verdict: what was claimed, what was measured, under which condition, on which basis."""
    lines = [
        (
            clean(lookup(c, "id")),
            clean(lookup(c, "claim")),
            clean(lookup(c, "verdict")),
            clean(lookup(c, "condition")),
            clean(lookup(c, "basis")),
        )
        for run in runs
        for c in dicts(run.summary, "claims")
    ]
    return Table("", ("id", "claim", "verdict", "condition", "basis"), tuple(lines)).markdown()


def trust(runs: list[Run], folders: list[str]) -> str:
    """A line a run: rows, gate errors, what was unexplained, off the plan, the check's word.

    Behind a slash is the figure of rows of engines themselves, which keep no ledger of ours.
    """
    lines = []
    for run, folder in zip(runs, folders, strict=True):
        own = trials(run.rows)
        allowed = own.loc[own["engine_version"] == "", "tolerance_bytes"].max() / MIB
        results = check.check_run(run)
        failed = [name for name, r in results.items() if r.outcome == "fail"]
        lines.append(
            (
                Path(folder).name,
                f"{len(own)}",
                f"{own['gate_error'].notna().sum()}",
                figure_of(own["gate_error"].max(), 2),
                _ours_and_engines(own, _unexplained),
                f"{allowed:.0f}" if known(allowed) else EMPTY,
                _ended_as_planned(own),
                _ours_and_engines(own, _off_peak),
                _ours_and_engines(own, _off_where_it_ended),
                "fails: " + ", ".join(failed) if failed else "passes",
            )
        )
    columns = ("run", ">trials", ">gated", ">largest gate error", ">unexplained, MiB",
               ">allowed", ">ended as planned", ">off the planned peak, %",
               ">off where memory ended, %", "`harness.check`")  # fmt: skip
    return Table("", columns, tuple(lines)).markdown()


def _ours_and_engines(own: pd.DataFrame, figure: Callable[[pd.DataFrame], float]) -> str:
    """The figure of our trials; behind a slash, where there are any, that of engines' starts."""
    engine = own["engine_version"] != ""
    said = [f"{x:.2f}" if known(x) else EMPTY for x in (figure(own[~engine]), figure(own[engine]))]
    return said[0] if said[1] == EMPTY else " / ".join(said)


def _unexplained(own: pd.DataFrame) -> float:
    """The largest, in MiB, however the trial ended."""
    return float(own["unexplained_bytes"].abs().max()) / MIB


def _ended_as_planned(own: pd.DataFrame) -> str:
    """Of the trials with a prediction, those that ended as it says: ok, oom, refused or crash."""
    planned = own[(own["predicted_status"] != "") & (own["basis"] != "planned")]
    as_said = int((planned["predicted_status"] == planned["status"]).sum())
    return f"{as_said} of {len(planned)}" if len(planned) else EMPTY


def _off_peak(own: pd.DataFrame) -> float:
    """Largest deviation of the peak of trials that are ok, as foreseen, in per cent."""
    return _off_percent(own[own["status"] == "ok"])


def _off_where_it_ended(own: pd.DataFrame) -> float:
    """Of what was held when a trial ended for want of memory, by a rule or a fault, as foreseen."""
    return _off_percent(own[own["status"] != "ok"])


def _off_percent(own: pd.DataFrame) -> float:
    both = own[own["peak_device_bytes"].notna() & (own["basis"] != "planned")]
    both = both[(both["status"] == both["predicted_status"]) & (both["predicted_peak_bytes"] > 0)]
    return float((both["peak_device_bytes"] / both["predicted_peak_bytes"] - 1).abs().max() * 100)


SECTIONS: dict[str, Callable[[list[Run], list[str]], str]] = {
    "sweeps": sweeps,
    "claims": claims,
    "trust": trust,
    "points": points,
    "engines": engines,
}


EXAMPLES: dict[str, Callable[[Path, str], str]] = {"explain": explained}


def renewed(page: Path) -> str:
    """The page's text with every marked section made again.

    Raises
    ------
    RunError
            For a section of another name, or a folder that holds no run.
    """

    def made(match: re.Match[str]) -> str:
        name, *folders = match["words"].split()
        if name not in (*SECTIONS, *EXAMPLES):
            raise RunError(f"{page}: rows: {name}: allowed are {', '.join((*SECTIONS, *EXAMPLES))}")
        if name in EXAMPLES:
            if len(folders) != 1:
                raise RunError(f"{page}: rows: {name}: {len(folders)} folders; allowed: one")
            text = EXAMPLES[name](page.parent, folders[0])
        else:
            runs = [load_run(page.parent / folder) for folder in folders]
            text = SECTIONS[name](runs, folders)
        return f"{match[1]}\n{text}\n\n{match[3]}"

    return MARKED.sub(made, page.read_text(encoding="utf-8"))


@ends_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """Rewrite the pages; 0, or 2 for bad input."""
    parser = OneLineParser(
        prog="python -m harness.pages",
        description="Make the marked sections of Markdown pages again from the rows of runs.",
        epilog="Exit status: 0, or 2 for bad input.",
    )
    parser.add_argument("pages", nargs="+", metavar="PAGE", type=Path, help="a Markdown page")
    options = parser.parse_args(arguments)
    try:
        for page in options.pages:
            write_file(page, renewed(page))
    except (RunError, OSError) as error:
        print(f"harness.pages: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
