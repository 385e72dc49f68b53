"""Configurations as plain numbers: what words mean, and what a device is."""

from __future__ import annotations

import pytest

from harness.options import engine_model
from harness.sizes import BadValue
from tests.harness.composed import made


def test_sizes_of_the_modelled_device_and_of_its_scale_model():
    report = made("strategy=static", "context=10M")
    assert report.scale == 192 and report.on_host and report.basis == "scale_model"
    assert report.kv_model().token_bytes == 128
    assert report.full_model().token_bytes == 24 * 1024
    assert report.kv_model().groups[0].chunk_bytes == 360_448
    assert 740 < report.device_bytes / 2**20 < 746
    half = made("hardware.capacity=70GiB")
    assert half.device_bytes == 70 * 2**30 // 192
    bf16 = made("model.kv_dtype=bf16")
    assert bf16.scale == 192 and bf16.kv_model().token_bytes == 256
    assert made("hardware.models=h100").hardware.device_name == "NVIDIA H100 80GB HBM3"


def test_context_and_fill():
    assert made("context=10M").contexts == tuple(
        10_000_000 * p // 100 for p in (1, 2, 5, 10, 20, 50, 100)
    )
    assert made("context=10Mi").context_tokens == 10_485_760
    assert made("context=3").contexts == (1, 3)
    assert made("sweep.contexts=[1M,1M,2Ki]").contexts == (2048, 1_000_000)
    assert made("fill=[1,0.1,0.1]").fills == (0.1, 1.0)
    assert made("fill=0").fills == (0.0,)
    assert made().fills is None


def test_heads_are_replicated_when_there_are_fewer_than_ranks():
    four = made("model=qwen3_30b_a3b")
    assert four.full_model().token_bytes == 12 * 1024
    assert made("model=qwen3_30b_a3b", "parallel.ranks=4").full_model().token_bytes == 12 * 1024
    assert made("model=qwen3_30b_a3b", "parallel.ranks=2").full_model().token_bytes == 24 * 1024


def test_rows_of_earlier_runs_are_an_experiment_of_their_own():
    judged = made("claims.from=[a]")
    assert judged.claims_from == ("a",) and judged.experiment == "claims"
    assert made("claims.from=[a]", "experiment.name=mine").experiment == "mine"
    assert made().experiment == "sweep"


@pytest.mark.parametrize(
    ("word", "allowed"),
    [
        ("hardware.capacity=1", "at least 192 bytes"),
        ("hardware.capacity=150GB", "up to 149"),
        ("hardware.index=-1", "0 to"),
        ("hardware.kind=tpu", "auto, cuda, scale_model"),
        ("hardware.models=b200", "h100, h200"),
        ("strategy.growth=fast", "sync, ahead"),
        ("strategy.low_water=-1", "a size"),
        ("experiment.name=../up", "letters"),
        ("results=''", "a folder"),
        ("seed=-1", "0 to"),
        ("fill=.nan", "from 0 to 1"),
        ("fill=[]", "1 to 100 values"),
        ("sweep.points=[0]", "above 0"),
        ("sweep.contexts=[1M,x]", "tokens"),
        ("sweep.repeats=0", "1 to 100"),
        ("trial.page_tokens=12", "16, 32, 64, 128"),
        ("trial.arena=malloc", "auto, mmap"),
        ("trial.timeout_seconds=.nan", "0.1 to"),
        ("trial.chunk_target=1KiB", "1048576"),
        ("fault.kind=boom", "segfault"),
        ("fault.phase=ready", "pool"),
        ("model.head_dim=7", "64, 128 or 256"),
        ("model.kv_dtype=fp4", "fp8_e4m3, bf16"),
        ("model.kv_heads_total=3", "multiple or divisor of 8"),
        ("model.hybrid=true", "local_layers"),
        ("parallel.ranks=0", "1"),
        ("claims.from=[]", "1 to 100"),
        ("claims.from=3", "folders"),
    ],
)
def test_values_out_of_range(word, allowed):
    key, _, _ = word.partition("=")
    with pytest.raises(BadValue) as refused:
        made(word)
    assert refused.value.key == key
    assert allowed in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "key", "allowed"),
    [
        (["parallel.ranks=3"], "parallel.ranks", "1, 2, 4, 8, 16, 32, 64 with 64 query"),
        (["parallel.ranks=128"], "parallel.ranks", "1, 2, 4, 8, 16, 32, 64 with"),
        (
            ["parallel.ranks=6", "parallel=context", "parallel.context_ranks=2"],
            "parallel.ranks",
            "2, 4, 8, 16, 32, 64",
        ),
        (["parallel.ranks=5", "model=llama4_scout"], "parallel.ranks", "1, 2, 4, 8"),
        (["model.q_heads_total=63"], "model.q_heads_total", "a multiple of 8 ranks"),
        (["parallel.ranks=3", "model.head_dim=7"], "model.head_dim", "64, 128 or 256"),
    ],
)
def test_what_was_typed_is_what_does_not_fit(words, key, allowed):
    with pytest.raises(BadValue) as refused:
        made(*words)
    assert refused.value.key == key and allowed in refused.value.allowed
    if key == "parallel.ranks":  # and what is said to be allowed is
        context = [w for w in words if "context" in w]
        model = [w for w in words if w.startswith("model=")]
        for ranks in refused.value.allowed.partition(" with")[0].split(", "):
            made(f"parallel.ranks={ranks}", *context, *model)


@pytest.mark.parametrize(
    "words",
    [
        ["fault.kind=hidden_allocation"],
        ["fault.kind=hidden_allocation", "fault.bytes=0"],
        ["fault.kind=hidden_allocation", "fault.bytes=1MiB", "fault.phase=context"],
        ["strategy=static", "strategy.mem_fraction=0"],
        ["strategy=static", "strategy.mem_fraction=1.1"],
        ["strategy=static", "strategy.mem_fraction_of=gpu"],
        ["model=llama4_scout", "model.window_tokens=100"],
    ],
)
def test_values_that_do_not_go_together(words):
    with pytest.raises(BadValue):
        made(*words)


def test_qwen3_next_brings_the_state_of_its_linear_layers():
    rank = engine_model(made("strategy=sglang", "model=qwen3_next_80b"))
    assert rank.state_bytes_per_request == pytest.approx(9.21 * (1 << 20), rel=0.001)
    assert engine_model(made("strategy=sglang")).state_bytes_per_request == 0
