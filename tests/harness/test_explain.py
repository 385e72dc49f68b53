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
    rows, _ = answered(capsys, "--command", module, "--config", path, "--gpu", "h200")
    assert "room for" in rows["starts"]


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
        "text_config": {
            "hidden_size": 5120,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "attention_chunk_size": 8192,
            "num_local_experts": 16,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "vocab_size": 202048,
        },
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
