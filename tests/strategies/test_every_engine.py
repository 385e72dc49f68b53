"""The engines' emulations, refused at every allocation of a start, against a plain model."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule

from strategies import registry
from strategies.engine_model import GIB
from strategies.errors import EngineCrash, OutOfMemory, Refused
from tests.strategies.engine_models import H200_BYTES, ONE_RANK
from tests.strategies.sequences import Sequences
from tests.strategies.small_models import PLAIN, Events, RefusingDevice

SCALE = 192 * 64  # 11.6 MiB of host memory stand for an H200
LAYERS = 6
SMALL = replace(ONE_RANK, layers=LAYERS)
HYBRID = replace(SMALL, window_layers=4, window_tokens=8192)
TENS = 10_000_000
# Strategy, its flags, the model, the context; those of NEVER do not start.
VARIANTS = {
    "sglang": ("sglang", {"max_running_requests": 16}, SMALL, TENS),
    "sglang-pages": ("sglang", {"max_running_requests": 3, "page_size": 64}, SMALL, 20_000),
    "sglang-hybrid": ("sglang", {"max_running_requests": 16}, HYBRID, TENS),
    "sglang-oldest": ("sglang", {"version": "0.4.6.post5"}, SMALL, 20_000),
    "sglang-latest": ("sglang", {"version": "0.5.23", "max_running_requests": 16}, SMALL, TENS),
    "vllm": ("vllm", {"max_num_seqs": 16}, SMALL, 200_000),
    "vllm-eager": ("vllm", {"enforce_eager": True, "max_num_seqs": 2}, SMALL, 20_000),
    "vllm-hybrid": (
        "vllm",
        {"max_num_seqs": 16, "hybrid_kv_cache_manager": True},
        HYBRID,
        200_000,
    ),
    "vllm-oldest": ("vllm", {"version": "0.11.0", "max_num_seqs": 16}, SMALL, 200_000),
    "sglang-too-long": ("sglang", {}, replace(SMALL, kv_heads=8), TENS),
    "vllm-refuses": ("vllm", {"max_num_seqs": 16}, replace(SMALL, kv_heads=16), 10 * TENS),
    "vllm-crashes": ("vllm", {"max_num_seqs": 1024}, SMALL, TENS),
}
NEVER = {"sglang-too-long": OutOfMemory, "vllm-refuses": Refused, "vllm-crashes": EngineCrash}


def made(variant, capacity_bytes=H200_BYTES):
    """A strategy and its device, with a context and weights in it as a trial has."""
    name, flags, model, context = VARIANTS[variant]
    device = RefusingDevice(capacity_bytes // SCALE, scale=SCALE)
    device.allocate("context", "cuda_context", GIB // SCALE)
    device.allocate("weights", "weights", model.weights_bytes // SCALE)
    device.observer = Events()
    own = {"engine_model": model, "device_total_bytes": H200_BYTES}
    return registry.build(name, device, PLAIN, context, 4, **own, **flags), device


def state(strategy, device):
    return device.used_bytes(), device.free_bytes(), strategy.footprint()


class Starts(Sequences):
    @initialize(variant=st.sampled_from(list(VARIANTS)), share=st.sampled_from([0.2, 0.5, 1.0]))
    def make(self, variant, share):
        self.strategy, self.device = made(variant, int(H200_BYTES * share))
        self.before = state(self.strategy, self.device)
        self.context = self.strategy.context_tokens
        self.tokens, self.next, self.started = {}, 0, False

    @precondition(lambda self: not self.started)
    @rule(refuse=st.none() | st.tuples(st.integers(0, 40), st.booleans()))
    def start(self, refuse):
        if refuse is not None:
            self.device.refuse(*refuse)
        try:
            self.strategy.start()
            self.started = True
        except OutOfMemory as refused:
            assert refused.phase in ("tables", "pool", "workspace")
            assert refused.requested_bytes >= refused.refused_bytes > 0
        except (Refused, EngineCrash):
            pass
        self.device.obey()

    @precondition(lambda self: self.started)
    @rule()
    def stop(self):
        self.strategy.stop()
        self.tokens, self.started = {}, False

    @precondition(lambda self: self.started)
    @rule(share=st.floats(0.001, 1.1))
    def open(self, share):
        tokens = max(1, int(self.context * share))
        before = state(self.strategy, self.device)
        may = tokens <= self.context and len(self.tokens) < self.strategy.plan.request_limit
        try:
            self.strategy.open(self.next, tokens)
        except Refused as refused:
            assert not may and refused.phase == "fill"
            assert state(self.strategy, self.device) == before
            return
        assert may
        self.tokens[self.next] = (0, tokens)
        self.next += 1

    @precondition(lambda self: self.tokens)
    @rule(pick=st.integers(0, 9), share=st.floats(0, 1.1))
    def extend(self, pick, share):
        sequence = sorted(self.tokens)[pick % len(self.tokens)]
        held, most = self.tokens[sequence]
        more = int(most * share)
        admitted = held == 0 < more and self.strategy.can_admit(more)
        before = state(self.strategy, self.device)
        self.device.refuse(0, forever=True)  # the pool is there already: nothing is asked for
        try:
            assert self.strategy.extend(sequence, more) == 0
            self.tokens[sequence] = (held + more, most)
        except Refused as refused:
            assert refused.phase == "fill" and not (admitted and more <= most)
            assert state(self.strategy, self.device) == before
        self.device.obey()

    @invariant()
    def everything_is_accounted_and_nothing_is_left(self):
        if not hasattr(self, "strategy"):
            return
        if not self.started:
            assert state(self.strategy, self.device) == self.before
            assert self.device.observer.held_bytes == 0
            return
        held = self.strategy.footprint()
        assert held.committed_bytes + held.tables_bytes == self.device.observer.held_bytes
        used, free, _ = state(self.strategy, self.device)
        assert used + free == self.device.capacity_bytes
        assert held.live_bytes == sum(n for n, _ in self.tokens.values()) * PLAIN.token_bytes
        for sequence, (tokens, _) in self.tokens.items():
            assert self.strategy.resident_tokens(sequence) == tokens

    def teardown(self):
        if hasattr(self, "strategy"):
            self.strategy.stop()
            assert state(self.strategy, self.device) == self.before
            self.device.close()


TestStarts = Starts.TestCase
TestStarts.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_single_allocation_of_a_start_may_be_refused(variant):
    strategy, device = made(variant)
    before = state(strategy, device)
    for granted in itertools.count():
        device.refuse(granted, forever=False)
        try:
            strategy.start()
            end = None
        except (OutOfMemory, Refused, EngineCrash) as ended:
            end = type(ended)
            assert state(strategy, device) == before and device.observer.held_bytes == 0
        if device.requests <= granted:  # it came to its own end before
            break
        assert end is OutOfMemory
    assert end is NEVER.get(variant)
    assert granted >= (1 if variant in NEVER else LAYERS)
    device.obey()
    strategy.stop()
    assert state(strategy, device) == before
    device.close()
