"""Closing a bracket [largest ok, smallest not ok] with as few trials as a good guess allows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

RELATIVE_WIDTH = 0.001


@dataclass(frozen=True)
class Bracket:
    """An OOM point; ``not_ok`` is None when nothing up to the end of the sweep failed.

    ``limited_by`` is ``oom``, ``refused``, ``crash`` (an engine's own) or ``sweep_end``; ``""``
    when a trial died on the way, and what lies between the ends is unknown.
    """

    ok: int | None
    not_ok: int | None
    limited_by: str

    def closed(self, chunk_tokens: int) -> bool:
        """Whether it is as narrow as one chunk or 0.1 %, whichever is larger."""
        if self.ok is None or self.not_ok is None:
            return True
        return self.not_ok - self.ok <= resolution(self.ok, chunk_tokens)


def resolution(tokens: int, chunk_tokens: int) -> int:
    """Width at which a bracket counts as closed: one chunk or 0.1 %, whichever is larger."""
    return max(1, chunk_tokens, int(tokens * RELATIVE_WIDTH))


def close_bracket(
    test: Callable[[int], str],
    guess_tokens: int,
    chunk_tokens: int,
    smallest: int,
    largest: int,
) -> Bracket:
    """Find where ``test`` turns from ``ok`` to something else.

    Opens at the guess and one chunk above it, widens by doubling when the guess was wrong, and
    bisects what is left. Ends at once where a trial has no answer: it crashed or hung, and so would
    its neighbours.

    Parameters
    ----------
    test : callable
        Runs a trial at a context; returns ``ok``, ``oom``, ``refused`` or ``crash``, ``""`` when
        that is unknown.
    guess_tokens : int
        Where the planner expects the largest ok.
    smallest, largest : int
        Bounds of the search; when ``largest`` is ok the bracket ends with ``sweep_end``.
    """
    answers: dict[int, str] = {}

    def ask(tokens: int) -> bool:
        if tokens not in answers:
            answers[tokens] = test(tokens)
        if not answers[tokens]:
            raise _Unknown
        return answers[tokens] == "ok"

    try:
        low, high = _opened(ask, guess_tokens, chunk_tokens, smallest, largest)
        while low is not None and high is not None and high - low > resolution(low, chunk_tokens):
            middle = (low + high) // 2
            if ask(middle):
                low = middle
            else:
                high = middle
    except _Unknown:
        good = [t for t, answer in answers.items() if answer == "ok"]
        bad = [t for t, answer in answers.items() if answer not in ("ok", "")]
        return Bracket(max(good, default=None), min(bad, default=None), "")
    return Bracket(low, high, "sweep_end" if high is None else answers[high])


def confirm_bracket(
    test: Callable[[int, int], str],
    repeats: int,
    guess_tokens: int,
    chunk_tokens: int,
    smallest: int,
    largest: int,
) -> Bracket:
    """Close a bracket and run both its ends ``repeats`` times; what fails once is not ok.

    Within a few MiB of the end a driver may grant what it refuses the next time. The bracket then
    moves down, until its lower end was ok in every repeat.

    Parameters
    ----------
    test : callable
        Runs repeat number ``repeat`` of a trial at a context; see :func:`close_bracket`.
    repeats : int
        Runs of each end, the search's own included.
    """
    failed: dict[int, str] = {}

    def first(tokens: int) -> str:
        return failed.get(tokens) or test(tokens, 0)

    while True:
        closed = close_bracket(first, guess_tokens, chunk_tokens, smallest, largest)
        ends = [end for end in (closed.ok, closed.not_ok) if end is not None]
        for repeat in range(1, repeats):
            for end in ends:
                answer = test(end, repeat)
                if answer not in ("ok", ""):
                    failed[end] = answer
        if closed.ok not in failed:
            return closed


class _Unknown(Exception):
    """A trial says nothing about where memory ends."""


def _opened(
    ask: Callable[[int], bool], guess: int, chunk: int, smallest: int, largest: int
) -> tuple[int | None, int | None]:
    """An ok and a not-ok around the guess; None where a bound of the search is reached."""
    step = max(1, chunk)
    low = min(max(guess, smallest), largest)
    high: int | None = None
    while not ask(low):
        high = low
        if low <= smallest:
            return None, high
        low = max(smallest, low - step)
        step *= 2
    step = max(1, chunk)
    while high is None:
        if low >= largest:
            return low, None
        above = min(largest, low + step)
        if ask(above):
            low = above
            step *= 2
        else:
            high = above
    return low, high
