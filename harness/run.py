"""A run: every job of its settings, in an order that pairs strategies, resumable at any point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from harness import forecast
from harness.bracket import Bracket, close_bracket, confirm_bracket
from harness.cell import Cell
from harness.folder import RunFolder
from harness.launch import Job, run_job
from harness.planner import ROUND_FROM_TOKENS, ROUND_TOKENS
from harness.progress import Progress
from harness.ranks import Place
from harness.ranks_summary import per_trial
from harness.rows import Row
from harness.settings import Settings
from harness.spares import Spares, spares_for
from harness.summary import admitted, started

TOP_EXTRA_FILL = 0.1


def point_cells(settings: Settings) -> list[list[Cell]]:
    """The sweep's cells, a list for each process, smallest context first."""
    if settings.engine:
        return engine_cells(settings)
    jobs = []
    histories_at = forecast.largest_ok_context(settings)
    for repeat in range(settings.repeats):
        for context in settings.contexts:
            top = context == max(settings.contexts)
            fills = settings.fills or ((TOP_EXTRA_FILL, 1.0) if top else (1.0,))
            cells = [
                Cell(
                    settings,
                    context,
                    fill,
                    timing=settings.trial.timing and fill > 0,
                    histories=settings.trial.timing and context == histories_at and fill == 1.0,
                    repeat=repeat,
                )
                for fill in fills
            ]
            jobs += [cells] if settings.one_process else [[c] for c in cells]
    return jobs


def engine_cells(settings: Settings) -> list[list[Cell]]:
    """Starts of an engine, each before its emulation; none where a bracket is asked for."""
    if settings.brackets:
        return []
    return [
        [Cell(settings, context, 0.0, timing=False, repeat=repeat, real=real)]
        for repeat in range(settings.repeats)
        for context in settings.contexts
        for real in (True, False)
    ]


def interleaved(all_settings: list[Settings]) -> list[list[Cell]]:
    """Every strategy's jobs, alternating (A B A B) wherever they ask the same question.

    An emulation follows at once on the engine that it stands beside, so that a run that is cut off
    has pairs.
    """
    queues = [point_cells(s) for s in all_settings]
    order = [
        (cells[0].repeat, position // (2 if settings.engine else 1), arm, cells)
        for arm, (settings, jobs) in enumerate(zip(all_settings, queues, strict=True))
        for position, cells in enumerate(jobs)
    ]
    order.sort(key=lambda item: item[:3])
    return [cells for *_, cells in order]


@dataclass
class Run:
    """Runs jobs into a folder; rows that are already there are not measured again."""

    folder: RunFolder
    settings: list[Settings]
    progress: Progress
    on_row: Callable[[Row], None] = field(default=lambda row: None)
    spares: Spares | None = None

    def execute(self) -> None:
        """Points of the sweep first, then the OOM brackets."""
        self.spares = spares_for(self.settings)
        try:
            self._execute()
        finally:
            if self.spares:
                self.spares.close()

    def _execute(self) -> None:
        jobs = interleaved(self.settings)
        bracketed = [s for s in self.settings if s.brackets]
        capacities = [_capacity_cell(s) for s in self.settings if s.capacity and not s.brackets]
        expected = {c.trial_id for c in [*capacities, *(c for cells in jobs for c in cells)]}
        for settings in bracketed:
            expected |= {c.trial_id for c in _expected_bracket_cells(settings)}
        self.progress.expect(len(expected - {str(r["trial_id"]) for r in self.folder.rows}))
        for cells in jobs:
            self.rows_of(cells)
        for cell in capacities:
            self.rows_of([cell])
        for settings in bracketed:
            if settings.engine:
                self._engine_bracket(settings)
            else:
                self._brackets(settings)

    def rows_of(self, cells: list[Cell]) -> list[Row]:
        """Rows of one trial's cells, of all its ranks: from the folder, or measured now."""
        have = {str(r["trial_id"]): r for r in per_trial(self.folder.rows)}
        missing = [c for c in cells if c.trial_id not in have]
        if missing:
            job = Job(missing, {"experiment": cells[0].settings.experiment})
            outcome = run_job(job, self.folder.scratch, self.progress.record, self.spares)
            by_id = {c.trial_id: c for c in missing}
            outcome.rows = [
                forecast.with_prediction(r, _of_rank(by_id[str(r["trial_id"])], int(r["rank"])))
                for r in outcome.rows
            ]
            for row in per_trial(self.folder.add(outcome)):
                have[str(row["trial_id"])] = row
                self.on_row(row)
            self.progress.advance(len(missing), cells[-1])
        return [have[c.trial_id] for c in cells]

    def _brackets(self, settings: Settings) -> None:
        """Start-up, resident and admit, both ends run ``bracket_repeats`` times.

        What is resident is asked of the largest context that starts. Where that does not start
        after all, it was no end of the bracket, which then moves down.
        """
        guess = forecast.startup_guess(settings)
        while True:
            starts = self._bracket(settings, guess, started)
            if starts.ok is None:
                break
            cells = [
                _resident_cell(settings, starts.ok, n) for n in range(settings.bracket_repeats)
            ]
            if all(started(self.rows_of([cell])[0]) in ("ok", "") for cell in cells):
                break
        self._bracket(settings, forecast.admit_guess(settings), admitted)

    def _engine_bracket(self, settings: Settings) -> Bracket:
        """Start-up of the engine itself: 1 % below and above the planner's, wider if it is wrong.

        Ends at a width of 2 %; the emulation is run at both ends.
        """

        def test(tokens: int) -> str:
            return started(self.rows_of([_engine_bracket_cell(settings, tokens)])[0])

        low, high = engine_bracket_ends(settings)
        closed = close_bracket(test, low, max(1, high - low), 1, settings.context_tokens)
        for end in (closed.ok, closed.not_ok):
            if end is not None:
                self.rows_of([_engine_bracket_cell(settings, end, real=False)])
        return closed

    def _bracket(self, settings: Settings, guess: int, verdict: Callable[[Row], str]) -> Bracket:
        """Close one bracket; rows of other brackets and of an earlier attempt are used again."""

        def test(tokens: int, repeat: int) -> str:
            answer = verdict(self.rows_of([_bracket_cell(settings, tokens, repeat)])[0])
            held = [_resident_cell(settings, tokens, n).trial_id for n in range(repeats)]
            others = [verdict(r) for r in per_trial(self.folder.rows) if r["trial_id"] in held]
            refused = [other for other in others if other not in ("ok", "")]
            return refused[0] if answer == "ok" and refused else answer

        repeats, chunk = settings.bracket_repeats, _chunk_tokens(settings)
        return confirm_bracket(test, repeats, guess, chunk, 1, settings.context_tokens)


def _of_rank(cell: Cell, rank: int) -> Cell:
    """The cell as one rank sees it: its share of the sequences."""
    parallel = cell.settings.parallel
    place = Place(rank, parallel.processes, parallel.tp, parallel.context_ranks)
    return replace(cell, context_index=place.context_index)


def _bracket_cell(settings: Settings, tokens: int, repeat: int) -> Cell:
    return Cell(settings, tokens, 0.0, purpose="bracket", timing=False, repeat=repeat)


def engine_bracket_ends(settings: Settings) -> tuple[int, int]:
    """Contexts around the planner's start-up point at which an engine is started.

    Round ones where they are very long, as the planner's point is
    (:data:`harness.planner.ROUND_TOKENS`).
    """
    guess = forecast.startup_guess(settings)
    low, high = guess * 99 // 100, guess * 101 // 100 + 1
    if guess > ROUND_FROM_TOKENS:
        low, high = low // ROUND_TOKENS * ROUND_TOKENS, -(-high // ROUND_TOKENS) * ROUND_TOKENS
    return max(1, low), min(settings.context_tokens, high)


def _engine_bracket_cell(settings: Settings, tokens: int, real: bool = True) -> Cell:
    return Cell(settings, tokens, 0.0, purpose="bracket", timing=False, real=real)


def _resident_cell(settings: Settings, tokens: int, repeat: int) -> Cell:
    return Cell(settings, tokens, purpose="resident", timing=False, repeat=repeat)


def _capacity_cell(settings: Settings) -> Cell:
    """One sequence that grows until it is refused, in a context that is larger than that."""
    return _resident_cell(settings, forecast.context_beyond_capacity(settings), 0)


def _chunk_tokens(settings: Settings) -> int:
    """Tokens of a sequence, over all ranks, whose K/V of the first group fill a chunk."""
    group = settings.full_model().groups[0]
    tokens = group.pages_per_chunk * group.geometry.page_tokens
    return tokens * settings.parallel.context_ranks


def _expected_bracket_cells(settings: Settings) -> list[Cell]:
    """Cells that the brackets take when the planner is right."""
    if settings.engine:
        return [
            _engine_bracket_cell(settings, end, real)
            for end in engine_bracket_ends(settings)
            for real in (True, False)
        ]
    startup = forecast.startup_guess(settings)
    ends: set[int] = set()
    for guess in {startup, forecast.admit_guess(settings)}:
        ends |= {guess, min(settings.context_tokens, guess + _chunk_tokens(settings))}
    repeats = range(settings.bracket_repeats)
    cells = [_bracket_cell(settings, end, repeat) for end in ends for repeat in repeats]
    return cells + [_resident_cell(settings, startup, repeat) for repeat in repeats]
