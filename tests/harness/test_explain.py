"""harness.explain on the engines' real messages and on command lines."""

import pytest

from harness.explain_launch import parse_command
from harness.explain_log import read_log
from harness.explain_spec import known_version
from harness.hf_config import read_hf_config
from strategies.engine_model import GIB
from tests.harness.explain_case import (
    ARGS,
    OOM,
    SGLANG_LOG,
    TRACE,
    VLLM_LOG,
    answered,
    refused,
)


def test_the_real_failure_names_the_table_that_the_message_never_names(
    capsys, log_file, config_file
):
    rows, out = answered(capsys, log_file(SGLANG_LOG), "--config", config_file())
    assert "SGLang 0.5.12.post1 on NVIDIA H200" in rows["engine"]  # version by the source line
    assert "memory_pool.py:907 _create_buffers" in rows["log"]
    assert "kv_pool" in rows["failed"]
    assert "req_to_token: 76.33 GiB" in rows["ate"]
    assert "--max-running-requests" in rows["change"]
    assert "int32 [2049, 10000004]" in out and "FAILS" in out
    assert "differs" not in rows


def test_the_same_log_without_a_config_still_names_it(capsys, log_file):
    rows, _ = answered(capsys, log_file(SGLANG_LOG))
    assert "req_to_token: at least 76.33 GiB" in rows["ate"]
    assert "13.40 GiB are left" in rows["ate"]
    assert "--max-running-requests" in rows["change"]


def test_the_message_alone_is_enough(capsys, log_file):
    text = (
        ARGS.format(context=10000000, requests=None) + "memory_pool.py:907 _create_buffers\n" + OOM
    )
    rows, _ = answered(capsys, log_file(text))
    assert "kv_pool" in rows["failed"]
    assert "req_to_token" in rows["ate"]


@pytest.mark.parametrize(
    "command",
    [
        "sglang serve --model-path M --context-length 10000000 --kv-cache-dtype fp8_e4m3",
        "vllm serve M --max-model-len 10000000 --kv-cache-dtype fp8",
    ],
)
def test_the_command_says_whose_message_it_is(capsys, log_file, config_file, command):
    words = (log_file(OOM), "--command", command, "--config", config_file())
    rows, _ = answered(capsys, *words)
    assert command.split()[0] in rows["engine"].lower()
    assert "out of memory" in rows["log"]


def test_a_flag_is_taken_back_in_words(capsys, config_file):
    command = "vllm serve M --max-model-len 10000000 --kv-cache-dtype fp8 --max-num-seqs 16"
    command += " --kv-cache-memory-bytes 100000000000"
    rows, _ = answered(capsys, "--command", command, "--config", config_file(), "--gpu", "h200")
    assert rows["change"].partition("  (")[0].startswith("change")
    assert "without --kv-cache-memory-bytes " in rows["change"]


def test_a_failure_in_the_table_itself_is_named(log_file):
    text = ARGS.format(context=10000000, requests=None)
    text += TRACE.format(line=149, function="__init__") + OOM
    facts = read_log(text)
    assert facts.failed == "req_to_token"
    assert facts.launch.version == "0.5.12.post1"


def test_vllms_refusal(capsys, log_file, config_file):
    two_heads = config_file(num_key_value_heads=2)
    rows, out = answered(capsys, log_file(VLLM_LOG), "--config", two_heads, "--gpu", "h200")
    assert "vLLM 0.23.0" in rows["engine"]
    assert "refused: To serve at least one request" in rows["log"]
    assert "kv_pool (228.88 GiB)" in rows["failed"]
    assert "no flag lets it start at 10M; the longest that it accepts is " in rows["change"]
    assert "--max-model-len" in rows["change"]
    assert "REFUSED" in out


def test_a_log_of_a_start_says_so(capsys, log_file, config_file):
    text = ARGS.format(context=10000000, requests=16)
    text += "KV Cache is allocated. #tokens: 10133095, K size: 57.98 GB, V size: 57.98 GB\n"
    text += "The server is fired up and ready to roll!\n"
    rows, _ = answered(capsys, log_file(text), "--config", config_file(), "--gpu", "h200")
    assert "room for 10,13" in rows["starts"]
    assert "differs" not in rows and "change" not in rows


def test_a_pool_that_differs_from_the_formulas_is_said(capsys, log_file, config_file):
    text = ARGS.format(context=10000000, requests=16) + "KV Cache is allocated. #tokens: 9000000,\n"
    rows, _ = answered(capsys, log_file(text), "--config", config_file(), "--gpu", "h200")
    assert "9,000,000" in rows["differs"]


@pytest.mark.parametrize(
    "command",
    [
        "sglang serve --model-path x --context-length 10M --kv-cache-dtype fp8_e4m3",
        "python3 -m sglang.launch_server --model x --context-length=10000000 --tp 1 "
        "--kv-cache-dtype fp8_e4m3 --trust-remote-code",
        "CUDA_VISIBLE_DEVICES=0 /env/bin/python -m sglang.launch_server --model-path 'my model'"
        " \\\n --context-length 10000000 --kv-cache-dtype fp8_e4m3",
    ],
)
def test_a_command_of_sglang(capsys, config_file, command):
    rows, _ = answered(capsys, "--command", command, "--config", config_file(), "--gpu", "h200")
    assert "context 10,000,000" in rows["engine"]
    assert "req_to_token: 76.33 GiB" in rows["ate"]


def test_a_command_that_starts(capsys, config_file):
    command = "sglang serve --model x --context-length 10M --kv-cache-dtype fp8_e4m3 "
    command += "--max-running-requests 16"
    rows, _ = answered(capsys, "--command", command, "--config", config_file(), "--gpu", "h200")
    assert "10,13" in rows["starts"]


def test_a_command_of_vllm(capsys, config_file):
    command = "vllm serve org/model --max-model-len 10M --kv-cache-dtype fp8 -tp 1"
    path = config_file(num_key_value_heads=2)
    rows, _ = answered(capsys, "--command", command, "--config", path, "--gpu", "h200")
    assert "To serve at least one request" in rows["says"]
    module = "python -m vllm.entrypoints.openai.api_server --model x --max-model-len auto"
    module += " --max-num-seqs 16"
    rows, _ = answered(capsys, "--command", module, "--config", path, "--gpu", "h200")
    assert "room for" in rows["starts"]


NEEDS = "ValueError: To serve at least one request with the models's max seq len ({context}), "
NEEDS += "({needed} GiB KV cache is needed, which is larger than the available KV cache memory "
NEEDS += "({has} GiB). Try decreasing `max_model_len` when initializing the engine.\n"


def test_a_refusal_alone_needs_no_gpu(capsys, log_file):
    rows, _ = answered(capsys, log_file(VLLM_LOG))
    assert "vLLM 0.23.0 on a GPU" in rows["engine"]
    assert rows["needed"].endswith("228.88 GiB, 124.83 GiB available for K/V")


def test_a_pasted_line_and_the_command_that_gave_it(capsys, log_file, config_file):
    line = log_file(NEEDS.format(context=10_000_000, needed="228.88", has="124.83"))
    words = (line, "--config", config_file(num_key_value_heads=2), "--gpu", "h200")
    rows, _ = answered(capsys, *words)  # nothing says 8 bits
    assert "228.88 GiB by the log, 457.76 GiB by the formulas" in rows["differs"]
    command = "vllm serve m --kv-cache-dtype fp8 --gpu-memory-utilization 0.95 --enforce-eager"
    rows, _ = answered(capsys, *words, "--command", command)
    assert "context 10,000,000" in rows["engine"] and "differs" not in rows
    assert "kv_pool (228.88 GiB)" in rows["failed"]


SCOUT = {
    "architectures": ["Llama4ForConditionalGeneration"],
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "attention_chunk_size": 8192,
    "num_local_experts": 16,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "vocab_size": 202048,
}


@pytest.mark.parametrize(("context", "gib"), [(10_485_760, "240.00"), (1_048_576, "24.00")])
def test_what_the_field_reported_of_scout_on_eight_ranks(
    capsys, log_file, config_file, context, gib
):
    line = log_file(NEEDS.format(context=context, needed=gib, has="20.00"))
    words = (line, "--config", config_file(**SCOUT), "--gpu", "h200")
    rows, _ = answered(capsys, *words)
    assert "is it one of several ranks?" in rows["differs"]
    command = "vllm serve x --tp 8 --disable-hybrid-kv-cache-manager"
    rows, out = answered(capsys, *words, "--command", command, "--engine-version", "0.19.1")
    if gib == "240.00":
        assert "kv_pool (240.00 GiB)" in rows["failed"]
    assert "one request needs" not in out
    assert "the log has 20.00 GiB for K/V" in out


def test_what_vllm_says_when_nothing_is_left(capsys, log_file):
    text = "INFO vLLM API server version 0.23.0\nValueError: No available memory for the cache "
    rows, _ = answered(
        capsys, log_file(text + "blocks. Try increasing `gpu_memory_utilization`.\n")
    )
    assert "refused: No available memory" in rows["log"] and "kv_pool" in rows["failed"]


BUSY = (
    "ValueError: Free memory on device cuda:0 (100.00/139.80 GiB) on startup is less than desired "
    "GPU memory utilization (0.92, 128.62 GiB). Decrease GPU memory utilization.\n"
)


def test_a_gpu_that_others_hold(capsys, log_file, config_file):
    rows, _ = answered(capsys, log_file(BUSY))
    assert "NVIDIA H200" in rows["engine"] and "gpu_memory_utilization" in rows["failed"]
    assert "--gpu-memory-utilization 0.71" in rows["change"]  # 100.00 of 139.80 GiB
    command = "vllm serve x --kv-cache-dtype fp8 --max-model-len 131072"
    rows, _ = answered(capsys, log_file(BUSY), "--command", command, "--config", config_file())
    assert "gpu_memory_utilization (128.62 GiB)" in rows["failed"] and "differs" not in rows
    assert "--gpu-memory-utilization 0.7 " in rows["change"]


def test_the_message_without_a_context_says_what_is_missing(capsys, log_file):
    rows, out = answered(capsys, log_file("memory_pool.py:907 _create_buffers\n" + OOM))
    assert "kv_pool" in rows["failed"] and "ate" not in rows
    assert "req_to_token grows with it" in out
    command = "sglang serve --context-length 10M"
    rows, _ = answered(
        capsys, log_file("memory_pool.py:907 _create_buffers\n" + OOM), "--command", command
    )
    assert "0.5.12.post1" in rows["engine"] and "req_to_token: at least 76.33" in rows["ate"]


def test_sglangs_warning_of_a_short_pool_is_read(log_file):
    text = "sglang\nKV pool holds 5066547 tokens, fewer than --context-length 10000000\n"
    assert read_log(text).pool_tokens == 5_066_547


def test_an_item_larger_than_the_gpu_was_not_eaten_from(capsys, config_file):
    command = "sglang serve --context-length 1000G --kv-cache-dtype fp8"
    rows, _ = answered(capsys, "--command", command, "--config", config_file(), "--gpu", "h200")
    assert "rope_cos_sin alone exceeds the GPU" in rows["ate"]


def test_a_missing_flag_is_needed(capsys, config_file):
    words = ("--command", "sglang serve --model x", "--config", config_file())
    assert refused(capsys, *words) == (
        "harness.explain: --gpu is needed: h200, h100, a100-80, a100-40\n"
    )
    assert "--config is needed: " in refused(capsys, "--command", "vllm serve m", "--gpu", "h200")


def test_flags_that_are_not_read_are_named():
    made = parse_command("vllm serve m --port 80 --enable-lora --max-num-seqs 4 --port=81")
    assert made.flags == {"max_num_seqs": 4}
    assert made.notes == ["not read, as if no memory hung on it: port, enable_lora"]
    assert parse_command("sglang serve --model-path m --tp 2").notes == []


def test_what_is_not_modelled_is_said(capsys, config_file):
    made = parse_command("vllm serve m --kv-cache-dtype fp4_e2m1 -dp 2")
    assert made.notes[0].startswith("kv_cache_dtype=fp4_e2m1 is not modelled")
    assert made.notes[1].startswith("dp=2 is not modelled")
    ready = "The server is fired up and ready to roll!\n"
    assert read_log("Launching sglang server\n" + ready).launch.version == ""
    assert read_log("sglang 0.5.9\n" + ready).launch.version == "0.5.9"


def test_flags_of_both_engines_are_read():
    made = parse_command(
        "vllm serve m --tensor-parallel-size 8 --gpu-memory-utilization=0.95 --max-num-seqs 16 "
        "--no-disable-hybrid-kv-cache-manager --enforce-eager --max-num-batched-tokens 2k"
    )
    assert made.tensor_parallel == 8 and made.model == "m"
    assert made.flags == {
        "gpu_memory_utilization": 0.95,
        "max_num_seqs": 16,
        "hybrid_kv_cache_manager": True,
        "enforce_eager": True,
        "max_num_batched_tokens": 2000,
    }
    made = parse_command("sglang serve --chunked-prefill-size -1 --disable-cuda-graph --dp-size 2")
    assert made.flags == {"chunked_prefill_size": -1, "disable_cuda_graph": True}
    assert "dp_size=2 is not modelled" in made.notes[0]


def test_versions_between_those_that_are_modelled():
    assert known_version("sglang", "0.5.12.post1") == ("0.5.12.post1", "")
    version, note = known_version("sglang", "0.5.10")
    assert version == "0.5.9" and "0.5.10 is not modelled" in note
    assert known_version("vllm", "0.25.1")[0] == "0.23.0"
    assert known_version("vllm", "0.1")[0] == "0.11.0"


def test_weights_are_counted_from_the_shape(config_file):
    model = read_hf_config(config_file()).engine_model()
    assert model.weights_bytes == pytest.approx(3.99 * GIB, rel=0.001)
    # Qwen3-30B-A3B in FP8 on 8 ranks: 3.8 GB a rank, 12 KiB a token
    path = config_file(
        "qwen.json",
        architectures=["Qwen3MoeForCausalLM"],
        hidden_size=2048,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_experts=128,
        moe_intermediate_size=768,
        intermediate_size=6144,
        vocab_size=151936,
        quantization_config={"quant_method": "fp8"},
    )
    qwen = read_hf_config(path).engine_model(8, 1)
    assert qwen.weights_bytes == pytest.approx(3.9e9, rel=0.05)
    assert qwen.token_bytes == 12 * 1024 and qwen.moe and qwen.quantized


def test_windows_and_states_are_read(config_file):
    scout = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": {k: v for k, v in SCOUT.items() if k != "architectures"},
    }
    model = read_hf_config(config_file("scout.json", **scout)).engine_model(8, 2)
    assert (model.full_layers, model.window_layers, model.window_tokens) == (12, 36, 8192)
    assert model.window_kind == "chunked"
    assert model.weights_bytes == pytest.approx(25 * GIB, rel=0.1)
    path = config_file(
        "next.json",
        full_attention_interval=4,
        linear_num_value_heads=32,
        linear_num_key_heads=16,
        linear_key_head_dim=128,
        linear_value_head_dim=128,
        num_attention_heads=16,
    )
    following = read_hf_config(path).engine_model(8, 1)
    assert following.layers == 12
    assert following.state_bytes_per_request == pytest.approx(9.21 * (1 << 20), rel=0.01)
    sliding = config_file("gemma.json", layer_types=["sliding_attention", "full_attention"] * 24,
                     sliding_window=1024)  # fmt: skip
    assert read_hf_config(sliding).engine_model().window_layers == 24


def test_vllm_0_11_takes_the_hybrid_manager_from_the_environment(capsys, config_file):
    command = "vllm serve x --tp 8 --max-model-len 10M --kv-cache-dtype fp8"
    words = ("--command", command, "--config", config_file(**SCOUT), "--gpu", "h200")
    rows, _ = answered(capsys, *words, "--engine-version", "0.11.0")
    assert "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE=1" in rows["change"]


def test_a_vision_tower_is_not_modelled_for_sglang(capsys, config_file):
    path = config_file("vlm.json", vision_config={"hidden_size": 1408})
    words = ("--config", path, "--gpu", "h200", "--command")
    for command, said in (("sglang serve --model x", True), ("vllm serve x", False)):
        assert ("vision tower" in answered(capsys, *words, command)[1]) == said
