"""vLLM's formulas against figures of real starts and messages from the field."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strategies.engine_model import GIB, EngineModel
from strategies.vllm_flags import VLLMFlags, resolve
from strategies.vllm_policy import kv_groups, vllm_plan
from strategies.vllm_tables import VERSIONS
from tests.strategies.engine_models import H200_BYTES, ONE_RANK, TWO_HEADS

FREE_BYTES = H200_BYTES - round(0.6 * GIB)
SCOUT = EngineModel(
    layers=48,
    kv_heads=1,
    q_heads=5,
    head_dim=128,
    kv_itemsize=2,
    window_layers=36,
    window_tokens=8192,
    moe=True,
    architecture="Llama4ForConditionalGeneration",
)


def plan(context, model=ONE_RANK, **flags):
    return vllm_plan(model, VLLMFlags(**flags), context, H200_BYTES, FREE_BYTES)


def close(value, expected):
    return value == pytest.approx(expected, rel=0.01)


REAL = {"enforce_eager": True, "usage": "llm"}


def test_a_real_start_at_131072_is_reproduced():
    made = plan(131_072, gpu_memory_utilization=0.9, **REAL)
    assert made.refusal is None
    assert close(made.pool_tokens / 16, 643_679)
    assert close(made.named("kv_pool").nbytes, 117.86 * GIB)
    held = sum(i.nbytes for i in made.items if i.location == "device") + ONE_RANK.weights_bytes
    # NVML at ready less the 0.60 GiB before it; the CUDA context is the rest.
    assert held / GIB == pytest.approx(125.6 - 1.0, abs=1.0)


def test_a_real_start_at_ten_million_is_reproduced():
    made = plan(10_000_000, gpu_memory_utilization=0.95, max_num_seqs=16, **REAL)
    assert close(made.pool_tokens, 10_909_504)
    assert close(made.named("kv_pool").nbytes, 124.85 * GIB)
    for name in ("block_tables", "input_block_tables"):
        assert close(made.named(name).nbytes, 16 * 625_000 * 4)
    assert made.named("all_token_ids").location == "host_pinned"


def test_the_real_refusal_at_24_kib_is_reproduced():
    made = plan(10_000_000, TWO_HEADS, gpu_memory_utilization=0.95, max_num_seqs=16, **REAL)
    needed, available = (
        float(x) for x in re.findall(r"\(([\d.]+) GiB", made.refusal.message.replace("((", "("))
    )
    assert needed == 228.88
    assert close(available, 124.83)
    assert made.refusal.needed_bytes == 625_000 * 16 * 24 * 1024


@pytest.mark.parametrize("version", VERSIONS)
def test_scout_needs_240_gib_for_ten_mebitokens(version):
    flags = {
        "version": version,
        "hybrid_kv_cache_manager": False,
        "kv_cache_memory_bytes": round(88.38 * GIB),
    }
    made = plan(10_485_760, SCOUT, **flags)
    assert "(10485760), (240.00 GiB KV cache is needed" in made.refusal.message
    assert "memory (88.38 GiB)" in made.refusal.message
    (estimate,) = re.findall(r"estimated maximum model length is (\d+)", made.refusal.message)
    assert abs(int(estimate) - 3_861_424) <= 220 + 16


def test_scout_needs_24_gib_for_a_mebitoken():
    flags = {"hybrid_kv_cache_manager": False, "kv_cache_memory_bytes": GIB}
    assert plan(1_048_576, SCOUT, **flags).refusal.needed_bytes == 24 * GIB


def test_the_hybrid_manager_holds_one_window_of_local_layers():
    flags = {"kv_cache_memory_bytes": GIB, "max_num_batched_tokens": 8192}
    needed = plan(10_485_760, SCOUT, **flags).refusal.needed_bytes
    page = 16 * 2 * 128 * 2
    full, window = 10_485_760 // 16, (8192 + 8192) // 16
    assert needed == 12 * page * (full + 3 * window)


def test_the_hybrid_manager_is_off_for_chunked_layers_in_0_11_0():
    settings = {v: resolve(SCOUT, VLLMFlags(v), 10**7, H200_BYTES) for v in VERSIONS}
    assert [settings[v].hybrid for v in VERSIONS] == [False, True, True, True]
    groups = kv_groups(SCOUT, settings["0.23.0"])
    assert (groups.layers, groups.full, groups.window) == (12, 1, 3)
    assert kv_groups(SCOUT, settings["0.11.0"]).layers == 48


def test_sliding_windows_hold_one_block_more():
    model = dataclasses.replace(SCOUT, window_kind="sliding", window_tokens=4096)
    flags = {"kv_cache_memory_bytes": GIB, "max_num_batched_tokens": 8192, "version": "0.11.0"}
    needed = plan(10_000_000, model, **flags).refusal.needed_bytes
    window = -(-(4095 + 8192) // 16) + 1
    assert needed == 12 * 16 * 512 * (625_000 + 3 * window)


@pytest.mark.parametrize(
    ("flags", "model", "names", "gib"),
    [
        ({"version": "0.19.1", "max_num_seqs": 256}, ONE_RANK, ("block_tables",), 0.60),
        ({"version": "0.19.1"}, ONE_RANK, ("block_tables",), 2.38),
        ({"version": "0.19.1", "max_num_seqs": 256}, SCOUT, ("block_tables",), 2.38),
        ({"version": "0.19.1"}, SCOUT, ("block_tables",), 9.54),
        (
            {"version": "0.33.0", "max_num_seqs": 256},
            SCOUT,
            ("block_tables", "input_block_tables"),
            4.77,
        ),
        ({"version": "0.33.0"}, SCOUT, ("block_tables", "input_block_tables"), 19.07),
        ({"version": "0.19.1"}, ONE_RANK, ("token_ids_cpu", "is_token_ids"), 47.7),
        (
            {"version": "0.19.1", "attention_backend": "flashinfer"},
            ONE_RANK,
            ("paged_kv_indices",),
            2.38,
        ),
        ({"version": "0.19.1"}, ONE_RANK, ("rope_cos_sin",), 2.38),
    ],
)
def test_tables(flags, model, names, gib):
    made = plan(10_000_000, dataclasses.replace(model, kv_itemsize=1), **flags)
    assert close(sum(i.nbytes for i in made.items if i.name in names), gib * GIB)


def test_default_utilization_and_sequences():
    for version, utilization in zip(VERSIONS, (0.9, 0.9, 0.92, 0.92), strict=True):
        made = resolve(ONE_RANK, VLLMFlags(version), 10**7, H200_BYTES)
        assert (made.gpu_memory_utilization, made.max_num_seqs) == (utilization, 1024)
    small = resolve(ONE_RANK, VLLMFlags(), 10**7, 40 * GIB)
    assert (small.max_num_seqs, small.max_num_batched_tokens) == (256, 2048)


def test_runners():
    llama = {v: resolve(ONE_RANK, VLLMFlags(v), 10**7, H200_BYTES).v2_runner for v in VERSIONS}
    scout = {v: resolve(SCOUT, VLLMFlags(v), 10**7, H200_BYTES).v2_runner for v in VERSIONS}
    assert list(llama.values()) == [False, False, True, True]
    assert list(scout.values()) == [False, False, False, True]


def test_auto_starts_with_the_largest_length_that_fits():
    pool = {"kv_cache_memory_bytes": 100 * GIB}
    made = plan(10_000_000, TWO_HEADS, max_model_len="auto", **pool)
    assert made.refusal is None
    assert made.max_request_tokens < 10_000_000
    length = made.max_request_tokens
    assert plan(length, TWO_HEADS, **pool).refusal is None
    assert plan(length + 16, TWO_HEADS, **pool).refusal is not None


@pytest.mark.parametrize(
    ("context", "flags", "crashes"),
    [
        (131_072, {}, False),
        (10_000_000, {}, True),
        (10_000_000, {"max_num_seqs": 16}, False),  # so far as three real starts went
        (10_000_000, {"max_num_seqs": 215}, False),
        (10_000_000, {"max_num_seqs": 216}, True),
        (10_000_000, {"version": "0.33.0"}, False),
    ],
)
def test_a_row_of_tokens_beyond_32_bits_crashes_the_v2_runner(context, flags, crashes):
    made = plan(context, **flags)
    assert made.refusal is None and bool(made.fault) == crashes
    assert "max_num_seqs=215 or fewer" in (made.fault or "max_num_seqs=215 or fewer")


def test_the_v1_runner_has_no_such_rows():
    moe = dataclasses.replace(ONE_RANK, moe=True, architecture="Qwen3MoeForCausalLM")
    assert not plan(10_000_000, moe).fault


def test_an_occupied_gpu_is_refused():
    made = vllm_plan(ONE_RANK, VLLMFlags(), 131_072, H200_BYTES, 100 * GIB)
    assert "is less than desired GPU memory utilization (0.92" in made.refusal.message


@given(st.integers(1, 2**24), st.integers(1, 2**24))
def test_a_longer_context_never_needs_less(a, b):
    low, high = sorted((a, b))
    flags = {"kv_cache_memory_bytes": 1, "max_num_batched_tokens": 8192}
    needed = [plan(c, SCOUT, **flags).refusal.needed_bytes for c in (low, high)]
    assert needed[0] <= needed[1]


@pytest.mark.parametrize(
    "flags",
    [
        {"version": "0.5"},
        {"gpu_memory_utilization": 0},
        {"max_num_seqs": 0},
        {"max_model_len": "long"},
        {"usage": "both"},
    ],
)
def test_bad_flags_are_refused_in_one_line(flags):
    ((key, value),) = flags.items()
    with pytest.raises(ValueError, match="allowed") as error:
        VLLMFlags(**flags)
    assert f"{key}={value}" in str(error.value)


def takes(block_size, **flags):
    try:
        VLLMFlags(block_size=block_size, **flags)
    except ValueError as refused:
        assert str(refused).startswith(f"vllm block_size={block_size}: not allowed; allowed: ")
        return False
    return True


def test_blocks_are_what_the_version_and_its_backends_take():
    sizes = [0, 1, 7, 8, 15, 16, 16.0, True, 24, 32, 48, 64, 96, 128, 256, 512, 4096, 4112]
    taken = {v: [s for s in sizes if takes(s, version=v)] for v in VERSIONS}
    listed = [16, 32, 64, 128]
    assert taken["0.11.0"] == listed
    assert taken["0.19.1"] == [*listed, 256]
    assert taken["0.23.0"] == taken["0.33.0"] == [16, 32, 48, 64, 96, 128, 256, 512, 4096]
