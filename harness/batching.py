"""Continuous batching over a strategy's own admission, on a virtual clock.

A step of the clock gives every running sequence one token. A request is admitted, in order of
arrival, when the strategy takes its prompt (``can_admit``, ``open``, ``extend``); it grows by
``extend`` and ends in ``close``. When a growing sequence finds no memory, the one that was admitted
last is preempted: its memory is taken back, and it waits, first in line, to be computed again, as
in vLLM. No request is admitted in a step in which one was preempted.

The strategy is asked whenever a sequence needs more than it has (a new page, block or slot), so
that steps in which nothing happens cost nothing. Tokens are accounted, not written.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from harness.admission import longest_admissible
from harness.growth import Growth
from harness.shares import Means, Parts, parts_of
from harness.trace_file import Request
from strategies.errors import OutOfMemory, Refused
from strategies.strategy import Strategy


@dataclass(eq=False)
class Running:
    """A sequence that is open.

    ``order`` counts admissions. ``told_tokens`` is what the strategy knows of; it lags behind
    :meth:`tokens` within a page.
    """

    index: int
    order: int
    prompt_tokens: int
    total_tokens: int
    began: int
    told_tokens: int = 0
    room_tokens: int = 0

    def tokens(self, step: int) -> int:
        """Tokens that it holds when this step begins."""
        return min(self.total_tokens, self.prompt_tokens + step - self.began)

    @property
    def next_step(self) -> int:
        """When it ends, or needs more room."""
        return self.began + min(self.total_tokens, self.room_tokens) - self.prompt_tokens


@dataclass
class Counts:
    """What became of the requests; tokens are those of finished ones."""

    finished: int = 0
    refused: int = 0
    preempted: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    peak_running: int = 0


class Batch:
    """Serves requests to their end.

    Parameters
    ----------
    strategy : Strategy
        Started, with nothing open. All is given back when the last request has ended.
    token_bytes : int
        K/V bytes of a token over all layer groups.
    requests : sequence of Request
    arrivals : sequence of int
        The step at which each request arrives, ascending.
    context_tokens : int
        The longest request that the strategy was made for.
    observe : callable
        Called with this object about ``observations`` times, at even numbers of ended requests.
    """

    def __init__(
        self,
        strategy: Strategy,
        token_bytes: int,
        requests: Sequence[Request],
        arrivals: Sequence[int],
        context_tokens: int,
        observe: Callable[[Batch], None] = lambda batch: None,
        observations: int = 200,
    ) -> None:
        self.strategy, self.token_bytes = strategy, token_bytes
        self.requests, self.arrivals = requests, arrivals
        self.longest_tokens = longest_admissible(strategy, context_tokens)
        self.counts, self.growth = Counts(), Growth()
        self.step = 0
        self.limited, self.whole = Means(), Means()
        self.running: dict[int, Running] = {}
        self.waiting: deque[tuple[int, int]] = deque()  # request, tokens generated already
        self._observe = observe
        self._every = max(1, len(requests) // observations)
        self._seen = 0
        self._arrived = self._orders = self._ties = 0
        self._events: list[tuple[int, int, Running | None]] = []  # step, ties, who
        self._held = self._told = self._fitting = self._beyond = 0  # tokens of running sequences
        self._running_steps = [0, 0]  # while admission was limited; always
        self._try_admission = False
        self._parts = self._read()

    def run(self) -> None:
        """Until every request has finished or was refused."""
        while (step := self._next()) is not None:
            self._advance(step)
            preempted = self.counts.preempted
            self._due()
            self._arrive()
            if self.counts.preempted == preempted:
                self._admit()
            else:  # not before the next step
                self._push(self.step + 1, None)
            self._parts = self._read()
            self.counts.peak_running = max(self.counts.peak_running, len(self.running))
            if self._ended() // self._every > self._seen:
                self._seen = self._ended() // self._every
                self._observe(self)

    @property
    def resident_tokens(self) -> int:
        """Tokens of all running sequences."""
        return self._held

    @property
    def parts(self) -> Parts:
        """K/V bytes by their use, now."""
        return self._parts

    @property
    def means(self) -> Means:
        """Over the steps in which a request waited; over all steps when none ever did."""
        return self.limited if self.limited.steps else self.whole

    @property
    def mean_running(self) -> float:
        """Sequences that ran at once, over the same steps as :attr:`means`."""
        which = 0 if self.limited.steps else 1
        return self._running_steps[which] / max(1, self.means.steps)

    def _ended(self) -> int:
        return self.counts.finished + self.counts.refused

    def _next(self) -> int | None:
        """The next step at which anything happens."""
        due = [self._events[0][0]] if self._events else []
        if self._arrived < len(self.requests):
            due.append(max(self.step, self.arrivals[self._arrived]))
        return min(due, default=None)

    def _advance(self, step: int) -> None:
        passed = step - self.step
        if passed:
            growth = len(self.running) * self.token_bytes
            self.whole.add(self._parts, passed, growth)
            self._running_steps[1] += len(self.running) * passed
            if self.waiting:
                self.limited.add(self._parts, passed, growth)
                self._running_steps[0] += len(self.running) * passed
            self._held += len(self.running) * passed
        self.step = step

    def _read(self) -> Parts:
        """The parts at the beginning of this step."""
        held, token = self.strategy.footprint(), self.token_bytes
        given_back = self._told * token - held.live_bytes  # behind a window
        return parts_of(
            held.committed_bytes,
            self._held * token - given_back,
            (self._fitting - self._held) * token,
            self._beyond * token,
        )

    def _due(self) -> None:
        """Sequences that end give their memory back; then those that must grow do."""
        growing = []
        while self._events and self._events[0][0] == self.step:
            run = heapq.heappop(self._events)[2]
            if run is None or self.running.get(run.index) is not run:
                continue
            if run.tokens(self.step) >= run.total_tokens:
                self._finish(run)
            else:
                growing.append(run)
        for run in sorted(growing, key=lambda r: r.order):
            if self.running.get(run.index) is run:
                self._grow(run)

    def _finish(self, run: Running) -> None:
        self._remove(run)
        request = self.requests[run.index]
        self.counts.finished += 1
        self.counts.input_tokens += request.input_tokens
        self.counts.output_tokens += request.output_tokens

    def _grow(self, run: Running) -> None:
        """Room for this step's token, if need be at the cost of those that came last."""
        need = run.tokens(self.step) + 1
        while True:
            try:
                self._extend(run, need - run.told_tokens)
            except (OutOfMemory, Refused):
                if len(self.running) == 1:
                    self._remove(run)
                    self.counts.refused += 1
                    return
                victim = next(reversed(self.running.values()))
                self._preempt(victim)
                if victim is run:
                    return
                continue
            self._push(run.next_step, run)
            return

    def _preempt(self, run: Running) -> None:
        done = run.tokens(self.step) - self.requests[run.index].input_tokens
        self._remove(run)
        self.waiting.appendleft((run.index, done))
        self.counts.preempted += 1

    def _arrive(self) -> None:
        while self._arrived < len(self.requests) and self.arrivals[self._arrived] <= self.step:
            if self.requests[self._arrived].total_tokens > self.longest_tokens:
                self.counts.refused += 1
            else:
                self.waiting.append((self._arrived, 0))
                self._try_admission = True
            self._arrived += 1

    def _admit(self) -> None:
        """Admit from the front of the line, until one does not fit."""
        while self.waiting and self._try_admission:
            index, done = self.waiting[0]
            if self._open(index, done):
                self.waiting.popleft()
            elif self.running:
                self._try_admission = False
            else:  # not even alone
                self.waiting.popleft()
                self.counts.refused += 1

    def _open(self, index: int, done_tokens: int) -> bool:
        request = self.requests[index]
        prompt = request.input_tokens + done_tokens
        if not self.strategy.can_admit(max(1, prompt)):
            return False
        try:
            self.strategy.open(index, request.total_tokens)
        except Refused:  # no slot for the whole of it
            return False
        run = Running(index, self._orders, prompt, request.total_tokens, self.step)
        try:
            self._extend(run, prompt)
        except (OutOfMemory, Refused):
            self.strategy.close(index)
            return False
        self._orders += 1
        self.running[index] = run
        self._held += prompt
        self._push(run.next_step, run)
        return True

    def _extend(self, run: Running, tokens: int) -> None:
        """Ask the strategy for room; raises what it raises, and then nothing has changed."""
        self.growth.extend(self.strategy, run.index, tokens)
        self._count(run, -1)
        run.told_tokens += tokens
        run.room_tokens = self.strategy.room_tokens(run.index)
        self._count(run, 1)

    def _count(self, run: Running, sign: int) -> None:
        self._told += sign * run.told_tokens
        self._fitting += sign * min(run.room_tokens, run.total_tokens)
        self._beyond += sign * max(0, run.room_tokens - run.total_tokens)

    def _remove(self, run: Running) -> None:
        self.strategy.close(run.index)
        self._held -= run.tokens(self.step)
        self._count(run, -1)
        del self.running[run.index]
        self._try_admission = True

    def _push(self, step: int, run: Running | None) -> None:
        self._ties += 1
        heapq.heappush(self._events, (step, self._ties, run))
