"""What a timing is turned into, each against a small computation of its own."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from harness.measure import _decode_columns, _growing_columns, _prefill_columns
from harness.timing import GROWING_SAMPLES, Samples, Stopwatch, prefill_flops
from kernels.view import Geometry
from strategies.device_host import HostDevice
from strategies.model import KVModel, LayerGroup
from strategies.paged import Paged
from tests.harness.composed import made

# 3 layers that see all, 2 that see chunks of 256 tokens; two KV heads for six query heads.
HEADS = {"kv_heads": 2, "q_heads": 6, "head_dim": 64}
MODEL = KVModel(
    "two groups",
    (
        LayerGroup("full", Geometry(3, **HEADS), 2),
        LayerGroup("local", Geometry(2, **HEADS, kv_dtype="bf16"), 2, 256),
    ),
)


def filled(*lengths):
    strategy = Paged(HostDevice(1 << 28), MODEL, 2048, len(lengths))
    strategy.start()
    for sequence, tokens in enumerate(lengths):
        strategy.open(sequence, 2048)
        strategy.extend(sequence, tokens)
    return strategy


def test_the_middle_half_of_the_samples_is_their_spread():
    assert Samples((5.0, 1.0, 2.0, 4.0, 3.0), 9.0).iqr_ms == 2.0  # from 2 to 4
    assert Samples((1.0, 2.0, 4.0, 8.0), 9.0).iqr_ms == 3.25  # from 1.75 to 5
    assert Samples((7.0,), 9.0).iqr_ms == 0.0
    ms = np.random.default_rng(3).gamma(2.0, 5.0, 11)
    low, high = np.percentile(ms, [25, 75])
    assert Samples(tuple(ms), 0.0).iqr_ms == pytest.approx(high - low)


@pytest.mark.parametrize(
    ("q_heads", "dim", "history", "chunk", "first"),
    [(1, 64, 0, 1, 0), (6, 64, 0, 5, 0), (2, 128, 7, 3, 0), (2, 128, 7, 3, 4)],
)
def test_flops_are_counted_pair_by_pair(q_heads, dim, history, chunk, first):
    counted = 0
    for _ in range(q_heads):
        for query in range(history, history + chunk):
            for _ in range(first, query + 1):  # the keys that this query sees
                counted += dim * 2  # its product with the key: a multiplication and an addition
                counted += dim * 2  # the key's value, weighed and added
    assert prefill_flops(q_heads, dim, history, chunk, first) == counted


def test_a_decode_steps_bytes_are_the_k_and_v_that_it_reads():
    # Of 300 tokens the local layers see those from 256 on, of 100 all.
    read = 3 * 2 * 64 * (1 + 1) * (300 + 100)  # layers x heads x D x one byte of K and of V
    read += 2 * 2 * 64 * (2 + 2) * (44 + 100)  # bf16
    columns = _decode_columns(filled(300, 100), [0, 1], Samples((4.0, 1.0, 2.0), 0.0))
    assert columns["attention_decode_step_ms"] == 2.0
    assert columns["attention_decode_bytes_per_second"] == pytest.approx(read / 2e-3)
    assert columns["attention_decode_tokens_per_second"] == pytest.approx(2 / 2e-3)
    assert columns["attention_decode_step_ms_iqr"] == 1.5
    assert columns["decode_samples"] == 3


def test_a_prefill_chunks_flops_are_those_of_every_layer():
    chunk = 20
    pairs_full = sum(range(300 - chunk + 1, 301))
    pairs_local = sum(position - 256 + 1 for position in range(300 - chunk, 300))
    flops = 4 * 6 * 64 * (3 * pairs_full + 2 * pairs_local)
    columns = _prefill_columns(filled(300), 0, 300, chunk, Samples((8.0, 10.0, 9.0), 0.0))
    assert columns["attention_prefill_chunk_ms"] == 9.0
    assert columns["attention_prefill_flops_per_second"] == pytest.approx(flops / 9e-3)
    assert columns["attention_prefill_tokens_per_second"] == pytest.approx(chunk / 9e-3)


class Clock(Stopwatch):
    """A stopwatch whose chunks take what a formula says."""

    def __init__(self, settings, ms_of):
        self.settings, self.ms_of, self.asked = settings, ms_of, []

    def prefill(self, sequence, history, chunk, most=None, warm=False):
        self.asked.append(history)
        return Samples((self.ms_of(history),), 0.0)


@pytest.mark.parametrize(("tokens", "chunk"), [(100_000, 2048), (8_192, 2048), (5_000, 16)])
def test_a_prompts_modelled_time_is_the_sum_over_its_chunks(tokens, chunk):
    def ms_of(history):
        return 7.0 + 0.003 * history

    clock = Clock(made("strategy=paged", "trial.prefill_histories=5"), ms_of)
    model = clock.prefill_model(0, tokens, chunk, ms_of(tokens - chunk))
    total_ms, done = 0.0, 0
    while done < tokens:  # the last chunk may hold fewer tokens; it is launched all the same
        total_ms += ms_of(done)
        done += chunk
    assert model.total_seconds == pytest.approx(total_ms / 1e3)
    assert model.relative_residual == pytest.approx(0.0, abs=1e-9)
    assert (len(model.histories), model.histories[0]) == (5, 0)
    assert model.histories[-1] == tokens - chunk
    assert clock.asked == list(model.histories[:-1])  # the longest was measured before


def test_a_rank_of_several_sees_its_share_of_every_chunks_history():
    settings = made(
        "strategy=paged", "parallel=context", "parallel.ranks=4", "parallel.context_ranks=4"
    )
    clock = Clock(settings, lambda history: 2.0 + 0.01 * history)
    model = clock.prefill_model(0, 1024, 128, 2.0 + 0.01 * (1024 - 128))
    # 4 x 1024 tokens of queries; before chunk i a rank holds a quarter of 128 i tokens.
    total_ms = sum(2.0 + 0.01 * 128 * i / 4 for i in range(4 * 1024 // 128))
    assert model.total_seconds == pytest.approx(total_ms / 1e3)


def test_what_a_straight_line_misses_is_told():
    def ms_of(history):
        return 10.0 + (2.0 if history == 500 else 0.0)

    clock = Clock(made("strategy=paged", "trial.prefill_histories=3"), ms_of)
    model = clock.prefill_model(0, 1100, 100, 10.0)
    assert model.histories == (0, 500, 1000)
    # Least squares: flat, at the mean; it misses by 2/3, 4/3 and 2/3.
    missed = math.sqrt((4 + 16 + 4) / 9)
    assert model.relative_residual == pytest.approx(missed / math.sqrt(100 + 144 + 100))
    assert model.total_seconds == pytest.approx(11 * (10 + 2 / 3) / 1e3)


def test_a_slow_step_beside_growth_is_sampled_as_long_as_one_alone(monkeypatch):
    """On the host: a warm-up and three samples, or as many as a second has room for."""
    own = made("strategy=paged", "context=1M")
    seconds = iter(range(100))
    monkeypatch.setattr("harness.timing.time.perf_counter", lambda: float(next(seconds)))
    watch = Stopwatch(own, SimpleNamespace(extend=lambda sequence, tokens: 0), None)
    watch.decode_step = lambda sequences: lambda: None
    assert len(watch.decode_while_growing([0], 128).ms) == 3
    monkeypatch.setattr("harness.timing.time.perf_counter", lambda: 0.0)
    assert len(watch.decode_while_growing([0], 128).ms) == GROWING_SAMPLES


@pytest.mark.parametrize("steps", [2, 8])
def test_a_row_s_bytes_are_those_from_before_it_grew_beside_decode(steps):
    """Also when there was no room for enough steps: they were taken all the same."""
    own = made("strategy=paged", "context=1M", "hardware.capacity=20GiB")
    device = HostDevice(64 << 20)
    strategy = Paged(device, own.kv_model(), 1_000_000)
    strategy.start()
    strategy.open(0, 1_000_000)
    strategy.extend(0, 5000)
    before = strategy.footprint()

    class Watch:
        @staticmethod
        def decode_while_growing(sequences, tokens):
            for _ in range(steps):
                strategy.extend(sequences[-1], tokens)
            return Samples((1.0,) * steps, 1.0) if steps > 3 else None

    row = _growing_columns(own, strategy, Watch(), [0], lambda what, values: None)
    assert strategy.footprint().committed_bytes > before.committed_bytes
    assert row["kv_committed_bytes"] == before.committed_bytes
    assert row["kv_live_bytes"] == before.live_bytes == 5000 * 128
    assert ("decode_while_growing_ms" in row) == (steps > 3)
    strategy.stop()
