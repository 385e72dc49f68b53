"""Continuous batching against a simulation that takes every step, token by token."""

from __future__ import annotations

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.admission import longest_admissible
from harness.batching import Batch
from harness.shares import Means, parts_of
from harness.trace_file import Request
from strategies.device_host import HostDevice
from strategies.errors import OutOfMemory, Refused
from strategies.registry import build
from tests.strategies.small_models import HYBRID, PLAIN

CONTEXT = 256
KINDS = {
    "paged": ("paged", {}),
    "deferred": ("paged", {"release": "deferred", "low_water_bytes": 1 << 16}),
    "eager_pages": ("eager_pages", {}),
    "max": ("static", {"mem_fraction_of": "device", "slot_policy": "max"}),
    "pow2": ("static", {"mem_fraction_of": "device", "slot_policy": "pow2"}),
    "exact": ("static", {"mem_fraction_of": "device", "slot_policy": "exact"}),
}


def started(kind, model=PLAIN, chunks=8, rows=16):
    name, options = KINDS[kind]
    chunk = max(g.chunk_bytes for g in model.groups)
    device = HostDevice(chunks * chunk + 65536)
    made = build(name, device, model, CONTEXT, rows, **options)
    made.start()
    return device, made


class Stepwise:
    """The same rules, a step at a time, a token at a time."""

    def __init__(self, strategy, token_bytes, requests, arrivals):
        self.strategy, self.token_bytes, self.requests = strategy, token_bytes, requests
        self.to_come = deque(enumerate(arrivals))
        self.waiting, self.running = deque(), {}
        self.longest = longest_admissible(strategy, CONTEXT)
        self.finished = self.refused = self.preempted = self.step = 0
        self.limited, self.whole, self.running_steps = Means(), Means(), 0

    def run(self):
        while self.to_come or self.waiting or self.running:
            self._one_step()
            self._account()
            for state in self.running.values():
                state[0] += 1
            self.step += 1

    def _one_step(self):
        preempted = self.preempted
        for index in [i for i, (held, total) in self.running.items() if held >= total]:
            self._drop(index)
            self.finished += 1
        self._grow(list(self.running))
        while self.to_come and self.to_come[0][1] <= self.step:
            index, _ = self.to_come.popleft()
            if self.requests[index].total_tokens > self.longest:
                self.refused += 1
            else:
                self.waiting.append((index, 0))
        while self.preempted == preempted and (fresh := self._admit()):
            for index in [i for i in fresh if self.running[i][0] >= self.running[i][1]]:
                self._drop(index)
                self.finished += 1
            self._grow([i for i in fresh if i in self.running])

    def _grow(self, indices):
        for index in indices:
            while index in self.running:
                held, total = self.running[index]
                if held >= total:
                    break
                try:
                    self.strategy.extend(index, held + 1 - self.strategy.resident_tokens(index))
                    break
                except (OutOfMemory, Refused):
                    if len(self.running) == 1:
                        self._drop(index)
                        self.refused += 1
                        break
                    victim = next(reversed(self.running))
                    done = self.running[victim][0] - self.requests[victim].input_tokens
                    self._drop(victim)
                    self.waiting.appendleft((victim, done))
                    self.preempted += 1

    def _drop(self, index):
        self.strategy.close(index)
        del self.running[index]

    def _admit(self):
        fresh = []
        while self.waiting:
            index, done = self.waiting[0]
            request = self.requests[index]
            prompt = request.input_tokens + done
            if self._open(index, prompt, request.total_tokens):
                self.running[index] = [prompt, request.total_tokens]
                fresh.append(index)
                self.waiting.popleft()
            elif self.running:
                break
            else:
                self.waiting.popleft()
                self.refused += 1
        return fresh

    def _open(self, index, prompt, total):
        if not self.strategy.can_admit(max(1, prompt)):
            return False
        try:
            self.strategy.open(index, total)
        except Refused:
            return False
        try:
            self.strategy.extend(index, prompt)
        except (OutOfMemory, Refused):
            self.strategy.close(index)
            return False
        return True

    def _account(self):
        if not (self.to_come or self.waiting or self.running):
            return
        held = sum(h for h, _ in self.running.values())
        told = sum(self.strategy.resident_tokens(i) for i in self.running)
        footprint = self.strategy.footprint()
        rooms = [(self.strategy.room_tokens(i), total) for i, (_, total) in self.running.items()]
        parts = parts_of(
            footprint.committed_bytes,
            footprint.live_bytes - (told - held) * self.token_bytes,
            (sum(map(min, rooms)) - held) * self.token_bytes,
            sum(max(0, room - total) for room, total in rooms) * self.token_bytes,
        )
        self.whole.add(parts, 1)
        if self.waiting:
            self.limited.add(parts, 1)
            self.running_steps += len(self.running)


REQUESTS = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 120)).filter(lambda r: sum(r)),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("kind", KINDS)
@given(lengths=REQUESTS, gap=st.sampled_from([0, 0, 3, 40]), chunks=st.integers(2, 8))
@settings(max_examples=25, deadline=None)
def test_as_if_every_step_were_taken(kind, lengths, gap, chunks):
    requests = [Request(0.0, *length) for length in lengths]
    arrivals = [gap * i for i in range(len(requests))]
    token = PLAIN.token_bytes
    device, strategy = started(kind, chunks=chunks)
    before = strategy.footprint()
    batch = Batch(strategy, token, requests, arrivals, CONTEXT)
    batch.run()
    after = strategy.footprint()
    strategy.stop()
    _, again = started(kind, chunks=chunks)
    slow = Stepwise(again, token, requests, arrivals)
    slow.run()
    counts = batch.counts
    assert (counts.finished, counts.refused) == (slow.finished, slow.refused)
    assert counts.preempted == slow.preempted
    assert counts.finished + counts.refused == len(requests)
    assert batch.limited.steps == slow.limited.steps
    assert batch.whole.steps == slow.whole.steps
    if slow.limited.steps:
        fast, want = batch.limited.parts(), slow.limited.parts()
        for name in ("live", "reserved", "internal", "external"):
            assert getattr(fast, name) == pytest.approx(getattr(want, name), abs=1e-6)
        assert batch.mean_running == pytest.approx(slow.running_steps / slow.limited.steps)
    assert after.live_bytes == 0
    if kind != "deferred":
        assert after.committed_bytes == before.committed_bytes
    again.stop()
    assert device.used_bytes() == 0


def test_tokens_of_a_window_that_are_given_back_are_not_live():
    requests = [Request(0.0, 130, 20 * n) for n in range(1, 7)]
    seen = []
    device, strategy = started("paged", HYBRID, chunks=40)
    Batch(
        strategy,
        HYBRID.token_bytes,
        requests,
        [0] * 6,
        CONTEXT,
        lambda b: seen.append((b.parts.live, b.resident_tokens * HYBRID.token_bytes)),
    ).run()
    strategy.stop()
    assert any(live < whole for live, whole in seen if whole)
    assert all(0 <= live <= whole for live, whole in seen)
    assert device.used_bytes() == 0


def test_too_long_requests_are_refused_and_the_rest_served():
    requests = [Request(0.0, 10, 10), Request(0.0, CONTEXT, 1), Request(0.0, 20, 5)]
    _, strategy = started("paged")
    batch = Batch(strategy, PLAIN.token_bytes, requests, [0] * 3, CONTEXT)
    batch.run()
    assert (batch.counts.finished, batch.counts.refused) == (2, 1)
    assert (batch.counts.input_tokens, batch.counts.output_tokens) == (30, 15)


def test_longest_admissible_is_exact():
    _, strategy = started("exact", chunks=4)
    longest = longest_admissible(strategy, 10 * CONTEXT)
    assert strategy.can_admit(longest) and not strategy.can_admit(longest + 1)
