"""What a run leaves a person with: figures, report.md, and the last words on the terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from harness import forecast
from harness.folder import FolderError, RunFolder
from harness.phases import phase_name
from harness.ranks_scaling import scaling_table
from harness.ranks_summary import on_rank, per_trial
from harness.rows import Row, own_crash
from harness.settings import Settings
from harness.sizes import gib, mib, tokens_text

DIED = ("crash", "timeout", "oom_host", "invalid")
MAX_WARNINGS = 10

# Experiments whose context is a question of its own: other ones have it for their workload's sake.
OF_CONTEXTS = ("sweep", "headline")
LONG_TOKENS = 1_000_000  # root_cause runs this and shorter contexts anyway
LONGEST = "10M"

OTHER = {
    "static": "paged",
    "paged": "static",
    "eager_pages": "static",
    "sglang": "vllm",
    "vllm": "sglang",
}


def draw(folder: RunFolder, summary: dict[str, Any], manifest: dict[str, Any]) -> list[Path]:
    """Draw every figure that the rows can make, and write report.md."""
    from harness.plots import draw_judged, draw_run
    from harness.report import write_report_md
    from harness.runs import RunError, load_run

    try:
        run = load_run(folder.path)
        try:
            if run.of_earlier_runs:
                figures = draw_judged(folder.path, summary)
            else:
                figures = draw_run(folder.path, run.rows, run.timeline, summary)
        except RunError as error:
            if "cannot be drawn" not in str(error):
                raise
            # Rows that no figure can show are still a result.
            print(f"\nwarning  {error}")
            figures = []
        write_report_md(folder.path, run.rows, run.timeline, summary, manifest)
    except (RunError, OSError) as error:
        raise FolderError(f"{folder.path}: no report ({error})") from None
    return figures


def tell(
    folder: RunFolder, settings: list[Settings], summary: dict[str, Any], figures: list[Path]
) -> None:
    """Print the table, the OOM points, the planner on the other strategy, and what to do next."""
    from harness.runs import load_run
    from harness.tables import oom_points_table, sweep_table, verdict_table

    print(f"\n{sweep_table(load_run(folder.path).rows)}")
    print(f"\nOOM points (tokens)\n{oom_points_table(summary)}")
    scaled = scaling_table(folder.rows)
    if scaled.rows:
        print(f"\n{scaled.text()}")
    decided = [c for c in summary["claims"] if c["verdict"] != "undecided"]
    # What formulas alone decide is no news after a sweep.
    if settings[0].experiment != "claims":
        decided = [c for c in decided if c["trials"]]
    if decided:
        print(f"\nClaims\n{verdict_table({**summary, 'claims': decided})}")
    open_ = [c["id"] for c in summary["claims"] if c["verdict"] == "undecided"]
    if open_:
        print(f"\n{len(open_)} undecided: {', '.join(open_)}; report.md says what to run")
    for line in warnings(per_trial(folder.rows)) + _of_the_other(settings):
        print(f"\n{line}")
    pictures = [f for f in figures if f.suffix == ".png"]
    if pictures:
        print("\nfigures  " + "\n         ".join(str(f) for f in pictures))
    print(f"report   {folder.path / 'report.md'}")
    print(f"next     {next_command(folder.path, settings)}")


def warnings(rows: list[Row]) -> list[str]:
    """A line for each row that nobody should rely on: what is unexplained, and what died."""
    lines = []
    for row in rows:
        off, allowed = row.get("unexplained_bytes"), row.get("tolerance_bytes")
        size = mib if row["basis"] == "scale_model" else gib
        where = f"{row['strategy']} {tokens_text(row['context_tokens'])} x {row['fill']:.0%}"
        if off is not None and allowed is not None and abs(off) > allowed:
            lines.append(
                f"warning  {where}: {size(off)} unexplained since phase "
                f"{row['unexplained_phase']}, more than the tolerance of {size(allowed)}: the "
                "ledger does not know all that the device holds"
            )
        if row["status"] in DIED and not own_crash(row):
            why = row.get("signal") or row.get("error") or "no reason is known"
            phase = phase_name(row.get("oom_phase")) or "no phase that is known"
            lines.append(f"warning  {where}: {row['status']}{on_rank(row)} in {phase} ({why})")
    if len(lines) > MAX_WARNINGS:
        lines[MAX_WARNINGS:] = [f"warning  and {len(lines) - MAX_WARNINGS} more, in trials.csv"]
    return lines


def _of_the_other(settings: list[Settings]) -> list[str]:
    """What the planner expects of the strategy that was not run."""
    first = settings[0]
    other = OTHER[first.strategy]
    if first.claims_from or other in {s.strategy for s in settings}:
        return []
    try:
        return [f"planned  {forecast.sentence(first, other)}"]
    except ValueError as error:  # a model or a size that the other strategy does not take
        return [f"planned  {other}: {error}"]


def next_command(folder: Path, settings: list[Settings]) -> str:
    """The other strategy with the same words; after both, the engines; after those, the claims."""
    first = settings[0]
    other = OTHER[first.strategy]
    context = tokens_text(first.context_tokens).replace(",", "")
    if first.experiment == "sweep" and {s.strategy for s in settings} == {first.strategy}:
        own = [w for w in first.overrides if not w.startswith(("strategy", "context="))]
        words = [f"strategy={first.strategy},{other}", f"context={context}", *own]
        return f"python -m harness -m {shlex.join(words)}"
    if first.experiment == "claims":
        return f"python -m harness.report {shlex.quote(str(folder))}"
    if first.experiment in ("root_cause", "real_engines"):
        return "python -m harness experiment=claims"
    if first.experiment not in OF_CONTEXTS or first.context_tokens <= LONG_TOKENS:
        context = LONGEST
    return f"python -m harness experiment=root_cause context={context}"
