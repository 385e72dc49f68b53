"""harness.explain on the engines' real messages, on command lines, and on hostile files."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.explain import main
from harness.explain_launch import parse_command
from harness.explain_log import read_log
from harness.explain_spec import known_version
from harness.hf_config import read_hf_config
from harness.safe_text import MAX_CONFIG_BYTES, MAX_LOG_BYTES
from harness.sizes import BadValue
from strategies.engine_model import GIB

ONE_RANK = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 13312,
    "num_hidden_layers": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 10000000,
    "tie_word_embeddings": False,
}
ARGS = (
    "server_args=ServerArgs(model_path='/models/one-rank', load_format='dummy', "
    "trust_remote_code=False, context_length={context}, kv_cache_dtype='fp8_e4m3', "
    "mem_fraction_static=0.903, max_running_requests={requests}, max_total_tokens=None, "
    "chunked_prefill_size=8192, page_size=1, tp_size=1, dp_size=1, attention_backend='fa3', "
    "disable_cuda_graph=False, cuda_graph_max_bs=256)\n"
)
OOM = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.21 GiB. GPU 0 has a total "
    "capacity of 139.80 GiB of which 1.15 GiB is free. Including non-PyTorch memory, this process "
    "has 138.64 GiB memory in use.\n"
)
TRACE = """Traceback (most recent call last):
  File "/env/sglang/srt/managers/scheduler.py", line 3500, in run_scheduler_process
    scheduler = Scheduler(
  File "/env/sglang/srt/mem_cache/memory_pool.py", line 832, in __init__
    self._create_buffers()
  File "/env/sglang/srt/mem_cache/memory_pool.py", line {line}, in {function}
    torch.zeros(
  File "/env/torch/utils/_device.py", line 116, in __torch_function__
    return func(*args, **kwargs)
"""
SGLANG_LOG = (
    ARGS.format(context=10000000, requests=None)
    + "Load weight begin. avail mem=138.12 GB\n"
    + "Load weight end. elapsed=3.20 s, type=LlamaForCausalLM, avail mem=129.36 GB, "
    + "mem usage=8.76 GB.\n"
    + TRACE.format(line=907, function="_create_buffers")
    + OOM
)
VLLM_LOG = (
    "INFO [utils.py:233] non-default args: {'model': '/models/one-rank', 'max_model_len': 10000000,"
    " 'gpu_memory_utilization': 0.95, 'kv_cache_dtype': 'fp8_e4m3', 'max_num_seqs': 16, "
    "'enforce_eager': True}\n"
    "INFO [core.py:114] Initializing a V1 LLM engine (v0.23.0) with config: "
    "model='/models/one-rank', max_seq_len=10000000, tensor_parallel_size=1, "
    "kv_cache_dtype=fp8_e4m3\n"
    "INFO [model_runner.py:320] Model loading took 6.38 GiB and 1.100000 seconds\n"
    "INFO [gpu_worker.py:480] Available KV cache memory: 124.83 GiB\n"
    "ERROR [core.py:700] ValueError: To serve at least one request with the model's max seq len "
    "(10000000), (228.88 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (124.83 GiB). Based on the available memory, the estimated maximum model length is "
    "5453888. Try increasing `gpu_memory_utilization` or decreasing `max_model_len` when "
    "initializing the engine.\n"
)


@pytest.fixture
def config(tmp_path):
    def write(name="config.json", **changed):
        path = tmp_path / name
        path.write_text(json.dumps({**ONE_RANK, **changed}))
        return str(path)

    return write


@pytest.fixture
def log(tmp_path):
    def write(text, name="start.log"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def ask(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def answered(capsys, *words):
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    return {line.split()[0]: line for line in reversed(out.split("\n\n")[0].splitlines())}, out


def refused(capsys, *words):
    code, out, err = ask(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("harness.explain: ") and err.count("\n") == 1
    return err


def test_the_real_failure_names_the_table_that_the_message_never_names(capsys, log, config):
    rows, out = answered(capsys, log(SGLANG_LOG), "--config", config())
    assert "SGLang 0.5.12.post1 on NVIDIA H200" in rows["engine"]  # version by the source line
    assert "memory_pool.py:907 _create_buffers" in rows["log"]
    assert "kv_pool" in rows["failed"]
    assert "req_to_token: 76.33 GiB" in rows["ate"]
    assert "--max-running-requests" in rows["change"]
    assert "int32 [2049, 10000004]" in out and "FAILS" in out
    assert "differs" not in rows


def test_the_same_log_without_a_config_still_names_it(capsys, log):
    rows, _ = answered(capsys, log(SGLANG_LOG))
    assert "req_to_token: at least 76.33 GiB" in rows["ate"]
    assert "13.40 GiB are left" in rows["ate"]
    assert "--max-running-requests" in rows["change"]


def test_the_message_alone_is_enough(capsys, log):
    text = (
        ARGS.format(context=10000000, requests=None) + "memory_pool.py:907 _create_buffers\n" + OOM
    )
    rows, _ = answered(capsys, log(text))
    assert "kv_pool" in rows["failed"]
    assert "req_to_token" in rows["ate"]


def test_a_failure_in_the_table_itself_is_named(log):
    text = ARGS.format(context=10000000, requests=None)
    text += TRACE.format(line=149, function="__init__") + OOM
    facts = read_log(text)
    assert facts.failed == "req_to_token"
    assert facts.launch.version == "0.5.12.post1"


def test_vllms_refusal(capsys, log, config):
    two_heads = config(num_key_value_heads=2)
    rows, out = answered(capsys, log(VLLM_LOG), "--config", two_heads, "--gpu", "h200")
    assert "vLLM 0.23.0" in rows["engine"]
    assert "refused: To serve at least one request" in rows["log"]
    assert "kv_pool (228.88 GiB)" in rows["failed"]
    assert "--max-model-len" in rows["change"]
    assert "REFUSED" in out


def test_a_log_of_a_start_says_so(capsys, log, config):
    text = ARGS.format(context=10000000, requests=16)
    text += "KV Cache is allocated. #tokens: 10133095, K size: 57.98 GB, V size: 57.98 GB\n"
    text += "The server is fired up and ready to roll!\n"
    rows, _ = answered(capsys, log(text), "--config", config(), "--gpu", "h200")
    assert "room for 10,13" in rows["starts"]
    assert "differs" not in rows and "change" not in rows


def test_a_pool_that_differs_from_the_formulas_is_said(capsys, log, config):
    text = ARGS.format(context=10000000, requests=16) + "KV Cache is allocated. #tokens: 9000000,\n"
    rows, _ = answered(capsys, log(text), "--config", config(), "--gpu", "h200")
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
def test_a_command_of_sglang(capsys, config, command):
    rows, _ = answered(capsys, "--command", command, "--config", config(), "--gpu", "h200")
    assert "context 10,000,000" in rows["engine"]
    assert "req_to_token: 76.33 GiB" in rows["ate"]


def test_a_command_that_starts(capsys, config):
    command = "sglang serve --model x --context-length 10M --kv-cache-dtype fp8_e4m3 "
    command += "--max-running-requests 16"
    rows, _ = answered(capsys, "--command", command, "--config", config(), "--gpu", "h200")
    assert "10,13" in rows["starts"]


def test_a_command_of_vllm(capsys, config):
    command = "vllm serve org/model --max-model-len 10M --kv-cache-dtype fp8 -tp 1"
    path = config(num_key_value_heads=2)
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


def test_weights_are_counted_from_the_shape(config):
    model = read_hf_config(config()).engine_model()
    assert model.weights_bytes == pytest.approx(3.99 * GIB, rel=0.001)
    # Qwen3-30B-A3B in FP8 on 8 ranks: 3.8 GB a rank, 12 KiB a token
    path = config(
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


def test_windows_and_states_are_read(config):
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
    model = read_hf_config(config("scout.json", **scout)).engine_model(8, 2)
    assert (model.full_layers, model.window_layers, model.window_tokens) == (12, 36, 8192)
    assert model.window_kind == "chunked"
    assert model.weights_bytes == pytest.approx(25 * GIB, rel=0.1)
    path = config(
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
    sliding = config("gemma.json", layer_types=["sliding_attention", "full_attention"] * 24,
                     sliding_window=1024)  # fmt: skip
    assert read_hf_config(sliding).engine_model().window_layers == 24


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"hidden_size": 1024, "num_hid',
        b"[]",
        b"\x00\x01\x02" * 100,
        b"\xff\xfe" * 1000,
        b"[" * 100_000,
        b'{"a":' * 50 + b"1" + b"}" * 50,
        b'{"hidden_size": -1, "num_attention_heads": 8, "num_hidden_layers": 1}',
        b'{"hidden_size": "x; rm -rf /", "num_attention_heads": 8, "num_hidden_layers": 1}',
        b'{"hidden_size": 1e400, "num_attention_heads": 8, "num_hidden_layers": 1}',
        json.dumps({**ONE_RANK, "_target_": "os.system", "args": ["touch owned"]}).encode(),
        json.dumps({**ONE_RANK, "architectures": ["../../../etc/passwd"]}).encode(),
        json.dumps({**ONE_RANK, "kv_lora_rank": 512}).encode(),
        json.dumps({**ONE_RANK, "num_hidden_layers": 10**15}).encode(),
        json.dumps({**ONE_RANK, "partial_rotary_factor": "NaN"}).encode(),
    ],
)
def test_hostile_configs_are_refused_in_one_line(capsys, tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    err = refused(
        capsys, "--command", "sglang serve --model x", "--config", str(path), "--gpu", "h200"
    )
    assert "--config" in err and "allowed" in err
    assert os.listdir(tmp_path) == ["config.json"]


def test_huge_files_are_refused_unread(capsys, tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    assert "bytes" in refused(
        capsys, "--command", "sglang serve", "--config", str(path), "--gpu", "h200"
    )
    with path.open("wb") as file:
        file.truncate(MAX_LOG_BYTES + 1)
    assert "bytes" in refused(capsys, str(path))


def test_things_that_are_no_files_are_refused(capsys, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in ("/dev/zero", str(tmp_path / "fifo"), str(tmp_path), str(tmp_path / "none"), "\0"):
        assert "LOG=" in refused(capsys, path)


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\0" * 100, b"\xff" * 5000, b"GIF89a" * 9])
def test_files_that_are_no_logs_are_refused(capsys, log, content):
    refused(capsys, log(content))


def test_a_log_cannot_make_it_open_or_run_anything(capsys, log, config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = SGLANG_LOG.replace("/models/one-rank", "../../etc/passwd")
    text = text.replace("trust_remote_code=False", "_target_='os.system', x='$(touch owned)'")
    rows, _ = answered(capsys, log(text), "--config", config())
    assert "req_to_token" in rows["ate"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "start.log"]


def test_a_truncated_log_is_read_as_far_as_it_goes(capsys, log, config):
    rows, _ = answered(capsys, log(SGLANG_LOG[:-40]), "--config", config(), "--gpu", "h200")
    assert "kv_pool" in rows["failed"]
    cut = SGLANG_LOG[: SGLANG_LOG.index("Traceback")]
    rows, _ = answered(capsys, log(cut), "--config", config(), "--gpu", "h200")
    assert "req_to_token" in rows["ate"]


def test_long_lines_and_many_are_read_to_their_end():
    found = read_log("server_args=ServerArgs(" + "a='" * 300_000 + "\n" + "sglang " * 200_000)
    assert (found.launch.engine, found.launch.flags) == ("sglang", {})
    found = read_log("sglang\n" + ("Tried to allocate " * 10 + "\n") * 20_000)
    assert (found.outcome, found.tried_bytes) == ("unknown", 0)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--command", "ls -la"], "--command"),
        (["--command", "sglang serve 'unclosed"], "quotes"),
        (["--command", "x" * 40_000], "characters"),
        (["--command", "sglang serve --context-length -5"], "context_length"),
        (["--command", "sglang serve --mem-fraction-static lots"], "mem_fraction_static"),
        (["--command", "sglang serve --mem-fraction-static 7"], "mem_fraction_static"),
        (["--command", "vllm serve m --max-num-seqs 1e9"], "max_num_seqs"),
        (["--command", "sglang serve --attention-backend magic"], "attention_backend"),
        (["--command", "sglang serve --tp 3"], "tensor_parallel"),
        ([], "LOG"),
    ],
)
def test_bad_commands_are_one_line(capsys, config, words, what):
    if words:
        words = [*words, "--config", config(), "--gpu", "h200"]
    assert what in refused(capsys, *words)


def test_a_gpu_and_a_config_are_asked_for(capsys, config):
    assert "h200" in refused(capsys, "--command", "sglang serve", "--config", config())
    assert "h200" in refused(capsys, "--command", "sglang serve", "--gpu", "z80")
    assert "--config" in refused(capsys, "--command", "vllm serve m", "--gpu", "h200")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=400))
def test_any_text_is_read_or_refused(text):
    try:
        facts = read_log(text + "\nsglang")
    except BadValue:
        return
    assert facts.outcome in ("ok", "oom", "refused", "unknown")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SGLANG_LOG.splitlines() + VLLM_LOG.splitlines()), max_size=12))
def test_lines_in_any_order_are_read(found):
    try:
        facts = read_log("\n".join(found))
    except BadValue:
        assert not found or all("sglang" not in line for line in found)
        return
    assert facts.launch.engine in ("sglang", "vllm")
