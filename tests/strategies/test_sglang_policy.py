"""SGLang's formulas against figures of real starts and of the released sources."""

import dataclasses

import pytest

from strategies.engine_model import GIB
from strategies.sglang_flags import SGLangFlags, resolve
from strategies.sglang_policy import (
    pool_sizes,
    request_limit,
    sglang_plan,
)
from strategies.sglang_tables import VERSIONS, decode_graph_batches, piecewise_sizes, request_table
from tests.strategies.engine_models import H200_BYTES, ONE_RANK, TWO_HEADS

FREE_BYTES = H200_BYTES - 724_369_408  # beside the context of a start, once the weights are read
SCOUT = dataclasses.replace(
    ONE_RANK,
    window_layers=36,
    window_tokens=8192,
    q_heads=5,
    tensor_parallel=8,
    architecture="Llama4ForConditionalGeneration",
)


def plan(context, model=ONE_RANK, **flags):
    return sglang_plan(model, SGLangFlags(**flags), context, H200_BYTES, FREE_BYTES)


def close(value, expected):
    return value == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("context", "flags", "rows", "graph_rows"),
    [
        (131_072, {}, 4097, 256),
        (10_000_000, {}, 2049, 256),
        (10_000_000, {"max_running_requests": 16}, 17, 16),
    ],
)
def test_a_real_start_is_reproduced(context, flags, rows, graph_rows):
    made = plan(context, **flags)
    assert made.settings["mem_fraction_static"] == 0.903
    assert close(made.pool_tokens, 10_133_095)
    assert made.named("req_to_token").shape == f"int32 [{rows}, {context + 4}]"
    assert made.named("page_table").shape == f"int32 [{graph_rows}, {context}]"
    # 1.09 GB to 1.15 GB in three models
    assert made.named("piecewise_cuda_graphs").nbytes == pytest.approx(1.12e9, rel=0.03)
    assert close(made.named("rope_cos_sin").nbytes, 4.77 * GIB)


def test_the_real_failure_at_ten_million_is_reproduced():
    made = plan(10_000_000)
    assert made.named("req_to_token").nbytes == 81_960_032_784
    before = ("loaded", "rope_cos_sin", "rope_leftover", "req_to_token")
    free = FREE_BYTES - ONE_RANK.weights_bytes - sum(made.named(n).nbytes for n in before)
    ((count, buffer_bytes),) = made.named("kv_pool").pieces
    assert count == 96
    assert close(buffer_bytes, 1_297_036_288)
    # 43 buffers, and 1.15 GiB that the 44th did not fit into
    assert close(free / buffer_bytes, 43 + 1_234_803_098 / 1_297_036_288)


def test_graphs_off_fail_at_the_same_byte():
    on, off = plan(10_000_000), plan(10_000_000, disable_cuda_graph=True)
    assert off.named("kv_pool") == on.named("kv_pool")
    assert off.named("req_to_token") == on.named("req_to_token")
    assert off.named("page_table") is None


def test_two_heads_start_with_half_the_tokens():
    made = plan(10_000_000, TWO_HEADS, max_running_requests=16)
    assert close(made.pool_tokens, 5_066_547)
    assert made.max_request_tokens == made.pool_tokens
    assert "fewer than the context" in made.notes[0]


def test_the_memory_at_ready_is_reproduced():
    # NVML at ready, without the 0.60 GiB that it showed before the start.
    for context, flags, ready in (
        (131_072, {}, 129.8),
        (10_000_000, {"max_running_requests": 16}, 128.2),
    ):
        made = plan(context, **flags)
        held = sum(i.nbytes for i in made.items) + ONE_RANK.weights_bytes
        assert close(held + H200_BYTES - FREE_BYTES, ready * GIB)


@pytest.mark.parametrize(
    ("version", "tensor_parallel", "fraction"),
    [
        ("0.4.6.post5", 8, 0.872),
        ("0.5.2", 8, 0.886),
        ("0.5.3", 8, 0.897),
        ("0.5.9", 8, 0.897),
        ("0.5.12.post1", 8, 0.893),
        ("0.5.12.post1", 1, 0.903),
        ("0.5.23", 8, 0.893),
    ],
)
def test_default_fraction(version, tensor_parallel, fraction):
    model = dataclasses.replace(ONE_RANK, tensor_parallel=tensor_parallel)
    made = resolve(model, SGLangFlags(version=version), H200_BYTES)
    assert made.mem_fraction_static == pytest.approx(fraction, abs=0.0005)


def test_the_reserve_of_one_rank_is_13904_mib():
    # 512 + 1.5 x 8192 + 2 x 256 + 1/8 x 1024 + 8 x 58
    assert piecewise_sizes(8192) == 58
    fraction = (143_771 - 13_904) / 143_771
    assert resolve(ONE_RANK, SGLangFlags(), H200_BYTES).mem_fraction_static == round(fraction, 3)


@pytest.mark.parametrize("version", VERSIONS)
def test_rows_of_the_request_table(version):
    extra = version in ("0.4.6.post5", "0.5.12.post1", "0.5.23")
    item = request_table(version, 10_000_000, 2048)
    assert item.nbytes == (2048 + extra) * 10_000_004 * 4
    if not extra:
        assert item.nbytes == 81_920_032_768


@pytest.mark.parametrize(
    ("backend", "graph_rows", "gib"),
    [("fa3", 512, 19.07), ("fa3", 16, 0.60), ("triton", 512, 42.9), ("flashinfer", 512, 23.8)],
)
def test_backend_tables(backend, graph_rows, gib):
    flags = {"version": "0.5.9", "attention_backend": backend, "cuda_graph_max_bs": graph_rows}
    made = plan(10_000_000, **flags)
    names = ("page_table", "cuda_graph_kv_indices", "cuda_graph_custom_mask")
    assert close(sum(i.nbytes for i in made.items if i.name in names), gib * GIB)


def test_request_limit_is_clamped_between_an_eighth_and_a_quarter_of_the_pool():
    flags, pool = SGLangFlags(), 10_133_095
    assert request_limit(flags, pool, pool // 8) == 4096
    assert request_limit(flags, pool, pool // 4) == 2048
    middle = request_limit(flags, pool, pool // 6)
    assert 2048 < middle < 4096
    assert request_limit(flags, pool, 10**9) == 2048


def test_a_wished_request_limit_by_version():
    assert request_limit(SGLangFlags("0.5.9", max_running_requests=9000), 10**7, 10**7) == 9000
    assert request_limit(SGLangFlags(max_running_requests=9000), 10**7, 10**7) == 2048
    assert request_limit(SGLangFlags("0.5.23", max_running_requests=9000), 10**7, 10**7) == 9000


def test_graph_batches_are_clamped_to_the_request_limit():
    assert max(decode_graph_batches("0.5.12.post1", 143_771, 256, 16)) == 16
    assert max(decode_graph_batches("0.5.2", 143_771, None, 4096)) == 256
    assert len(decode_graph_batches("0.5.12.post1", 143_771, 256, 4096)) == 36


def test_the_pool_never_depends_on_the_context():
    pools = {plan(c).pool_tokens for c in (131_072, 1_000_000, 10_000_000)}
    assert len(pools) == 1


def test_hybrid_pools_of_llama4():
    flags = SGLangFlags("0.5.2", hybrid_kvcache_ratio=0.9)
    settings = resolve(SCOUT, flags, H200_BYTES)
    flat = resolve(SCOUT, SGLangFlags("0.5.2"), H200_BYTES)
    free = FREE_BYTES - SCOUT.weights_bytes
    context = 10_000_000
    tokens = pool_sizes(SCOUT, SGLangFlags("0.5.2"), flat, context, FREE_BYTES, free).full
    pools = pool_sizes(SCOUT, flags, settings, context, FREE_BYTES, free)
    t = 0.1 + 0.9 * 8192 / context
    assert close(pools.full, 4 * tokens / (3 * t + 1))
    assert close(pools.window, 4 * tokens * t / (3 * t + 1))


def test_hybrid_pools_from_0_5_9_on_are_automatic():
    made = plan(10_000_000, SCOUT, version="0.5.9")
    flat = plan(10_000_000, SCOUT, version="0.5.9", disable_hybrid_swa_memory=True)
    assert close(made.pool_tokens, flat.pool_tokens * 48 / (12 + 36 * 0.8))
    assert close(made.named("kv_pool").nbytes, flat.named("kv_pool").nbytes)
    assert made.window_pool_tokens == int(made.pool_tokens * 0.8)
    assert made.named("swa_page_table").nbytes == made.named("page_table").nbytes


def test_only_some_models_get_a_pool_for_their_windows():
    gemma3 = dataclasses.replace(SCOUT, architecture="Gemma3ForCausalLM", window_kind="sliding")
    made, flat = plan(10_000_000, gemma3), plan(10_000_000, ONE_RANK)
    assert not made.settings["hybrid"] and made.window_pool_tokens == 0
    assert made.named("kv_pool").shape.startswith("96 x") and made.named("swa_page_table") is None
    assert flat.named("full_to_swa_index_mapping") is None


@pytest.mark.parametrize("version", VERSIONS)
def test_weights_beyond_the_fraction_are_refused(version):
    heavy = dataclasses.replace(ONE_RANK, weights_bytes=125 * GIB)
    made = plan(131_072, heavy, version=version, mem_fraction_static=0.5)
    assert made.refusal is not None
    assert "mem-fraction-static" in made.refusal.message


@pytest.mark.parametrize(
    "flags",
    [
        {"version": "0.5.10"},
        {"mem_fraction_static": 1.5},
        {"max_running_requests": 0},
        {"page_size": 0},
        {"attention_backend": "magic"},
    ],
)
def test_bad_flags_are_refused_in_one_line(flags):
    ((key, value),) = flags.items()
    with pytest.raises(ValueError, match="allowed") as error:
        SGLangFlags(**flags)
    assert f"{key}={value}" in str(error.value)
    assert "\n" not in str(error.value)
