"""How the ranks of one trial keep step: through the process that started them, not each other.

A rank says where it is in its records and hears back on its standard input: ``go`` when every rank
has joined a stage, ``stop`` when one has failed. A rank that fails, dies or hangs can so end the
others without any collective, and none is left waiting.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from harness.ranks import Place
from harness.ranks_pulse import Counters

Emit = Callable[[dict[str, Any]], None]
# A harness on another machine that says nothing for so long is lost, and its ranks with it.
SILENT_SECONDS = 5.0
# A peer's death breaks a collective before the news of it comes.
BROKEN_COLLECTIVE_SECONDS = SILENT_SECONDS + 4.0
CHUNK = 1 << 16


class EndedByPeer(Exception):
    """Another rank ended the trial."""


class Team(Protocol):
    """What a trial asks of the ranks that it is one of."""

    place: Place
    counters: Counters

    def stage(self, name: str) -> None:
        """Say that this rank begins something, and end here when another rank has crashed."""

    def check(self, resident_tokens: int) -> None:
        """End here when another rank cannot hold more than this one holds by now."""

    def join(self, stage: str, value: Any = None) -> list[Any]:  # noqa: ANN401
        """Wait for every rank; returns each rank's value."""

    def broken(self) -> bool:
        """Whether an error here comes from another rank's end."""


class Alone:
    """A rank by itself: nothing to wait for."""

    place = Place(0, 1)
    counters = Counters()

    def stage(self, name: str) -> None:
        """Nobody listens."""

    def check(self, resident_tokens: int) -> None:
        """Nobody else can fail."""

    def join(self, stage: str, value: Any = None) -> list[Any]:  # noqa: ANN401
        """This rank's own value."""
        return [value]

    def broken(self) -> bool:
        """Every error is this rank's own."""
        return False


@dataclass
class Stop:
    """Another rank failed; ``limit`` is how many tokens are still to be reached, None: at once."""

    rank: int
    limit: int | None


class Control:
    """A rank's end of the line to the process that started it (:class:`Team`).

    Parameters
    ----------
    emit : callable
        Takes records that go up.
    source : int
        File descriptor from which messages come down, one JSON object a line.
    counters : Counters, optional
        Where this rank counts its collectives, so that others see how far it came.
    """

    def __init__(
        self, place: Place, emit: Emit, source: int = 0, counters: Counters | None = None
    ) -> None:
        self.place, self._emit, self._source = place, emit, source
        self.counters = counters or Counters()
        self._half = b""
        self._joins = 0
        self._gone: dict[str, list[Any]] = {}
        self.stopped: Stop | None = None

    def stage(self, name: str) -> None:
        """Say that this rank begins a phase.

        Raises
        ------
        EndedByPeer
            Another rank crashed, hung or was killed.
        """
        self._emit({"type": "stage", "stage": name})
        self._listen(0.0)
        if self.stopped is not None and self.stopped.limit is None:
            raise EndedByPeer

    def check(self, resident_tokens: int) -> None:
        """Go on growing until this rank holds what the failed one held: the least is the trial's.

        Raises
        ------
        EndedByPeer
        """
        self._listen(0.0)
        stop = self.stopped
        if stop is not None and (stop.limit is None or resident_tokens >= stop.limit):
            raise EndedByPeer

    def join(self, stage: str, value: Any = None) -> list[Any]:  # noqa: ANN401
        """Wait until every rank has come to ``stage``; each rank's value, by rank.

        Raises
        ------
        EndedByPeer
            Another rank will not come.
        """
        self._joins += 1
        stage = f"{self._joins} {stage}"
        self._emit({"type": "join", "stage": stage, "value": value})
        while stage not in self._gone:
            if self.stopped is not None:
                raise EndedByPeer
            self._listen(1.0)
        return self._gone.pop(stage)

    def broken(self) -> bool:
        """Whether a peer's end is known, or becomes so in a moment."""
        until = time.monotonic() + BROKEN_COLLECTIVE_SECONDS
        self._emit({"type": "stage", "stage": "broken collective"})
        while self.stopped is None and time.monotonic() < until:
            self._listen(0.1)
        return self.stopped is not None

    def _listen(self, seconds: float) -> None:
        """Take the messages that are there, or come within ``seconds``."""
        while select.select([self._source], [], [], seconds)[0]:
            data = os.read(self._source, CHUNK)
            if not data:  # whoever started us is gone
                os._exit(1)
            *lines, self._half = (self._half + data).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
            seconds = 0.0

    def _take(self, message: dict[str, Any]) -> None:
        if "go" in message:
            self._gone[message["go"]] = message["values"]
        if "stop" in message and self.stopped is None:
            self.stopped = Stop(**message["stop"])
        elif "stop" in message and message["stop"]["limit"] is None and self.stopped is not None:
            self.stopped.limit = None  # first one ran out of memory, then another crashed
