"""What a person sees while a run goes on: a bar, the trial in hand, and a line for each row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from harness.cell import Cell
from harness.phases import phase_name
from harness.ranks_summary import on_rank
from harness.rows import Row, identity
from harness.settings import Settings
from harness.sizes import gib_or_less, mib_or_less, tokens_text
from harness.summary import ARM_KEYS, admitted, arms, started

NAME_CHARACTERS = 12  # at least; as many as the longest arm's name takes
ERROR_CHARACTERS = 160


class Progress:
    """A line for each row on standard output; on a terminal a bar over trials on standard error.

    Parameters
    ----------
    settings : sequence of Settings
        Of every arm: their names are what tells one from the others.
    """

    def __init__(self, settings: Sequence[Settings] = ()) -> None:
        self.bar: tqdm | None = None
        self._names = arm_names(settings)
        self._width = max(NAME_CHARACTERS, *map(len, self._names.values()), 0)

    def expect(self, trials: int) -> None:
        """This many trials are to come; before that is known there is no bar."""
        if trials and sys.stderr.isatty():
            self.bar = tqdm(
                total=trials,
                unit="trial",
                file=sys.stderr,
                dynamic_ncols=True,
                bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} trials "
                "[{elapsed}<{remaining}{postfix}]",
            )

    def record(self, record: dict[str, Any]) -> None:
        """Show the phase of the trial in hand."""
        if self.bar is not None and record["type"] == "timeline":
            row = record["row"]
            self.bar.set_postfix_str(
                f"{phase_name(row['phase'])}: {row['allocation']}", refresh=False
            )
            self.bar.refresh()

    def advance(self, trials: int, cell: Cell) -> None:
        """``trials`` more are done."""
        if self.bar is None:
            return
        self.bar.total = max(self.bar.total, self.bar.n + trials)
        name = self._name(identity(cell, {}))
        context = tokens_text(cell.context_tokens)
        self.bar.set_postfix_str(f"{name} {context} done", refresh=False)
        self.bar.update(trials)

    def row(self, row: Row) -> None:
        """One line for a finished trial, above the bar."""
        line = row_line(row, self._name(row), self._width)
        if self.bar is None:
            print(line)
        else:
            self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()

    def _name(self, row: Row) -> str:
        own = _arm(row)
        if own in self._names:
            return self._names[own]
        # An engine that was started has no arena, no pages of ours.
        alike = [
            name
            for arm, name in self._names.items()
            if all(value in (None, known) for value, known in zip(own, arm, strict=True))
        ]
        return alike[0] if len(alike) == 1 else str(row["strategy"])

    def done(self) -> None:
        """Nothing more is to come: fewer trials than were expected decided the brackets."""
        if self.bar is not None:
            self.bar.total = self.bar.n

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.refresh()
            self.bar.close()


def arm_names(settings: Sequence[Settings]) -> dict[tuple[Any, ...], str]:
    """The arms' names, as the summary will tell them apart, by what a row says of its arm."""
    rows = [identity(Cell(s, s.context_tokens), {}) for s in settings]
    return {_arm(own[0]): name for name, own in arms(rows).items()}


def _arm(row: Row) -> tuple[Any, ...]:
    """An engine that was started is of the arm of its emulation."""
    return tuple(row.get(key) for key in ARM_KEYS if key != "engine_version")


def row_line(row: Row, arm: str = "", width: int = NAME_CHARACTERS) -> str:
    """``paged  10M x 100 %  oom in fill: asked …``; ``arm`` is the strategy's unless given."""
    size = mib_or_less if int(row.get("scale") or 1) > 1 else gib_or_less
    name = arm or str(row["strategy"])
    if row.get("engine_version"):
        name = f"{row['strategy']} itself{name.removeprefix(str(row['strategy']))}"
    status = str(row["status"])
    if row["purpose"] == "bracket" and started(row) == "ok" and admitted(row) == "refused":
        status = "started, not admitted"
    text = (
        f"{name:<{width}} {tokens_text(int(row['context_tokens'])):>10} "
        f"x {float(row['fill']):>4.0%}  {row['purpose']:<8} {status:<8}"
    )
    if row["status"] in ("oom", "refused") and row.get("oom_requested_bytes") is not None:
        text += (
            f"{on_rank(row)} in {phase_name(row['oom_phase'])}: {row['oom_allocation']} asked "
            f"{size(row['oom_requested_bytes'])}, {size(row['oom_free_bytes'])} free"
        )
    elif row["basis"] == "planned":
        text += f" planned, not run: peak {size(row['predicted_peak_bytes'])}"
    elif row["status"] == "ok":
        text += f" peak {size(row['peak_device_bytes'])}"
        if row.get("attention_decode_step_ms") is not None:
            text += f", attention decode {row['attention_decode_step_ms']:.2f} ms a step"
    else:
        text += f"{_where(row)} {row.get('error') or row.get('signal') or ''}"[:ERROR_CHARACTERS]
    return text


def _where(row: Row) -> str:
    """Of several ranks, which one ended the trial, and in which phase it was."""
    if not on_rank(row):
        return ""
    phase = phase_name(row.get("oom_phase"))
    return on_rank(row) + (f" in {phase}:" if phase else ":")
