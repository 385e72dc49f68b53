"""What a run leaves a person with: figures, report.md, and the last words on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import forecast
from harness.folder import RunFolder
from harness.settings import Settings
from harness.sizes import tokens_text

OTHER = {
    "static": "paged",
    "paged": "static",
    "eager_pages": "static",
    "sglang": "vllm",
    "vllm": "sglang",
}


def draw(folder: RunFolder, summary: dict[str, Any], manifest: dict[str, Any]) -> list[Path]:
    """Draw every figure that the rows can make, and write report.md."""
    from harness.plots import draw_run
    from harness.report import write_report_md
    from harness.runs import load_run

    run = load_run(folder.path)
    figures = draw_run(folder.path, run.rows, run.timeline, summary)
    write_report_md(folder.path, run.rows, run.timeline, summary, manifest)
    return figures


def tell(
    folder: RunFolder, settings: list[Settings], summary: dict[str, Any], figures: list[Path]
) -> None:
    """Print the table, the OOM points, the planner on the other strategy, and what to do next."""
    from harness.runs import load_run
    from harness.tables import oom_points_table, sweep_table, verdict_table

    print(f"\n{sweep_table(load_run(folder.path).rows)}")
    print(f"\nOOM points (tokens)\n{oom_points_table(summary)}")
    decided = [c for c in summary["claims"] if c["verdict"] != "undecided"]
    if decided:
        print(f"\nClaims\n{verdict_table({**summary, 'claims': decided})}")
    for line in _of_the_other(settings):
        print(f"\n{line}")
    pictures = [f for f in figures if f.suffix == ".png"]
    if pictures:
        print("\nfigures  " + "\n         ".join(str(f) for f in pictures))
    print(f"report   {folder.path / 'report.md'}")
    print(f"next     {_next_command(settings)}")


def _of_the_other(settings: list[Settings]) -> list[str]:
    """What the planner expects of the strategy that was not run."""
    here = {s.strategy for s in settings}
    first = settings[0]
    other = OTHER[first.strategy]
    if other in here:
        return []
    return [f"planned  {forecast.sentence(first, other)}"]


def _next_command(settings: list[Settings]) -> str:
    first = settings[0]
    other = OTHER[first.strategy]
    context = tokens_text(first.context_tokens).replace(",", "")
    if len({s.strategy for s in settings}) == 1:
        return f"python -m harness -m strategy={first.strategy},{other} context={context}"
    return f"python -m harness experiment=root_cause context={context}"
