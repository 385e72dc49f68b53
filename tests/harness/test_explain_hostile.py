"""harness.explain on hostile files, and on words that are no command."""

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.explain_log import read_log
from harness.safe_text import MAX_CONFIG_BYTES, MAX_LOG_BYTES
from harness.sizes import BadValue
from tests.harness.explain_case import (
    ONE_RANK,
    OOM,
    SGLANG_LOG,
    TRACE,
    VLLM_LOG,
    answered,
    refused,
)


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
def test_files_that_are_no_logs_are_refused(capsys, log_file, content):
    refused(capsys, log_file(content))


PROSE = (
    b"# README\nvLLM pages, SGLang (memory_pool.py) allocates and runs out of memory at start-up.\n"
    b"Set gpu_memory_utilization, or --mem-fraction-static; a GPU KV cache size is in tokens.\n"
)


@pytest.mark.parametrize("gpu", [[], ["--gpu", "h200"], ["--gpu", "h100"]])
def test_prose_about_engines_is_no_log(capsys, log_file, gpu):
    assert "out-of-memory message or refusal" in refused(capsys, log_file(PROSE), *gpu)


@pytest.mark.parametrize(
    "message",
    [
        OOM,
        "RuntimeError: CUDA error: out of memory",
        "RuntimeError: CUDA driver error: out of memory",
        "NCCL WARN Cuda failure 2 'out of memory'",
    ],
)
def test_the_message_alone_is_enough(message):
    assert read_log("sglang\n" + message).outcome == "oom"


def test_a_refusal_alone_is_enough():
    assert read_log(PROSE.decode() + VLLM_LOG.splitlines()[-1]).outcome == "refused"


def test_a_log_cannot_make_it_open_or_run_anything(
    capsys, log_file, config_file, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    text = SGLANG_LOG.replace("/models/one-rank", "../../etc/passwd")
    text = text.replace("trust_remote_code=False", "_target_='os.system', x='$(touch owned)'")
    rows, _ = answered(capsys, log_file(text), "--config", config_file())
    assert "req_to_token" in rows["ate"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "start.log"]


def test_a_log_cannot_drive_the_terminal(capsys, log_file, config_file):
    escapes = "\x1b[31mred\x1b]0;title\x07\u202e"
    refusal = VLLM_LOG.replace("Based on", escapes + "Based on")
    for text in (refusal, SGLANG_LOG.replace("'fp8_e4m3'", f"'fp8{escapes}'")):
        _, out = answered(capsys, log_file(text), "--config", config_file(), "--gpu", "h200")
        assert all(c.isprintable() for c in out.replace("\n", ""))
    bad = SGLANG_LOG.replace("attention_backend='fa3'", f"attention_backend='{escapes}'")
    assert refused(capsys, log_file(bad)).strip().isprintable()


def test_figures_that_are_none_are_left_out(capsys, log_file):
    text = SGLANG_LOG.replace("1.21 GiB", "1.2.1 GiB").replace("139.80", "...")
    rows, _ = answered(capsys, log_file(text), "--gpu", "h200")
    assert rows["log"].endswith("out of memory at memory_pool.py:907 _create_buffers")


def test_a_command_of_the_other_engine_is_refused(capsys, log_file):
    err = refused(capsys, log_file(SGLANG_LOG), "--command", "vllm serve x")
    assert "a start of sglang, as the log" in err


def test_a_truncated_log_is_read_as_far_as_it_goes(capsys, log_file, config_file):
    rows, _ = answered(
        capsys, log_file(SGLANG_LOG[:-40]), "--config", config_file(), "--gpu", "h200"
    )
    assert "kv_pool" in rows["failed"]
    cut = SGLANG_LOG[: SGLANG_LOG.index("Traceback")]
    rows, _ = answered(capsys, log_file(cut), "--config", config_file(), "--gpu", "h200")
    assert "req_to_token" in rows["ate"]


def test_long_lines_and_many_are_read_to_their_end():
    found = read_log("server_args=ServerArgs(" + "a='" * 300_000 + "\n" + "sglang " * 200_000)
    assert (found.launch.engine, found.launch.flags) == ("sglang", {})
    found = read_log(
        "sglang\nLoad weight begin. avail mem=9 GB\n" + ("Tried to allocate " * 10 + "\n") * 20_000
    )
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
        (["--command", "sglang serve", "--engine-version", "new"], "--engine-version"),
        ([], "LOG"),
    ],
)
def test_bad_commands_are_one_line(capsys, config_file, words, what):
    if words:
        words = [*words, "--config", config_file(), "--gpu", "h200"]
    assert what in refused(capsys, *words)


def test_a_gpu_and_a_config_are_asked_for(capsys, config_file):
    assert "h200" in refused(capsys, "--command", "sglang serve", "--config", config_file())
    assert "h200" in refused(capsys, "--command", "sglang serve", "--gpu", "z80")
    assert "--config" in refused(capsys, "--command", "vllm serve m", "--gpu", "h200")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.text(max_size=400))
def test_any_text_is_read_or_refused(text):
    try:
        facts = read_log(text + "\nsglang\nKV pool holds 5 tokens\n")
    except BadValue:
        return
    assert facts.outcome in ("ok", "oom", "refused", "unknown")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(SGLANG_LOG.splitlines() + VLLM_LOG.splitlines()), max_size=12))
def test_lines_in_any_order_are_read(found):
    try:
        facts = read_log("\n".join(found))
    except BadValue:
        trace = TRACE.format(line=907, function="_create_buffers").splitlines()
        assert set(found) <= {*trace, OOM.strip()}
        return
    assert facts.launch.engine in ("sglang", "vllm")
