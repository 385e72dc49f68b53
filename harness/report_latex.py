"""A run's tables, headline numbers and citation for a paper."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness import tables
from harness.latex_table import breakable
from harness.report import title
from harness.rows import Row
from harness.runs import Run, clean, dicts, lookup, write_file
from harness.series import scale
from harness.sources import Sources
from harness.tabular import EMPTY, Table, figure_of, gib, known, latex_text, tokens

_DIGITS = dict(
    zip(
        "0123456789",
        ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"),
        strict=True,
    )
)
POINTS = {"startup": "Startup", "admit": "Admit", "resident": "Resident"}


def write_latex(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Write ``tables.tex``, ``numbers.tex`` and ``run.bib`` into a folder.

    Parameters
    ----------
    folder : Path
    runs : sequence of Run

    Returns
    -------
    list of Path
    """
    pages = [t.latex(f"{letters(run.run_id)}-{n}") for run in runs for n, t in _tables(run)]
    macros = [line for run in runs for line in macro_lines(run, len(runs) > 1)]
    return [
        write_file(folder / "tables.tex", "\n".join(pages)),
        write_file(folder / "numbers.tex", "\n".join(macros) + "\n"),
        write_file(folder / "run.bib", "\n".join(bibtex(run) for run in runs)),
    ]


def _tables(run: Run) -> Iterator[tuple[str, Table]]:
    found = {
        "oom": tables.oom_points(run.summary),
        "claims": tables.verdicts(run.summary),
        "trials": tables.sweep(run.rows),
        "planner": tables.planner(run.rows),
    }
    for name, table in found.items():
        if table.rows:
            yield name, table


def macro_lines(run: Run, several: bool = False) -> list[str]:
    r"""Return a ``\newcommand`` for each headline number, with the row that it comes from.

    Names are letters only: ``\kvPagedResidentOk``; the run's id goes in when there are several. Of
    two that would be the same the later one gets ``Again``: TeX stops at a name defined twice.
    """
    prefix = "kv" + (letters(run.run_id) if several else "")
    lines = [f"% {clean(title(run.folder, run.manifest))}"]
    taken: set[str] = set()
    for name, value, source in headline(run):
        if value == EMPTY:
            continue
        while name in taken:
            name += "Again"
        taken.add(name)
        lines.append(rf"\newcommand{{\{prefix}{name}}}{{{latex_text(value)}}} % {clean(source)}")
    return lines


def headline(run: Run) -> Iterator[tuple[str, str, str]]:
    """Yield each headline number: its name in letters, its value, where it stands, its trials."""
    factor = float(scale(run.rows).max())
    sources = Sources(run.rows)

    def told(where: str, trials: list[str]) -> str:
        return f"summary.json {where}" + (f"; trials {' '.join(trials)}" if trials else "")

    for name, one in tables.strategies(run.summary):
        own = letters(name)
        for key, word in POINTS.items():
            for end, suffix in (("ok", "Ok"), ("not_ok", "NotOk")):
                found = lookup(one, key, end)
                trials = sources.end(name, key, found, end == "ok")
                source = told(f"strategies.{name}.{key}.{end}", trials)
                yield f"{own}{word}{suffix}", tables.count(found), source
        peak = lookup(one, "peak_device_bytes")
        if isinstance(peak, (int, float)):
            where = f"strategies.{name}.peak_device_bytes x {factor:g}"
            source = told(where, sources.peak(name, peak))
            yield f"{own}Peak", gib(peak * factor), source
        for entry in dicts(one, "decode"):
            at, rate = (
                lookup(entry, "resident_tokens"),
                lookup(entry, "attention_decode_tokens_per_second"),
            )
            if isinstance(at, (int, float)):
                source = told(f"strategies.{name}.decode at {at:.0f}", sources.decode(name, at))
                yield f"{own}DecodeAt{letters(tokens(at))}", figure_of(rate), source
        yield from _speeds(own, sources.arms.get(name, []))
    for claim in dicts(run.summary, "claims"):
        claimed = clean(lookup(claim, "id", default=""))
        name = f"Claim{letters(claimed)}"
        source = told(f"claims.{claimed}", tables.claim_trials(claim))
        for key, word in (
            ("verdict", "Verdict"),
            ("measured", "Measured"),
            ("reported", "Reported"),
        ):
            verdict = key == "verdict"
            text = tables.value(lookup(claim, key)) if verdict else tables.with_unit(claim, key)
            yield f"{name}{word}", text, source
    yield "Trials", str(run.rows["trial_id"].nunique()), "trials.csv"
    yield (
        "Commit",
        clean(lookup(run.manifest, "git", "commit", default=""))[:12] or EMPTY,
        "manifest",
    )


# What is told of an arm at each length that it was timed at: the column, its unit's factor, a word.
SPEEDS = (
    ("attention_decode_step_ms", 1.0, "DecodeMs"),
    ("attention_decode_bytes_per_second", 1e-12, "DecodeTerabytes"),
    ("attention_prefill_chunk_ms", 1.0, "PrefillMs"),
    ("attention_prefill_flops_per_second", 1e-12, "PrefillTeraflops"),
)


def _speeds(own: str, rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Yield an arm's times, TB/s and TFLOP/s: medians over its trials of a length."""
    for column, factor, word in SPEEDS:
        timed = [r for r in rows if r["status"] == "ok" and known(r.get(column))]
        for at in sorted({int(r["resident_tokens"]) for r in timed}):
            those = [r for r in timed if r["resident_tokens"] == at]
            value = factor * statistics.median(float(r[column]) for r in those)
            trials = " ".join(sorted({str(r["trial_id"]) for r in those}))
            where = f"trials.csv {column} x {factor:g} at {at}; trials {trials}"
            yield f"{own}{word}At{letters(tokens(at))}", figure_of(value, 4), where


def letters(text: str) -> str:
    """Return text as CamelCase letters, digits spelled: ``eager_pages`` is ``EagerPages``.

    ``2.5M`` is ``TwoPointFiveM``, another name than that of ``25M``.
    """
    pointed = re.sub(r"(?<=[0-9])\.(?=[0-9])", " Point ", text)
    spelled = re.sub(r"[0-9]", lambda m: f" {_DIGITS[m[0]]} ", pointed)
    return "".join(word[0].upper() + word[1:] for word in re.findall(r"[A-Za-z]+", spelled))


def bibtex(run: Run) -> str:
    """Return the BibTeX entry of a run: its id, commit, date and command.

    The note holds what the styles of plain BibTeX have no field for.
    """
    date = clean(lookup(run.manifest, "started_utc", default=""))[:10]
    dated = re.fullmatch(r"(\d{4})-(\d{2})-\d{2}", date)
    commit = clean(lookup(run.manifest, "git", "commit", default=""))
    command = clean(lookup(run.manifest, "command", default=""))
    key = re.sub(r"[^A-Za-z0-9-]+", "-", run.run_id)
    dirty = lookup(run.manifest, "git", "dirty") is True
    notes = [
        f"Run of {date}" if dated else "",
        f"Commit {latex_text(commit)}" if commit else "No commit known",
        "With uncommitted changes" if dirty else "",
        rf"Command: \texttt{{{breakable(latex_text(command))}}}" if command else "",
    ]
    fields = {
        "title": f"{{kv-alloc-bench}} run {latex_text(title(run.folder, run.manifest))}",
        "author": "{The kv-alloc-bench authors}",
        "year": dated[1] if dated else "n.d.",
        "month": str(int(dated[2])) if dated else "",
        "note": ". ".join(n for n in notes if n),
    }
    body = ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items() if v)
    return f"@misc{{kv-alloc-bench-{key},\n{body}\n}}\n"
