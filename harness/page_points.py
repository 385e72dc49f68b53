"""OOM points side by side: what formulas say of a run's own settings, and what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from yaml import YAMLError  # type: ignore[import-untyped]

from harness import check_brackets, forecast, tables
from harness.check_brackets import POINTS
from harness.planner_engines import ENGINES
from harness.planner_spec import OomPoint, OomPoints
from harness.provenance import settings_in
from harness.runs import Run, RunError, clean, lookup
from harness.settings import Settings
from harness.tabular import EMPTY, Table, known, tokens

NOT_CLOSED = "not closed"


def points(runs: list[Run], folders: list[str]) -> str:
    """A line a configuration whose brackets were closed: each point predicted and measured.

    A measured point is the largest that was ok. The difference is that of a prediction to the
    nearer end of its bracket, none within it; the largest of the three. A point that
    :mod:`harness.check` finds a fault with is none: the table says so, and a line below it why.
    """
    lines, notes = [], []
    for run, folder in zip(runs, folders, strict=True):
        faults = check_brackets.found_of(run)
        for settings, planned, (name, one) in _planned(run):
            line, offs, wrong = [Path(folder).name, name], [], []
            for point in POINTS:
                expected: OomPoint = getattr(planned, point)
                said = _over_all_ranks(settings, expected)
                ok, not_ok = lookup(one, point, "ok"), lookup(one, point, "not_ok")
                found = faults.get((name, point), [])
                wrong += [f"{point}: {fault}" for fault in found]
                line += [_end(said, expected.not_ok), NOT_CLOSED if found else _end(ok, not_ok)]
                offs += [] if found else [off_percent(said, ok, not_ok)]
            notes += [f"{Path(folder).name}, {name}: {'; '.join(wrong)}."] if wrong else []
            lines.append((*line, f"{max(offs):.2f}" if offs else EMPTY))
    heads = (
        f">{name}, {what}"
        for name in ("start-up", "admit", "resident")
        for what in ("planned", "measured")
    )
    return Table("", ("run", "strategy", *heads, ">off, %"), tuple(lines), tuple(notes)).markdown()


def _planned(run: Run) -> list[tuple[Settings, OomPoints, tuple[str, dict[str, Any]]]]:
    """Of every arm with brackets its settings, the planner's points, and the summary's entry.

    The settings are those of ``config.yaml``, which is read as data. Emulations of engines are left
    out: they allocated what the formulas said then. Engines themselves are what those are held to.

    Raises
    ------
    RunError
        When it holds none, or not one for each arm of the summary.
    """
    where, arms = f"{run.folder.name}/config.yaml", tables.strategies(run.summary)
    try:
        made = settings_in(run.folder)
        if len(made) != len(arms):
            raise RunError(f"{where}: {len(made)} arms; allowed: {len(arms)}, as in summary.json")
        return [
            (s, forecast.points(s), arm)
            for s, arm in zip(made, arms, strict=True)
            if s.brackets and s.strategy not in ENGINES
        ]
    except RunError:
        raise
    except (
        *(AttributeError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError),
        *(OSError, YAMLError),
    ) as error:
        raise RunError(f"{where}: no settings of a run ({clean(error)[:200]})") from None


def _over_all_ranks(settings: Settings, planned: OomPoint) -> int | None:
    if planned.ok is None:
        return None
    return settings.all_tokens(planned.ok) if planned.not_ok else settings.context_tokens


def off_percent(said: int | None, ok: int | None, not_ok: int | None) -> float:
    """How far a prediction lies outside a bracket, in per cent of its lower end."""
    if not ok:
        return 0.0
    if not said:
        return 100.0
    if said < ok:
        return 100 * (ok - said) / ok
    return 100 * max(0, said - not_ok) / ok if not_ok else 0.0


def _end(ok: int | None, not_ok: int | None) -> str:
    if not known(ok) or ok is None:
        return EMPTY
    return f"{ok:,}" if not_ok else f"{tokens(ok)}, no failure"
