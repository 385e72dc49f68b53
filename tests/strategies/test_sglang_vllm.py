"""The emulations of SGLang and vLLM on the scale model: they fail where the engines fail."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.view import Geometry
from strategies.device_host import HostDevice
from strategies.engine_model import GIB
from strategies.errors import OutOfMemory, Refused
from strategies.model import KVModel, LayerGroup
from strategies.sglang import SGLang
from strategies.vllm import VLLM
from tests.strategies.engine_models import H200_BYTES, ONE_RANK, TWO_HEADS

SCALE = 192 * 64  # 11.6 MiB of host memory stand for an H200
KV_MODEL = KVModel("small", (LayerGroup("full", Geometry(1, 1, 8, 1), 64),))


def device_for(model, context_bytes=552_402_944, capacity_bytes=H200_BYTES):
    made = HostDevice(capacity_bytes // SCALE, SCALE)
    made.allocate("context", "cuda_context", context_bytes // SCALE)
    made.allocate("weights", "weights", model.weights_bytes // SCALE)
    return made


def sglang(model=ONE_RANK, context=10_000_000, device=None, **flags):
    device = device or device_for(model)
    return SGLang(device, KV_MODEL, context, 1, model, device_total_bytes=H200_BYTES, **flags)


def vllm(model=ONE_RANK, context=10_000_000, device=None, **flags):
    device = device or device_for(model, round(0.6 * GIB))
    return VLLM(device, KV_MODEL, context, 1, model, device_total_bytes=H200_BYTES, **flags)


class Log:
    """Adds up what an observer is told."""

    def __init__(self):
        self.bytes = {}

    def event(self, phase, allocation, nbytes, seconds):
        key = (phase, allocation)
        self.bytes[key] = self.bytes.get(key, 0) + nbytes


def test_sglang_fails_at_ten_million_inside_the_pool():
    strategy = sglang()
    free = strategy.device.free_bytes()
    with pytest.raises(OutOfMemory) as error:
        strategy.start()
    refused = error.value
    assert (refused.phase, refused.allocation) == ("pool", "kv_pool")
    assert refused.requested_bytes * SCALE == pytest.approx(115.96 * GIB, rel=0.01)
    assert refused.free_bytes * SCALE == pytest.approx(53.03 * GIB, rel=0.01)
    assert refused.refused_bytes * SCALE == pytest.approx(1_297_036_288, rel=0.01)
    assert strategy.device.free_bytes() == free
    assert strategy.footprint().committed_bytes == 0


def test_sixteen_running_requests_start_the_same_pool():
    strategy = sglang(max_running_requests=16)
    strategy.device.observer = log = Log()
    strategy.start()
    assert strategy.plan.pool_tokens == pytest.approx(10_133_095, rel=0.01)
    assert log.bytes["tables", "req_to_token"] * SCALE == pytest.approx(0.633 * GIB, rel=0.01)
    assert log.bytes["workspace", "page_table"] * SCALE == pytest.approx(0.596 * GIB, rel=0.01)
    held = strategy.footprint()
    assert held.committed_bytes == log.bytes["pool", "kv_pool"]
    assert held.committed_bytes + held.tables_bytes == sum(log.bytes.values())
    assert strategy.can_admit(10_000_000)
    strategy.stop()
    assert sum(log.bytes.values()) == 0


def test_sglang_starts_with_a_pool_that_holds_half_the_context():
    strategy = sglang(TWO_HEADS, max_running_requests=16)
    strategy.start()
    tokens = strategy.plan.pool_tokens
    assert tokens == pytest.approx(5_066_547, rel=0.01)
    assert not strategy.can_admit(10_000_000)
    assert strategy.can_admit(tokens)
    strategy.open(0, 10_000_000)
    strategy.extend(0, tokens)
    with pytest.raises(Refused) as error:
        strategy.extend(0, 1)
    assert error.value.phase == "fill"
    assert strategy.resident_tokens(0) == tokens


@pytest.mark.parametrize(
    ("context", "error"),
    [(103_626_596, None), (107_139_364, Refused), (121_190_436, OutOfMemory)],
)
def test_very_long_rotary_tables_end_as_those_of_the_engine_did(context, error):
    """Starts on an H200: one started, one refused, one failed while it made the table."""
    model = replace(ONE_RANK, q_heads=4, intermediate_size=12_032, weights_bytes=3_805_480_960)
    strategy = sglang(model, context, device_for(model, 724_369_408), max_running_requests=16)
    strategy.device.observer = log = Log()
    if error is None:
        strategy.start()
        assert strategy.plan.pool_tokens == pytest.approx(4_457_063, rel=0.01)
    else:
        with pytest.raises(error) as raised:
            strategy.start()
        failed = "rope_cos_sin" if error is OutOfMemory else "kv_pool"
        assert raised.value.allocation == failed
        if error is OutOfMemory:  # its angles, cosines and sines are part of it
            asked = raised.value.requested_bytes * SCALE
            assert asked == pytest.approx(144.92 * GIB, rel=0.001)
    strategy.stop()
    assert sum(log.bytes.values()) == 0


def test_vllm_starts_whole_and_refuses_in_its_own_words():
    strategy = vllm(gpu_memory_utilization=0.95, max_num_seqs=16, enforce_eager=True, usage="llm")
    strategy.start()
    assert strategy.footprint().committed_bytes * SCALE == pytest.approx(124.85 * GIB, rel=0.01)
    strategy.stop()
    refusing = vllm(TWO_HEADS, gpu_memory_utilization=0.95, max_num_seqs=16, enforce_eager=True)
    free = refusing.device.free_bytes()
    with pytest.raises(Refused, match="To serve at least one request") as error:
        refusing.start()
    assert error.value.requested_bytes * SCALE == pytest.approx(228.88 * GIB, rel=0.001)
    assert refusing.device.free_bytes() == free


def test_vllm_keeps_one_block_back_and_counts_by_blocks():
    strategy = vllm(context=1000, kv_cache_memory_bytes=64 * 16 * 12288)
    strategy.start()
    strategy.open(0, 1000)
    strategy.extend(0, 1)
    strategy.open(1, 1000)
    assert strategy.can_admit(62 * 16)
    assert not strategy.can_admit(62 * 16 + 1)
    strategy.extend(0, 15)
    assert strategy.can_admit(62 * 16)
    strategy.extend(0, 1)
    assert not strategy.can_admit(62 * 16)
    strategy.close(0)
    assert strategy.can_admit(63 * 16 - 8)


def test_running_requests_are_limited():
    strategy = sglang(max_running_requests=2, context=1000)
    strategy.start()
    strategy.open(0, 10)
    strategy.open(1, 10)
    assert not strategy.can_admit(10)
    with pytest.raises(Refused, match="2 requests"):
        strategy.open(2, 10)
    strategy.close(0)
    strategy.open(2, 10)


def test_an_emulation_is_never_read_by_kernels():
    strategy = sglang(max_running_requests=16)
    strategy.start()
    with pytest.raises(NotImplementedError, match="not in time"):
        strategy.batch([0])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=30), st.booleans())
def test_accounting_never_hands_out_more_than_the_pool(steps, paged):
    if paged:
        strategy = vllm(context=600, kv_cache_memory_bytes=64 * 16 * 12288)
    else:
        strategy = sglang(context=600, max_total_tokens=1024, page_size=4)
    strategy.start()
    plan = strategy.plan
    held = {}
    for sequence, tokens in steps:
        if sequence not in held:
            strategy.open(sequence, 600)
            held[sequence] = 0
        elif tokens % 7 == 0:
            strategy.close(sequence)
            del held[sequence]
            continue
        try:
            strategy.extend(sequence, tokens)
            held[sequence] += tokens
        except Refused:
            assert strategy.resident_tokens(sequence) == held[sequence]
        used = sum(-(-n // plan.slot_tokens) for n in held.values())
        assert used <= plan.slots
        assert all(strategy.resident_tokens(s) == n for s, n in held.items())
    strategy.device.close()


@pytest.mark.parametrize("make", [sglang, vllm])
def test_a_bad_flag_is_refused_before_anything_is_allocated(make):
    with pytest.raises(ValueError, match=r"version=9\.9: not allowed"):
        make(version="9.9")
