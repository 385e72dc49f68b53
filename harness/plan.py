"""``python -m harness.plan [group=option] [key=value] [json=true] [-m]``: predict, without running.

Every allocation, how it would end, the three OOM points, the largest context that starts and the
smallest change of flags that helps, from formulas alone; of each arm where there are several, with
a line for each at the end. Exit 0 also when the answer is "does not start"; 2 for bad input, with
one line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from harness.arms import settings_of_command
from harness.cell import Cell
from harness.closed_pipe import ends_quietly
from harness.compose import as_typed
from harness.forecast import cell_spec, check
from harness.planner import largest_context_that_starts, oom_points, predict
from harness.planner_changes import Change, longest_accepted, smallest_change
from harness.planner_engines import ENGINES
from harness.planner_ranks import (
    first_beyond,
    whole_change,
    whole_points,
    whole_prediction,
    whole_spec,
)
from harness.planner_spec import OomPoint, PlanSpec, Prediction
from harness.planner_text import aligned, change_lines, items_table, points_table, verdict
from harness.rows import identity
from harness.settings import Settings
from harness.sizes import BadValue, gib, tokens_text
from harness.summary import arms

USAGE = """usage: python -m harness.plan [group=option] [key=value] [json=true] [-m]

The same words as python -m harness; with -m lists of values (strategy=static,paged) plan each,
and an experiment plans each of its arms.

  python -m harness.plan strategy=sglang context=10M hardware=h200
  python -m harness.plan strategy=sglang strategy.max_running_requests=16
  python -m harness.plan strategy=vllm model=llama4_scout json=true
  python -m harness.plan experiment=scaling model=qwen3_30b_a3b
"""
SCHEMA = 1
# How far beyond the configured context "the largest context that starts" is looked for.
LOOK_BEYOND = 16


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(w in ("-h", "--help") for w in words):
        print(USAGE, end="")
        return 0
    try:
        as_json, words = _take_json(words)
        answers = [Answer(settings) for settings in _all_settings(words)]
        names = names_of(answers)
    except ValueError as refused:
        error = as_typed(refused, words) if isinstance(refused, BadValue) else refused
        print(f"harness.plan: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if as_json:
        print(json.dumps(as_summary(answers, names), indent=1))
        return 0
    for number, answer in enumerate(answers, start=1):
        if len(answers) > 1:
            print(f"{number} of {len(answers)}: {names[number - 1]}")
        print(answer.text(), end="\n\n" if len(answers) > 1 else "\n")
    if len(answers) > 1:
        print(arms_table(answers, names))
    return 0


def _take_json(words: list[str]) -> tuple[bool, list[str]]:
    as_json, rest = False, []
    for word in words:
        key, _, value = word.partition("=")
        if key != "json":
            rest.append(word)
        elif value in ("true", "false"):
            as_json = value == "true"
        else:
            raise BadValue("json", value, "true or false")
    return as_json, rest


def _all_settings(words: list[str]) -> list[Settings]:
    flags = ("-m", "--multirun")
    multirun = any(w in flags for w in words)
    made = settings_of_command([w for w in words if w not in flags], multirun, planning=True)
    for one in made:
        check(one)
    return made


def names_of(answers: Sequence[Answer]) -> list[str]:
    """A name for each answer: its strategy and flags, or what tells it from the others."""
    names = [answer.name for answer in answers]
    if len(set(names)) == len(names):
        return names
    rows = [identity(Cell(a.settings, a.settings.context_tokens), {}) for a in answers]
    named = {id(row): name for name, own in arms(rows).items() for row in own}
    names = [named[id(row)] for row in rows]
    if len(set(names)) == len(names):
        return names
    return [
        f"{name}, context {tokens_text(a.settings.context_tokens)}"
        for name, a in zip(names, answers, strict=True)
    ]


def arms_table(answers: Sequence[Answer], names: Sequence[str]) -> str:
    """Each answer in a line: what starts, what is held, and how it ends."""
    rows = []
    for name, answer in zip(names, answers, strict=True):
        made, held = answer.made, answer.points.resident.ok or 0
        if not made.started:
            ends = f"does not start: {made.allocation or made.outcome}"
        elif not made.admits_context:
            ends = "starts, a full request is not admitted"
        else:
            whole = held >= answer.spec.context_tokens
            ends = "holds a full request" if whole else "starts, a full request does not fit"
        peak = gib(made.predicted_peak_bytes * answer.spec.scale)
        rows.append([name, tokens_text(answer.spec.context_tokens), ends, f"{held:,}", peak])
    header = ("planned", "context", "ends", "holds up to", "peak of a rank")
    return aligned(header, rows, (1, 3, 4))


class Answer:
    """What the planner says of one configuration."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        fill = settings.fills[-1] if settings.fills else 1.0
        own = cell_spec(Cell(settings, settings.context_tokens, fill))  # of one rank's share
        made = predict(own)
        self.spec: PlanSpec = whole_spec(settings, own)
        self.made: Prediction = whole_prediction(settings, made)
        self.points = whole_points(settings, oom_points(own))
        changes: dict[str, Change | None] = {}
        if not made.started:
            changes["start"] = smallest_change(own, "start")
        if not made.admits_context:
            changes["admit"] = smallest_change(own, "admit")
        longest = longest_accepted(own) if None in changes.values() else None
        self.changes = {goal: whole_change(settings, one) for goal, one in changes.items()}
        self.longest = whole_change(settings, longest)
        self.largest: tuple[int, int | None] | None = None
        if own.strategy in ENGINES:
            largest, failing = largest_context_that_starts(own, own.context_tokens * LOOK_BEYOND)
            beyond = None if failing is None else first_beyond(settings, failing)
            self.largest = settings.all_tokens(largest), beyond

    @property
    def name(self) -> str:
        """The strategy, with what the command line changed of it."""
        own = [w for w in self.settings.overrides if w.startswith("strategy.")]
        return " ".join([self.settings.strategy, *(w.removeprefix("strategy.") for w in own)])

    def text(self) -> str:
        """Everything, for a terminal."""
        parts = [self._heading(), ""]
        parts += [items_table(self.made, self.spec.scale, self.spec.capacity_bytes), ""]
        parts += [
            points_table(self.points, self.spec.context_tokens),
            "",
            verdict(self.spec, self.made),
        ]
        parts += [f"note: {note}" for note in self.made.notes]
        parts += change_lines(self.spec.context_tokens, self.changes, self.longest)
        if self.largest is not None:
            parts.append(self._largest_line())
        return "\n".join(parts)

    def _heading(self) -> str:
        settings, spec = self.settings, self.spec
        version = settings.options.get("version")
        engine = f"{settings.strategy} {version}" if version else settings.strategy
        token = settings.full_model().token_bytes
        where = settings.hardware.device_name
        if settings.on_host:
            where = f"{where} (scale model 1:{spec.scale}; bytes are the modelled device's)"
        return (
            f"{engine} at {tokens_text(spec.context_tokens)}: model {settings.model.name}, "
            f"{token:,} bytes a token and rank, {settings.parallel.ranks} ranks, {where}"
        )

    def _largest_line(self) -> str:
        assert self.largest is not None
        largest, failing = self.largest
        beyond = tokens_text(self.spec.context_tokens * LOOK_BEYOND)
        text = f"largest context that starts, looked for up to {beyond}: "
        if failing is None:
            return f"{text}every one does"
        if largest < 1:
            return f"{text}none does"
        if failing == largest + 1:
            held = min(predict(self.spec.at(largest).filled(0.0)).pool_tokens, largest)
            room = "" if held == largest else f" (with room for {held:,})"
            return f"{text}{largest:,} tokens{room}"
        return f"{text}{largest:,} tokens, but contexts from {failing:,} on fail before that"


def as_summary(answers: Sequence[Answer], names: Sequence[str]) -> dict[str, Any]:
    """``summary.json``'s shape, with the planner's own figures beside it."""
    strategies = {}
    for name, answer in zip(names, answers, strict=True):
        made, spec = answer.made, answer.spec
        entry: dict[str, Any] = {
            point: _point(getattr(answer.points, point))
            for point in ("startup", "admit", "resident")
        }
        entry["peak_device_bytes"] = made.predicted_peak_bytes
        entry["decode"] = []
        entry["scale"] = spec.scale
        entry["outcome"] = {
            "status": made.outcome,
            "started": made.started,
            "phase": made.phase,
            "allocation": made.allocation,
            "requested_bytes": made.requested_bytes,
            "free_bytes": made.free_bytes,
            "message": made.message,
        }
        entry["items"] = [vars(item) for item in made.items]
        entry["pool_tokens"] = made.pool_tokens
        entry["smallest_change"] = {
            goal: None if change is None else dict(change.flags)
            for goal, change in answer.changes.items()
        }
        if answer.longest is not None:
            entry["longest_accepted"] = dict(answer.longest.flags)
        if answer.largest is not None:
            largest, failing = answer.largest
            entry["largest_context_that_starts"] = {"ok": largest, "first_not_ok": failing}
        strategies[name] = entry
    return {"schema": SCHEMA, "basis": "planned", "strategies": strategies, "claims": []}


def _point(point: OomPoint) -> dict[str, Any]:
    return {
        "ok": point.ok,
        "not_ok": point.not_ok,
        "limited_by": point.limited_by,
        "phase": point.phase,
        "allocation": point.allocation,
    }


if __name__ == "__main__":
    sys.exit(main())
