"""harness.explain on contexts that are longer than a config.json allows."""

from __future__ import annotations

import pytest

from harness.explain_launch import parse_command
from harness.explain_log import read_log
from harness.explain_longest import longest_context
from tests.harness.explain_case import SGLANG_LOG, answered

# srt/configs/model_config.py:549-566 of SGLang 0.5.12.post1.
SGLANG_SAYS = (
    "ValueError: Warning: User-specified context_length (10000000) is greater than the derived "
    "context_length (131072). This may lead to incorrect model outputs or CUDA errors. Note that "
    "the derived context_length may differ from max_position_embeddings in the model's config. To "
    "allow overriding this maximum, set the env var SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1\n"
)
# config/model.py:2228-2248 of vLLM 0.23.0.
VLLM_SAYS = (
    "  Value error, User-specified max_model_len (10000000) is greater than the derived "
    "max_model_len (max_position_embeddings=131072 or model_max_length=None in model's "
    "config.json). To allow overriding this maximum, set the env var "
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1. VLLM_ALLOW_LONG_MAX_MODEL_LEN must be used with extreme "
    "caution. [type=value_error, input_value=ArgsKwargs((), {'model': 'x'})]\n"
)
SGLANG = "sglang serve --model x --context-length 10M --kv-cache-dtype fp8_e4m3"
VLLM = "vllm serve x --max-model-len 10M --kv-cache-dtype fp8 --max-num-seqs 16"
SHORT = {"max_position_embeddings": 131_072}


@pytest.mark.parametrize(
    ("command", "variable", "source"),
    [
        (SGLANG, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1", "model_config.py:564"),
        (VLLM, "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1", "config/model.py:2245"),
    ],
)
def test_a_longer_context_than_the_config_allows_is_refused(
    capsys, config_file, command, variable, source
):
    words = ("--config", config_file(**SHORT), "--gpu", "h200", "--command")
    rows, out = answered(capsys, *words, command)
    said = rows["refuses"]
    assert "10,000,000 tokens of context: config.json allows 131,072 (max_position" in said
    assert variable in said and source in said
    assert "req_to_token" in out or "kv_pool" in out  # memory is planned all the same
    for prefix in (f"{variable} ", f"docker run -e {variable} image "):
        assert "refuses" not in answered(capsys, *words, prefix + command)[0]
    off = variable.replace("=1", "=0")
    assert "refuses" in answered(capsys, *words, f"{off} {command}")[0]
    at_most = command.replace("10M", "131072")
    assert "refuses" not in answered(capsys, *words, at_most)[0]
    assert "refuses" in answered(capsys, *words, command.replace("10M", "131073"))[0]


def test_what_changes_the_config_leaves_it_unknown():
    for flag in ("--json-model-override-args '{}'", "--rope-scaling '{}'"):
        assert parse_command(f"{SGLANG} {flag}").changes_config
    assert parse_command(f"{VLLM} --hf-overrides.max_position_embeddings 10000000").changes_config
    assert not parse_command(VLLM).changes_config


def test_a_log_that_got_further_was_let_past(capsys, log_file, config_file):
    rows, _ = answered(capsys, log_file(SGLANG_LOG), "--config", config_file(**SHORT))
    assert "refuses" not in rows and "kv_pool" in rows["failed"]


@pytest.mark.parametrize(
    ("text", "variable"),
    [
        (SGLANG_SAYS, "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1"),
        (VLLM_SAYS, "VLLM_ALLOW_LONG_MAX_MODEL_LEN=1"),
    ],
)
def test_the_refusal_in_a_log_is_read(capsys, log_file, config_file, text, variable):
    facts = read_log(text)
    assert (facts.outcome, facts.failed) == ("refused", "context")
    assert facts.launch.context_tokens == 10_000_000
    rows, _ = answered(capsys, log_file(text))
    assert rows["failed"].endswith(" context") and variable in rows["change"]
    assert "User-specified" in rows["log"]
    words = (log_file(text), "--config", config_file(**SHORT), "--gpu", "h200")
    rows, out = answered(capsys, *words)
    assert variable in rows["change"] and "differs" not in rows
    assert "kv_pool" in out


def test_the_warning_of_a_start_that_was_let_past_is_no_refusal():
    warning = SGLANG_SAYS.partition(" To allow")[0].removeprefix("ValueError: ")
    facts = read_log(f"server_args=ServerArgs(context_length=10000000)\n{warning}\n")
    assert facts.outcome == "unknown"


ROPE = {"max_position_embeddings": 40_960}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8_192}


@pytest.mark.parametrize(
    ("lengths", "sglang", "vllm"),
    [
        ({"max_position_embeddings": 131_072}, 131_072, 131_072),
        ({}, None, None),
        ({"max_position_embeddings": "long"}, None, None),
        ({**ROPE, "rope_scaling": None}, 40_960, 40_960),
        ({**ROPE, "rope_scaling": YARN}, 40_960, 131_072),
        ({**ROPE, "rope_scaling": LLAMA3}, 40_960, 40_960),
        ({**ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, 81_920, 81_920),
        ({**ROPE, "rope_scaling": {"type": "longrope", "factor": 2.0}}, 81_920, 40_960),
        ({**ROPE, "rope_parameters": {"full_attention": {"factor": 2.0}}}, None, None),
        ({**ROPE, "rope_scaling": "none"}, None, None),
        ({**ROPE, "rope_scaling": {"factor": "x"}}, None, None),
        ({"max_position_embeddings": 8_192, "model_max_length": 131_072}, 131_072, 131_072),
        ({"max_position_embeddings": 8_192, "seq_length": 4_096}, 4_096, 4_096),
        ({"n_positions": 1_024}, None, 1_024),
    ],
)
def test_the_length_that_each_engine_derives(lengths, sglang, vllm):
    """By hand from the sources that the module names."""
    assert longest_context("sglang", lengths)[0] == sglang
    assert longest_context("vllm", lengths)[0] == vllm


def test_a_crash_after_all_is_allocated_says_why(capsys, config_file):
    command = "vllm serve x --max-model-len 10M --kv-cache-dtype fp8"
    rows, _ = answered(capsys, "--command", command, "--config", config_file(), "--gpu", "h200")
    assert "workspace" in rows["failed"] and "32 bits" in rows["says"]
