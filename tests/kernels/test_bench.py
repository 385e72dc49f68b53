"""The bench's own honesty: its gate, its rows and its tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from bench import attention, figure, gate, manifest, table, work_append
from bench.attention import run
from bench.data import make_view, peer_layout, queries, with_table
from bench.peers import Peers
from bench.rows import COLUMNS, Rows
from bench.timing import Sample, by_graph, by_graphs, summarise
from harness.hardware import GpuSeen
from kernels import ops, reference
from kernels.view import Geometry

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def view(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    torch.manual_seed(3)
    return make_view([700], Geometry(2, 2, 4, 64))


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_gate_passes_the_right_answer_and_fails_others(view):
    q = queries(view.geometry, 1)
    out, lse = ops.decode(view, 1, q, ops.plan_decode(view))
    assert not gate.decode(view, 1, q, out, lse).failed
    assert "error" in gate.decode(view, 0, q, out, lse).failed
    assert "lse" in gate.decode(view, 1, q, out, lse + 0.01).failed
    assert gate.decode(view, 1, q, out * float("nan"), lse).failed
    chunk = queries(view.geometry, 20)
    out, lse = ops.prefill(view, 1, chunk, ops.plan_prefill(view, 0, 680, 20))
    assert not gate.prefill(view, 1, chunk, 0, 680, out, lse).failed
    assert gate.prefill(view, 1, chunk, 0, 679, out, lse).failed


def test_needle_is_found_only_where_it_is(view):
    q = queries(view.geometry, 1)
    before = view.arena.clone()
    for position, found in ((123, True), (699, True)):
        planted = gate.Needle(view, 1, q[0, 0], position)
        out, _ = ops.decode(view, 1, q, ops.plan_decode(view))
        assert planted.found(out[0, 0]) is found
        assert torch.equal(view.arena, before)
    planted = gate.Needle(view, 1, q[0, 0], 5)
    out, _ = ops.decode(view, 0, q, ops.plan_decode(view))
    assert not planted.found(out[0, 0])


def test_peers_get_the_same_keys_and_values(view):
    k, v = peer_layout(view, 1)
    for head in range(2):
        want = reference.gather(view, 1, head, 0, 128, 256)
        page = int(view.page_table[0, 1])
        assert torch.equal(k[page, :, head].double(), want[0])
        assert torch.equal(v[page, :, head].double(), want[1])
    assert torch.equal(with_table(view, False).page_table[0], torch.arange(6, dtype=torch.int32))


def test_append_gate_sees_a_wrong_code(view):
    k, v = (torch.randn(3, 2, 64).to(torch.bfloat16) for _ in range(2))
    ops.append_run(view, 0, k, v, 0, 126)
    assert work_append.stored(view, k, v, 0, 126) == "ok"
    assert work_append.stored(view, k + 1, v, 0, 126).startswith("failed")


def test_a_failed_gate_leaves_the_figure_empty(tmp_path):
    rows = Rows(tmp_path / "x.csv", 10)
    sample = Sample(100.0, 1.0, 10)
    good, bad = gate.judge(1e-2, 1e-4, 1e-3), gate.judge(1e-2, 1e-2, 1e-3)
    rows.add(sample, good, 1e8, work="decode a", kernel="ours")
    rows.add(sample, bad, 1e8, work="decode a", kernel="ours")
    first, second = rows_of(tmp_path / "x.csv")
    assert tuple(first) == COLUMNS
    assert first["tb_per_s"] == "1.0000" and first["gate"] == "ok"
    assert second["tb_per_s"] == second["median_us"] == ""
    assert second["gate"].startswith("failed: lse error")


def test_budget_and_crashes_are_rows(tmp_path):
    rows = Rows(tmp_path / "x.csv", 10)

    def crash():
        raise RuntimeError("no memory")

    run(rows, "decode a", crash)
    rows.budget_s = -1
    run(rows, "decode b", crash)
    first, second = rows_of(tmp_path / "x.csv")
    assert first["gate"] == "failed: RuntimeError: no memory"
    assert second["gate"] == "not run: -1 s were used up"


def test_missing_peers_say_why(tmp_path):
    absent = Peers(None).absent
    assert set(absent) == {"FA3", "XQA", "cuDNN"}
    assert all("no --peers folder" in reason for reason in absent.values())
    assert set(Peers(tmp_path).absent) == {"FA3", "XQA", "cuDNN"}


def test_samples():
    sample = summarise([4.0, 1.0, 2.0, 3.0, 100.0])
    assert (sample.median_us, sample.iqr_us, sample.count) == (3.0, 2.0, 5)
    assert sample.per(3).median_us == 1.0


def test_host_timing_counts_each_call(view):
    calls = []
    assert by_graph([lambda: calls.append(1)] * 4, 1).count == 3
    assert len(calls) == 12
    two = by_graphs([[lambda: calls.append(2)], [lambda: calls.append(3)] * 2], 1)
    assert [sample.count for sample in two] == [3, 3]
    assert (calls.count(2), calls.count(3)) == (3, 6)


def test_tables_fill_their_page(tmp_path):
    rows = Rows(tmp_path / "x.csv", 10)
    ok = gate.judge(2.5e-2, 1e-4, 1e-3)
    decode = {"work": "decode 1Mi", "timing": "graph", "target": 4.0, "layers": 2}
    rows.add(Sample(50, 1, 9), ok, 2e8, kernel="ours", table_order="shuffled", **decode)
    rows.add(Sample(49, 1, 9), ok, 2e8, kernel="ours", table_order="identity", **decode)
    rows.add(Sample(100, 1, 9), ok, 2e8, kernel="FA3", table_order="shuffled", **decode)
    prefill = {"work": "prefill 2048 x 5", "kernel": "ours", "variant": "gluon_3wg"}
    for timing, us, target in (("short", 100, 1000), ("sustained", 110, 950)):
        rows.add(Sample(us, 1, 9), ok, flops=1e11, timing=timing, target=target, **prefill)
    rows.add(None, None, work="decode needle", kernel="ours", gate="ok", timing="graph")
    rows.add(None, None, work="peers", kernel="XQA", gate="absent: no folder")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nstale figures\n{table.END}\nafter\n")
    table.insert(page, table.page(table.read(tmp_path / "x.csv"), "x.csv"))
    text = page.read_text()
    assert "stale" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| 1Mi | 4.0 | 4.00 (50.0 µs) | 4.08 (49.0 µs) | 2.00 (100.0 µs) | – |" in text
    assert "| 2048 x 5 | 1000 / 950 | 1000 / 909 |" in text
    assert "| decode needle graph | ok | ok |" in text
    assert "* peers XQA: absent: no folder" in text
    table.insert(page, "new\n")
    assert "4.08" not in page.read_text()
    with pytest.raises(ValueError, match="needs the lines"):
        table.insert(tmp_path / "x.csv", "")


def test_the_figure_draws_every_timing_of_the_committed_rows():
    rows = table.read(ROOT / "results/reference/kernels/attention.csv")
    drawn = [len(axes.patches) for axes in figure.draw(rows).axes]
    wanted = [figure.bars(rows, *panel[:3]) for panel in figure.PANELS]
    assert drawn == [sum(map(len, data.values())) for data in wanted] and min(drawn) > 4
    assert "prefill 2048 x 8 over 10M" in wanted[2]
    assert set(figure.COLOURS) >= {kernel for data in wanted for f in data.values() for kernel in f}


GPU = {"uuid": "GPU-1", "driver": "580.1", "sm_clock_mhz": 1980, "throttle_reasons": "0x0"}


def timed(monkeypatch, folder, job):
    """What ``bench.attention`` leaves of one job."""
    monkeypatch.setattr(attention, "GROUPS", {"append": lambda *_: [(0, "append a", job)]})
    attention.main(["--out", str(folder), "--dry-run", "--only", "append"])
    return json.loads((folder / "manifest.json").read_text())


def test_results_have_a_manifest_beside_them(tmp_path, monkeypatch):
    content = timed(monkeypatch, tmp_path / "out", lambda: None)
    assert content["argv"] == ["--out", str(tmp_path / "out"), "--dry-run", "--only", "append"]
    assert content["command"].startswith("python -m bench.attention --out ")
    assert content["versions"]["torch"] == torch.__version__
    assert {"triton", "python"} <= set(content["versions"]) and "commit" in content["git"]
    assert content["gpus"] == [] and content["gpu_uuid"] == "" and content["seeds"] == [0]
    assert content["peers"]["FA3"] == "absent: RuntimeError: no --peers folder"
    assert content["started_utc"] <= content["finished_utc"]


def test_a_run_that_was_cut_off_has_no_end(tmp_path, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timed(monkeypatch, tmp_path / "out", stop)
    content = json.loads((tmp_path / "out/manifest.json").read_text())
    assert content["finished_utc"] is None
    assert manifest.cited(tmp_path / "out/attention.csv")[-1] == "cut off before its end"


def test_the_gpu_that_ran_is_named_and_its_clocks_read_twice(tmp_path, monkeypatch):
    seen = {"git": {"commit": "c" * 40, "dirty": False}, "versions": {}, "environment": {}}
    monkeypatch.setattr(manifest, "surroundings", lambda: seen | {"gpus": [{"uuid": "0"}, GPU]})
    monkeypatch.setattr(manifest, "seen_gpu", lambda: GpuSeen("NVIDIA H200", 1, 1, "GPU-1"))
    content = timed(monkeypatch, tmp_path, lambda: None)
    assert content["gpu_uuid"] == "GPU-1" and content["gpus_after"][1] == GPU
    results = tmp_path / "attention.csv"
    assert manifest.cited(results) == [f"commit `{'c' * 12}`", "driver 580.1", "`GPU-1`"]
    Rows(results, 10).add(None, None, work="peers", kernel="XQA", gate="absent: no folder")
    page = tmp_path / "page.md"
    page.write_text(f"{table.BEGIN}\n{table.END}\n")
    table.main([str(results), str(page)])
    assert f"commit `{'c' * 12}`, driver 580.1, `GPU-1`; medians, from `{results}`." in (
        page.read_text()
    )


def test_a_manifest_of_another_file_is_not_cited(tmp_path):
    assert manifest.cited(tmp_path / "attention.csv") == []
    for text in ('{"results": "other.csv"}', "[]", "not json"):
        (tmp_path / "manifest.json").write_text(text)
        assert manifest.cited(tmp_path / "attention.csv") == []


def test_committed_pages_hold_the_table_of_the_committed_rows(tmp_path):
    source = "results/reference/kernels/attention.csv"
    made = table.page(table.read(ROOT / source), source, manifest.cited(ROOT / source))
    for name in ("README.md", "kernels/README.md"):
        page = tmp_path / "page.md"
        page.write_text((ROOT / name).read_text())
        table.insert(page, made)
        assert page.read_text() == (ROOT / name).read_text(), name
