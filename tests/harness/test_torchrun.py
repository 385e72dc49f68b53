"""The same command under torchrun: on one machine, and on two nodes of the loopback interface."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from harness.runs import load_run
from tests.harness.ahead import torchrun
from tests.harness.ranks_fixture import LIMIT_SECONDS, processes_about, start


def run_folder(results: Path) -> Path:
    (found,) = results.glob("*/*/manifest.json")
    return found.parent


def test_two_nodes_make_one_folder(nodes):
    codes, said, folder = nodes
    assert codes == [0, 0], said
    run = load_run(run_folder(folder / "runs"))
    rows = run.rows.sort_values("rank")
    assert list(rows["rank"]) == [0, 1]
    assert list(rows["status"]) == ["ok", "ok"]
    assert rows["trial_id"].nunique() == 1
    assert set(rows["world_size"]) == {2}
    assert sorted(run.timeline["rank"].unique()) == [0, 1]


def test_each_rank_is_timed_behind_the_gates(nodes):
    run = load_run(run_folder(nodes[2] / "runs"))
    assert list(run.rows["resident_tokens"]) == [2048, 2048]
    assert all(run.rows["merged_gate_error"] > 0) and all(run.rows["merged_gate_error"] < 0.05)
    for time, samples in (
        ("attention_decode_step_ms", "decode_samples"),
        ("parallel_decode_step_ms", "parallel_decode_samples"),
        ("collective_ms", "collective_samples"),
    ):
        assert all(run.rows[time] > 0) and all(run.rows[f"{time}_iqr"] >= 0)
        assert run.rows[samples].nunique() == 1 and all(run.rows[samples] >= 2)
    assert all(run.rows["collective_bytes"] > 0)


def test_every_timing_of_a_rank_is_kept_with_its_rank(nodes):
    folder = run_folder(nodes[2] / "runs")
    rows = {r["rank"]: r for r in load_run(folder).rows.to_dict("records")}
    samples = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
    kept = {(s["rank"], s["what"]): s["ms"] for s in samples if "ms" in s}
    for rank, row in rows.items():
        for what, time in (
            ("decode", "attention_decode_step_ms"),
            ("decode_all_ranks", "parallel_decode_step_ms"),
            ("collectives", "collective_ms"),
        ):
            assert statistics.median(kept[rank, what]) == pytest.approx(row[time])


def test_only_rank_0_speaks(nodes):
    _, (second, first), _ = nodes
    assert re.search(r"^results ", first, re.MULTILINE)
    assert not re.search(r"^results ", second, re.MULTILINE)


def test_summary_tells_the_spread_of_the_ranks(nodes):
    *_, folder = nodes
    summary = json.loads((run_folder(folder / "runs") / "summary.json").read_text())
    ranks = summary["strategies"]["paged"]["ranks"]
    assert ranks["world_size"] == 2
    assert ranks["failed_ranks"] == []
    rows = load_run(run_folder(folder / "runs")).rows
    assert ranks["largest_peak"]["peak_device_bytes"] == rows["peak_device_bytes"].max()
    for time in ("startup_seconds", "attention_decode_step_ms", "collective_ms"):
        apart = ranks["spread"][time]
        assert apart["smallest"] == rows[time].min()
        assert apart["largest"] == rows[time].max()


def test_the_report_has_a_table_of_ranks(nodes):
    *_, folder = nodes
    said = (run_folder(folder / "runs") / "report.md").read_text().partition("\n## Ranks\n")[2]
    assert "| paged | largest peak |" in said
    assert "| paged | slowest start |" in said
    assert "| paged | slowest collectives |" in said


def test_no_process_is_left(nodes):
    *_, folder = nodes
    assert processes_about(folder) == []


@pytest.mark.beside
def test_kill_9_of_a_rank_under_torchrun(tmp_path):
    fault = ("fault.kind=kill", "fault.phase=pool", "fault.rank=1")
    words = (*torchrun("--standalone", "--nproc-per-node", "2"), *fault)
    words += ("fill=0", "trial.timing=false")
    process = start([*words, f"results={tmp_path / 'runs'}"], tmp_path)
    said = process.communicate(timeout=LIMIT_SECONDS)[0]
    assert process.returncode == 0, said
    rows = load_run(run_folder(tmp_path / "runs")).rows.sort_values("rank")
    assert list(rows["status"]) == ["crash", "crash"]
    assert list(rows["signal"]) == ["", "SIGKILL"]
    assert rows["error"].iloc[1] == "rank 1 was killed by signal 9 (SIGKILL)"
    assert set(rows["failed_rank"]) == {1}
    assert processes_about(tmp_path) == []
