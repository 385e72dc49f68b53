"""The command as a user types it: what a sweep to 10M shows, and what it says of wrong words."""

from __future__ import annotations

import json
import math

import pytest

from harness.cli import main
from harness.columns import CONFIGURATION, END, IDENTITY, MEMORY, TIME
from tests.harness.command import QUICK, read_json, rows, run, table

DEVICE_BYTES = 149_557_477_376 // 192
CHUNK_BYTES = 360_448
POOL_BYTES = math.ceil(10_000_000 * 128 / CHUNK_BYTES) * CHUNK_BYTES


def pick(found, **equal):
    (row,) = [r for r in found if all(r[k] == v for k, v in equal.items()) and r["repeat"] == 0]
    return row


def test_static_pool_for_ten_million_does_not_fit(ten_million):
    assert ten_million.code == 0, ten_million.err
    row = pick(rows(ten_million.folder), strategy="static", context_tokens=10_000_000)
    assert (row["status"], row["oom_phase"], row["oom_source"]) == ("oom", "pool", "budget")
    assert row["oom_requested_bytes"] == POOL_BYTES == 1_280_311_296
    assert 740 < row["capacity_bytes"] / 2**20 < 746
    assert row["oom_free_bytes"] < row["capacity_bytes"]
    assert row["resident_tokens"] == 0 and row["resident_limited_by"] == "oom"
    assert row["attention_decode_step_ms"] is None


def test_paged_starts_and_holds_a_tenth(ten_million):
    found = rows(ten_million.folder)
    row = pick(found, strategy="paged", context_tokens=10_000_000, purpose="point")
    assert row["status"] == "ok" and row["resident_tokens"] == 1_000_000
    assert abs(row["kv_committed_bytes"] / (0.1 * POOL_BYTES) - 1) < 0.01
    assert row["kv_reserved_bytes"] >= row["kv_committed_bytes"] >= row["kv_live_bytes"]
    small = pick(found, strategy="static", context_tokens=1_000_000, purpose="point")
    assert small["status"] == "ok"
    assert small["kv_committed_bytes"] >= 128_000_000  # the pool is whole at a tenth too


def test_brackets_are_closed_and_say_what_ended_them(ten_million):
    both = read_json(ten_million.folder / "summary.json")["strategies"]
    assert list(both) == ["static", "paged"]
    static, paged = both["static"], both["paged"]
    start = static["startup"]
    assert start["limited_by"] == "oom"
    assert 0 < start["not_ok"] - start["ok"] <= 0.001 * start["ok"]
    assert paged["startup"] == {"ok": 10_000_000, "not_ok": None, "limited_by": "sweep_end"}
    assert paged["admit"]["limited_by"] == "refused"
    assert paged["resident"]["limited_by"] == "oom"
    for end in ("ok", "not_ok"):
        assert abs(paged["resident"][end] / start[end] - 1) < 0.01
    assert paged["peak_device_bytes"] <= DEVICE_BYTES


def test_both_ends_of_a_bracket_are_run_twice_and_agree(ten_million):
    ends = {}
    for row in rows(ten_million.folder):
        if row["purpose"] != "point":
            key = (row["strategy"], row["purpose"], row["context_tokens"])
            ends.setdefault(key, []).append((row["status"], row["resident_tokens"]))
            filled = {"bracket": 0.0, "resident": 1.0}[row["purpose"]]
            assert row["fill"] == filled and (row["resident_tokens"] == 0 or filled)
    assert len(ends) == 7
    for answers in ends.values():
        assert len(answers) == 2 and len(set(answers)) == 1


def test_one_folder_holds_both_strategies_and_every_part(ten_million):
    folder = ten_million.folder
    names = {p.name for p in folder.iterdir()}
    assert {
        "manifest.json",
        "config.yaml",
        "trials.csv",
        "timeline.csv",
        "samples.jsonl",
        "summary.json",
        "figures",
        "report.md",
    } <= names
    assert {r["strategy"] for r in rows(folder)} == {"static", "paged"}
    assert folder.parent.name == "sweep"
    assert (folder / "figures" / "memory_against_context.png").stat().st_size > 10_000
    manifest = read_json(folder / "manifest.json")
    assert manifest["finished_utc"] and manifest["command"].startswith("python -m harness -m ")
    assert {t["trial_id"] for t in table(folder / "timeline.csv")} == {
        r["trial_id"] for r in rows(folder)
    }


def test_rows_have_every_column_of_the_contract(ten_million):
    header = (ten_million.folder / "trials.csv").read_text().partition("\n")[0].split(",")
    contract = [*IDENTITY, *CONFIGURATION, *END, *MEMORY, *TIME]
    assert header[: len(contract)] == contract
    for row in rows(ten_million.folder):
        empty = [c for c in IDENTITY if row[c] is None]
        assert empty == ["engine_version", "emulated_version"]
        assert row["basis"] == "scale_model" and row["scale"] == 192


def test_every_row_reconciles_and_was_predicted(ten_million, timed):
    for ended in (ten_million, timed):
        assert ended.code == 0, ended.err
        for row in rows(ended.folder):
            assert abs(row["unexplained_bytes"]) <= row["tolerance_bytes"] <= 2**20
            assert row["predicted_off_by"] is None, row["predicted_off_by"]
            assert row["predicted_status"] == row["status"]
            if row["status"] == "ok":
                assert abs(row["peak_device_bytes"] / row["predicted_peak_bytes"] - 1) < 0.01
        assert "warning" not in ended.out


def test_strategies_are_given_the_same_questions(ten_million):
    pairs = {}
    for row in rows(ten_million.folder):
        if row["purpose"] == "point":
            pairs.setdefault(row["pair_id"], []).append(row["strategy"])
    assert sorted(map(sorted, pairs.values())) == [["paged", "static"]] * 2


def test_the_last_words_say_what_was_found_and_what_next(ten_million):
    out = ten_million.out
    assert "scale model" in out and "speeds do not" in out
    assert "228.94 GiB" in out
    assert "next     python -m harness experiment=root_cause context=10M" in out
    claims = read_json(ten_million.folder / "summary.json")["claims"]
    left = [c["id"] for c in claims if c["verdict"] == "undecided"]
    assert "C7" in left and "C1" not in left
    assert f"{len(left)} undecided: {', '.join(left)}; report.md says what to run" in out
    report = (ten_million.folder / "report.md").read_text()
    assert report.count("| undecided |") == report.count("| run: ") == len(left)
    assert "planned" not in out  # both were run
    assert str(ten_million.folder / "report.md") in out


def test_timed_rows_passed_the_gate_and_carry_figures(timed):
    found = rows(timed.folder)
    assert len(found) == 4
    for row in found:
        assert row["status"] == "ok"
        assert 0 < row["gate_error"] < 0.05 and row["gate_lse_error"] < 5e-3
        assert row["attention_decode_step_ms"] > 0 and row["decode_samples"] >= 2
        assert row["attention_prefill_chunk_ms"] > 0 and row["prefill_chunk_tokens"] == 16
        assert row["attention_decode_tokens_per_second"] == pytest.approx(
            row["sequences"] * 1e3 / row["attention_decode_step_ms"]
        )
        # Behind a window there is nothing left to time a shorter history on.
        assert ((row["prefill_modelled_seconds"] or 0) > 0) == (not row["hybrid"])
        assert row["kernel_variant"] and row["prefill_kernel_variant"]


def test_several_sequences_are_all_resident(timed):
    found = [r for r in rows(timed.folder) if r["sequences"] == 3]
    assert [r["resident_tokens"] for r in found] == [12_000, 12_000]
    fixed = pick(found, strategy="static")
    eager = pick(found, strategy="eager_pages")
    assert eager["kv_committed_bytes"] > fixed["kv_committed_bytes"] >= 12_000 * 128
    assert eager["kv_live_bytes"] == fixed["kv_live_bytes"] == 12_000 * 128


def test_every_timing_is_kept_as_a_sample(timed):
    found = rows(timed.folder)
    lines = [json.loads(s) for s in (timed.folder / "samples.jsonl").read_text().splitlines()]
    for row in found:
        own = [s for s in lines if s["trial_id"] == row["trial_id"]]
        modelled = [] if row["hybrid"] else ["prefill_model"]
        assert [s["what"] for s in own] == ["decode", "prefill", *modelled]
        assert len(own[0]["ms"]) == row["decode_samples"]
        assert all(len(s["histories"]) == 5 for s in own[2:])


def test_local_layers_hold_their_window_only(timed):
    found = [r for r in rows(timed.folder) if r["hybrid"]]
    fp8, bf16 = sorted(found, key=lambda r: r["kv_bytes_per_token"])
    assert (fp8["kv_dtype"], bf16["kv_dtype"]) == ("fp8_e4m3", "bf16")
    assert bf16["kv_bytes_per_token"] == 2 * fp8["kv_bytes_per_token"]
    flat = 20_000 * fp8["kv_bytes_per_token"]
    assert fp8["kv_committed_bytes"] < 0.75 * flat  # 36 of 48 layers keep 8192 tokens at most
    assert bf16["kv_live_bytes"] == 2 * fp8["kv_live_bytes"]


BAD = [
    ("context=10Q", "a whole number of tokens"),
    ("context=0", "from 1"),
    ("context=-1", "from 1"),
    ("context=", "a value after '='"),
    ("strategy=pagd", "paged"),
    ("model=gpt9", "report"),
    ("fill=1.5", "from 0 to 1"),
    ("workload.sequences=-3", "1 to"),
    ("contxt=10M", "context"),
    ("hardware.capacity=10TiB", "up to 149"),
    ("--contxt", "no such option"),
    ("strategy.mem_fraction=1e400", "strategy."),
    ("fill=1e400", "from 0 to 1"),
    ("sweep.repeats=1e400", "a whole number"),
    ("workload.sequences=${oc.env:HOME}", "not looked up"),
    ("parallel.ranks=3", "1, 2, 4, 8"),
]


@pytest.mark.parametrize(("word", "allowed"), BAD)
def test_wrong_words_are_refused_in_one_line(word, allowed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(["hardware=scale_model", word, "results=runs"])
    said = capsys.readouterr()
    assert code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("harness: ") and word in line and allowed in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("word", "allowed"), [BAD[0], BAD[4], BAD[8], BAD[9]])
def test_the_process_ends_with_that_line(word, allowed, tmp_path):
    ended = run(tmp_path / "here" / "runs", "hardware=scale_model", word)
    assert ended.code == 2 and ended.out == ""
    (line,) = ended.err.splitlines()
    assert line.startswith("harness: ") and word in line and allowed in line
    assert list((tmp_path / "here").iterdir()) == []


ENGINE_FLAGS = [
    ("sglang", "strategy.version=9.9", "0.5.12.post1"),
    ("sglang", "strategy.mem_fraction_static=2", "at most 1"),
    ("sglang", "strategy.attention_backend=fast", "fa3"),
    ("vllm", "strategy.version=9.9", "0.23.0"),
    ("vllm", "strategy.max_num_seqs=-1", "from 1"),
    ("vllm", "strategy.block_size=7", "a multiple of 16"),
    ("vllm", "strategy.gpu_memory_utilization=1e400", "at most 1"),
    ("vllm", "strategy.max_model_len=long", "auto"),
]


@pytest.mark.parametrize(("engine", "word", "allowed"), ENGINE_FLAGS)
def test_wrong_flags_of_engines_are_found_before_anything_is_written(
    engine, word, allowed, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([f"strategy={engine}", word, *QUICK, "results=runs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line and allowed in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        (["--help"], ["strategy=paged context=10M", "hardware.capacity", "llama4_scout"]),
        (["-h"], ["harness.plan", "Exit 0"]),
        (["--cfg", "job", "strategy=static", "context=1M"], ["mem_fraction: 1.0", "context: 1M"]),
        (["--cfg=job", "--package", "trial"], ["page_tokens: 128"]),
        (["--version"], ["1.3"]),
    ],
)
def test_flags_that_show_something(flags, shown, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 0
    said = capsys.readouterr()
    assert said.err == "" and "_schema" not in said.out
    for word in shown:
        assert word in said.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "flags",
    [["--cfg"], ["--cfg", "job", "contxt=1"], ["--info", "x"], ["--package", "trial"], ["-x"]],
)
def test_flags_that_show_nothing_say_why_in_one_line(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(flags) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
