"""``python -m harness.check RUN…``: what a reviewer runs before believing a run's folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from harness import (
    check_brackets,
    check_memory,
    check_numbers,
    check_origin,
    check_rules,
    check_summary,
)
from harness.arguments import OneLineParser
from harness.check_rules import Result
from harness.closed_pipe import ends_quietly
from harness.runs import Run, load_runs
from harness.tabular import Table

CHECKS: dict[str, Callable[[Run], Result]] = {
    "schema": check_rules.schema,
    "finished": check_rules.finished,
    "statuses": check_rules.statuses,
    "reconciliation": check_memory.reconciliation,
    "events": check_memory.events,
    "throttling": check_rules.throttling,
    "repeatability": check_numbers.repeatability,
    "brackets": check_brackets.brackets,
    "samples": check_numbers.samples,
    "rates": check_summary.rates,
    "summary": check_summary.summary,
    "tree": check_origin.tree,
    "identity": check_origin.identity,
    "one gpu": check_origin.one_gpu,
    "speeds": check_rules.speeds,
    "gate": check_rules.gate,
    "planner": check_numbers.planner,
}


def check_run(run: Run) -> dict[str, Result]:
    """Apply every check to a run.

    Parameters
    ----------
    run : Run

    Returns
    -------
    dict of str to Result
        By the check's name.
    """
    return {name: check(run) for name, check in CHECKS.items()}


def check_table(run: Run, results: dict[str, Result] | None = None) -> str:
    """Return a line a check for a terminal: its name, how it ended, why."""
    found = check_run(run) if results is None else results
    lines = tuple((name, r.outcome, r.reason) for name, r in found.items())
    return Table(run.folder.name, ("check", "result", "reason"), lines).text({"reason": 76})


@ends_quietly
def main(arguments: Sequence[str] | None = None) -> int:
    """Print each run's checks; 0 when none failed, 1 when one did, 2 for a folder that is none."""
    parser = OneLineParser(
        prog="python -m harness.check",
        description="Check run folders: small named checks, each pass, fail or n.a., and why.",
        epilog="Exit status: 0 no check failed, 1 a check failed, 2 a folder is no run (the "
        "others are checked all the same).",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder")
    options = parser.parse_args(arguments)
    runs, faults = load_runs(options.runs)
    failures = 0
    for run in runs:
        results = check_run(run)
        failures += sum(r.outcome == "fail" for r in results.values())
        print(check_table(run, results))
    for fault in faults:
        print(f"harness.check: {fault}", file=sys.stderr)
    if faults:
        return 2
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
