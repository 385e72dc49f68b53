"""Engines that start, refuse, fail, hang and die: the protocol, with a process in their place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from harness.arms import arms_of, settings_of_command
from harness.cell import Cell
from harness.columns import ordered
from harness.compose import compose_config
from harness.engines.choose import chosen, engine_of
from harness.engines.keepers import Keepers, environment
from harness.engines.launch import flags_of, run_engine
from harness.engines.protocol import BadRecord, checked, read_start
from harness.engines.stand_in import stand_in
from harness.launch import Job
from harness.sizes import BadValue
from harness.validate import settings_of
from tests.harness.command import ROOT, processes_of, until
from tests.harness.command import environment as command_environment

GIB = 1 << 30
STAND_IN = Path(__file__).with_name("engine_stand_in.py")
WORDS = ("hardware=h200", "experiment=real_engines")


def settings(*words):
    """The first arm of a command, planned: no GPU is needed."""
    job = [*WORDS, *words]
    first = arms_of(compose_config(job), job)[0]
    return settings_of(compose_config(first), first, planning=True)


def python(folder, behaviour):
    """A script in the place of an engine's Python, which runs the stand-in."""
    path = folder / f"python-{behaviour}"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} {behaviour} "$@" {path}\n')
    path.chmod(0o755)
    return str(path)


def cell(folder, behaviour, *words, seconds=60.0):
    engine = [] if any(w.startswith("strategy=") for w in words) else ["strategy=sglang"]
    made = settings("model=report", *engine, *words)
    made = replace(
        made,
        engine={"python": python(folder, behaviour)},
        trial=replace(made.trial, timeout_seconds=seconds),
    )
    return Cell(made, made.context_tokens, 0.0, timing=False, real=True)


def start(folder, behaviour, *words, seconds=60.0):
    """The row of a start, and all that it left behind."""
    made = cell(folder, behaviour, *words, seconds=seconds)
    outcome = run_engine(Job([made], {"experiment": "real_engines"}), folder / "trial")
    (row,) = outcome.rows
    assert not processes_of(folder)
    return ordered(row), outcome


FEW = "strategy.max_running_requests=16"
DEFAULT = "strategy.max_running_requests=null"


def test_an_engine_that_starts(tmp_path):
    row, outcome = start(tmp_path, "starts", FEW)
    assert (row["status"], row["basis"]) == ("ok", "measured")
    assert (row["engine_version"], row["emulated_version"]) == ("0.5.12.post1", None)
    assert row["weights_bytes"] == 4 * GIB
    assert row["tables_bytes"] == 17 * 10_000_004 * 4
    assert row["kv_committed_bytes"] == 96 * GIB
    assert row["admitted"] == "false"  # 96 GiB hold 4.2M tokens
    events = [(e["phase"], e["allocation"]) for e in outcome.timeline]
    assert events[:2] == [("context", "engine_context"), ("weights", "weights")]
    assert events[-1] == ("workspace", "ready")
    (sample,) = outcome.samples
    assert sample["held"][0]["where"].endswith("memory_pool.py:907 _create_buffers")


def test_an_engine_that_runs_out_of_memory_names_what_failed_and_what_held_it(tmp_path):
    row, outcome = start(tmp_path, "starts", DEFAULT)
    assert (row["status"], row["oom_phase"], row["oom_allocation"]) == ("oom", "pool", "kv_pool")
    assert row["engine_version"] == "0.5.12.post1"
    assert row["oom_requested_bytes"] == 96 * GIB
    table = 2049 * 10_000_004 * 4
    assert row["oom_free_bytes"] == 135 * GIB - table
    assert row["error"].startswith("srt/mem_cache/memory_pool.py:907 _create_buffers: OutOfMemory")
    assert row["kv_committed_bytes"] is None and row["startup_seconds"] is None
    lines = {line["name"]: line for line in outcome.samples[0]["held"] if line["name"] != ""}
    assert lines["req_to_token"]["bytes"] == table
    assert lines["kv_pool"]["count"] == (135 * GIB - table) // GIB


def test_an_engine_that_refuses(tmp_path):
    row, _ = start(tmp_path, "refuses")
    assert (row["status"], row["oom_source"]) == ("refused", "sglang")
    assert "Please try to increase" in row["error"]


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        ("unknown_version", "sglang 9.9 is installed; this adapter knows 0.5.12.post1"),
        ("moved", "Recorder.req_to_token_pool.req_to_token is not where it was"),
        ("breaks", "ImportError: libcudart is missing"),
        ("no_record", "record 8: type=gossip"),
    ],
)
def test_what_is_not_known_is_one_line_and_no_figure(tmp_path, behaviour, said):
    row, _ = start(tmp_path, behaviour, FEW)
    assert row["status"] == "crash" and said in row["error"]
    assert row["kv_committed_bytes"] is None and "\n" not in row["error"]
    assert (row["engine_version"] is None) == (behaviour != "moved")


def test_an_engine_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    row, outcome = start(tmp_path, "hangs", seconds=1.0)
    assert (row["status"], row["error"]) == ("timeout", "killed after 1 s")
    assert outcome.samples[0]["ended"]["left"] == 1


@pytest.mark.parametrize(
    ("behaviour", "number"), [("dies", signal.SIGSEGV), ("half_a_line", signal.SIGKILL)]
)
def test_an_engine_that_dies(tmp_path, behaviour, number):
    row, _ = start(tmp_path, behaviour, FEW)
    assert (row["status"], row["signal"]) == ("crash", number.name)
    assert (row["engine_version"] is None) == (behaviour == "dies")


def test_a_grandchild_in_another_session_is_no_orphan(tmp_path):
    row, outcome = start(tmp_path, "grandchild", FEW)
    assert row["status"] == "ok"
    assert outcome.samples[0]["ended"]["left"] == 1


def test_a_killed_harness_takes_the_engine_with_it(tmp_path):
    script = (
        "import sys; from pathlib import Path; from tests.harness.test_engine_starts import start;"
        "start(Path(sys.argv[1]), 'hangs')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=command_environment()
    )
    engine = until(lambda: [p for p in processes_of(tmp_path) if p != process.pid][1:])
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: not processes_of(tmp_path))
    assert engine


def test_an_engine_that_waits_takes_the_next_start_and_leaves_nothing_when_none_comes(tmp_path):
    keepers, pids = Keepers(), []
    job = Job([cell(tmp_path, "starts", FEW)], {"experiment": "real_engines"})
    for number in range(2):
        waiting = next(iter(keepers.waiting.values()), None)
        outcome = run_engine(job, tmp_path / f"trial-{number}", keepers=keepers)
        (row,) = outcome.rows
        assert row["status"] == "ok", row["error"]
        assert outcome.samples[0]["ready"]["settings"]["cwd"] == str(tmp_path / f"trial-{number}")
        pids.append(waiting and waiting.process.pid)
        assert waiting is None or waiting.process.returncode == 0
    assert pids[0] is None and pids[1] is not None
    assert processes_of(tmp_path)
    keepers.close()
    assert not processes_of(tmp_path)


def names(outcome):
    return {i["name"]: i["bytes"] for i in outcome.samples[0]["items"]}


def test_sglangs_adapter_reads_every_item(tmp_path):
    row, outcome = start(tmp_path, "adapter", FEW)
    assert row["status"] == "ok", row["error"]
    found = names(outcome)
    assert found["req_to_token"] == 17 * 10_000_004 * 4
    assert found["page_table"] == 16 * 10_000_000 * 4
    assert found["kv_pool"] == 80 * GIB
    assert (found["decode_cuda_graphs"], found["piecewise_cuda_graphs"]) == (GIB, 2 * GIB)
    assert row["workspace_bytes"] == found["page_table"] + 3 * GIB
    phases = [p["step"] for p in outcome.samples[0]["phases"]]
    assert phases[:4] == ["context", "weights", "pool", "attention"]
    assert outcome.samples[0]["ready"]["pool_tokens"] == 8_000_000


def test_sglangs_adapter_tells_what_a_failed_start_had_made(tmp_path):
    row, outcome = start(tmp_path, "adapter", DEFAULT)
    assert (row["status"], row["oom_allocation"]) == ("oom", "kv_pool")
    assert row["oom_requested_bytes"] == 80 * GIB  # 2 x 2 buffers
    table = 2049 * 10_000_004 * 4
    assert row["tables_bytes"] == table + GIB and "kv_pool" not in names(outcome)
    assert row["oom_free_bytes"] == 134 * GIB - table


def test_vllms_adapter_reads_every_item(tmp_path):
    words = ("strategy=vllm", "strategy.max_num_seqs=16")
    row, outcome = start(tmp_path, "adapter", *words)
    assert row["status"] == "ok", row["error"]
    found = names(outcome)
    assert found["block_tables"] == found["input_block_tables"] == 16 * 625_000 * 4
    assert (found["kv_pool"], found["cuda_graphs"]) == (120 * GIB, GIB)
    assert row["pinned_host_bytes"] == found["all_token_ids"] == 16 * 10_000_000 * 4
    assert row["tables_bytes"] == 2 * found["block_tables"] + GIB
    assert row["admitted"] == "true"


def test_vllms_adapter_tells_a_refusal(tmp_path):
    row, outcome = start(tmp_path, "adapter", "strategy=vllm", "context=30M")
    assert (row["status"], row["oom_source"]) == ("refused", "vllm")
    assert row["oom_requested_bytes"] == pytest.approx(343.32 * GIB)
    assert row["oom_free_bytes"] == pytest.approx(118.10 * GIB)
    assert names(outcome)["weights"] == 4 * GIB


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((FEW,), "Runner.req_to_token_pool.req_to_token is not where it was"),
        (("strategy=vllm", "strategy.max_num_seqs=16"), "Runner is not the V2 runner"),
    ],
)
def test_an_adapter_whose_engine_has_moved_gives_no_figure(tmp_path, words, said):
    row, _ = start(tmp_path, "adapter_moved", *words)
    assert row["status"] == "crash" and said in row["error"]
    assert row["kv_committed_bytes"] is None


def test_an_engine_sees_none_of_our_packages_and_one_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/ours")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    _, outcome = start(tmp_path, "starts", FEW)
    seen = outcome.samples[0]["ready"]["settings"]
    assert seen == {"cwd": str(tmp_path / "trial"), "path": None}
    assert environment(cell(tmp_path, "starts"))["CUDA_VISIBLE_DEVICES"] == "3"


def test_flags_have_the_engines_own_names():
    few = settings("strategy=sglang", "model=report", FEW)
    at = Cell(few, 10_000_000, real=True)
    expected = {"context_length": 10_000_000, "max_running_requests": 16}
    assert flags_of(at) == expected | {"kv_cache_dtype": "fp8_e4m3"}
    auto = settings("strategy=vllm", "model=report", "strategy.hybrid_kv_cache_manager=false")
    auto = replace(auto, options=auto.options | {"max_model_len": "auto"})
    given = flags_of(Cell(auto, 10_000_000, real=True))
    assert given["max_model_len"] == -1 and given["disable_hybrid_kv_cache_manager"] is True


def test_the_stand_in_weighs_what_the_rank_does():
    for model in ("report", "qwen3_30b_a3b"):
        made = settings("strategy=sglang", f"model={model}")
        shape = stand_in(made)
        assert made.model.weights_bytes == shape.weights_bytes  # what ours allocates beside it
        planned = {"report": 4 << 30, "qwen3_30b_a3b": 3_800_000_000}[model]
        assert abs(shape.weights_bytes / planned - 1) < 0.005
        config = shape.config()
        kept = ("num_hidden_layers", "num_key_value_heads", "head_dim", "hidden_size")
        heads = made.model.kv_heads(8)
        assert [config[k] for k in kept] == [48, heads, 128, 1024]
    assert stand_in(made, 30_000_000).config()["max_position_embeddings"] == 30_000_000


def test_an_engine_that_is_not_here_is_skipped_in_one_line_and_none_is_an_error(tmp_path):
    arms = settings_of_command(WORDS, False, planning=True)
    with pytest.raises(BadValue, match=r"pip install sglang==0\.5\.12\.post1") as error:
        chosen(arms)
    assert "\n" not in str(error.value)
    given = [replace(a, engine={"python": "x"}) if a.strategy == "vllm" else a for a in arms]
    kept, (line,) = chosen(given)
    assert {a.strategy for a in kept} == {"vllm"}
    assert line.startswith("skipped  sglang: engine.sglang.python is not set; python -m venv")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hardware=scale_model"], "hardware=scale_model: not allowed; allowed: a CUDA GPU"),
        (["strategy.version=0.5.9", "strategy=sglang"], "strategy.version=0.5.9"),
        (["strategy=sglang", "model.local_layers=12", "model.window_tokens=1024"], "local layers"),
        (["hardware=h200", "hardware.capacity=80GiB"], "hardware.capacity"),
        (["model.weights_per_rank=16MiB"], "model.weights_per_rank"),
    ],
)
def test_what_no_engine_can_be_started_with_is_one_line(words, said):
    with pytest.raises(BadValue) as error:
        settings_of_command([*WORDS[1:], *([] if "hardware" in words[0] else WORDS[:1]), *words],
                            False, planning=True)  # fmt: skip
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_python_that_is_none_is_refused():
    conf = compose_config(["strategy=sglang", "engine.sglang.python=/no/python"])
    with pytest.raises(BadValue, match=r"engine\.sglang\.python=/no/python"):
        engine_of(conf)
    assert engine_of(compose_config(["strategy=vllm"])) == {"python": None}
    assert engine_of(compose_config(["strategy=vllm", "engine.vllm.python=sh"]))["python"][0] == "/"
    with pytest.raises(BadValue, match="the engines that can be started"):
        engine_of(compose_config(["strategy=paged"]))


def test_a_start_and_its_emulation_are_two_trials_of_one_question(tmp_path):
    real = cell(tmp_path, "starts")
    emulated = replace(real, real=False)
    assert real.trial_id != emulated.trial_id and real.pair_id == emulated.pair_id
    elsewhere = replace(real, settings=replace(real.settings, engine={"python": "/elsewhere"}))
    assert elsewhere.trial_id == real.trial_id


@pytest.mark.parametrize(
    "line",
    [
        b"[]",
        b'{"type": "item", "phase": "pool", "name": "kv_pool", "location": "device"}',
        b'{"type": "failed", "how": "odd", "error_type": "", "message": "", "where": ""}',
        b"{half",
    ],
)
def test_a_record_that_is_none_is_refused(line):
    with pytest.raises(BadRecord, match="record 3"):
        checked(line, 3)


def test_half_a_last_line_is_left_out(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'{"type": "ended", "code": 0}\n{"type": "en')
    assert read_start(path).ended == {"type": "ended", "code": 0}
    assert read_start(path.with_name(f"no-{os.getpid()}-{time.time()}")).ended is None
