"""Trials on the scale model, in this process: any geometry ends as the planner says."""

from __future__ import annotations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from harness import forecast, trial
from harness.cell import Cell
from harness.columns import ordered
from harness.sizes import BadValue
from harness.trial import Trial
from tests.harness.composed import made

SMALL = "hardware.capacity=3GiB"


def run(*cells):
    """Rows and ledger events of one process's cells."""
    records = []
    ran = Trial(list(cells), records.append, {})
    try:
        ran.run()
    finally:
        if ran.device is not None:
            ran.device.close()
    rows = [r["row"] for r in records if r["type"] == "row"]
    rows = [forecast.with_prediction(r, c) for r, c in zip(rows, cells, strict=True)]
    return [ordered(r) for r in rows], [r["row"] for r in records if r["type"] == "timeline"]


@st.composite
def geometries(draw):
    """Words of a model that no file describes, a strategy and a question."""

    def one(*options):
        return draw(st.sampled_from(options))

    kv_heads, ranks, layers = one(1, 2, 8, 16), one(1, 2, 8), draw(st.integers(32, 100))
    hybrid = one("true", "false")
    # How the windows of hundreds of sequences share chunks is foreseen to some chunks only.
    sequences = one(1, 2) if hybrid == "true" else one(1, 2, 300)
    strategy = one("static", "paged", "eager_pages", "sglang", "vllm")
    keys = {
        "static": f"strategy.mem_fraction_of={one('context', 'device')}",
        "paged": f"strategy.growth={one('sync', 'ahead')}",
    }
    words = [
        f"strategy={strategy}",
        keys.get(strategy, "seed=0"),
        f"parallel.ranks={ranks}",
        f"model.layers={layers}",
        f"model.kv_heads_total={kv_heads}",
        f"model.q_heads_total={max(kv_heads, ranks) * one(1, 4)}",
        f"model.head_dim={one(64, 128, 256)}",
        f"model.kv_dtype={one('fp8_e4m3', 'bf16')}",
        f"model.weights_per_rank={draw(st.integers(1, 10**9))}",
        f"model.local_layers={one(0, 1, layers // 2, layers - 1)}",
        f"model.window_tokens={128 * draw(st.integers(1, 100))}",
        f"model.hybrid={hybrid}",
        f"context={draw(st.one_of(st.integers(1, 200_000), st.sampled_from([10**7, 1 << 40])))}",
        f"workload.sequences={sequences}",
        f"trial.page_tokens={one(16, 128)}",
        f"trial.chunk_target={one('1MiB', '64MiB', '1GiB')}",
        SMALL,
    ]
    return words, one("bracket", "resident"), one(0.3, 1.0)


@settings(max_examples=30, deadline=None)
@given(asked=geometries())
def test_any_geometry_ends_as_planned(asked):
    words, purpose, fill = asked
    try:
        own = made(*words)
        forecast.check(own)
    except BadValue:
        assume(False)
    cell = Cell(own, own.context_tokens, fill=fill, purpose=purpose, timing=False)
    (row,), events = run(cell)
    assert row["status"] == row["predicted_status"]
    assert row["predicted_off_by"] is None
    assert abs(row["unexplained_bytes"]) <= row["tolerance_bytes"]
    assert row["peak_ledger_bytes"] <= row["capacity_bytes"]
    if row["status"] == "oom":
        assert row["oom_requested_bytes"] > row["oom_free_bytes"] >= 0
        assert row["oom_phase"] == events[-1]["phase"]
        assert row["oom_source"] in ("budget", "pool")  # the device, or the pages of a pool
    if row["status"] == "ok" and purpose == "resident":
        assert row["resident_tokens"] == cell.target_tokens * own.sequences


def test_one_process_fills_through_several_lengths():
    own = made("strategy=paged", "hardware.capacity=8GiB", "context=20K")
    cells = [Cell(own, 20_000, fill=f, purpose="resident") for f in (0.0, 0.1, 0.5, 1.0)]
    rows, events = run(*cells)
    assert [r["resident_tokens"] for r in rows] == [0, 2_000, 10_000, 20_000]
    assert [r["trial_id"] for r in rows] == [c.trial_id for c in cells]
    committed = [r["kv_committed_bytes"] for r in rows]
    assert committed == sorted(committed) and committed[0] == 0 < committed[1]
    assert [r["predicted_kv_bytes"] for r in rows] == committed
    assert {e["trial_id"] for e in events} == {c.trial_id for c in cells}


def test_a_fill_that_is_refused_ends_every_cell_that_is_left():
    own = made("strategy=paged", "hardware.capacity=6GiB", "context=1M")
    rows, events = run(
        *[Cell(own, 1_000_000, fill=f, purpose="resident") for f in (0.01, 0.9, 1.0)]
    )
    assert [r["status"] for r in rows] == ["ok", "oom", "oom"]
    assert rows[1]["resident_tokens"] == rows[2]["resident_tokens"] > 10_000
    assert rows[1]["resident_tokens"] % 128 == 0  # to the last page that fits
    assert rows[1]["oom_phase"] == "fill" and rows[1]["resident_limited_by"] == "oom"
    assert rows[1]["grow_events"] > 0 and rows[1]["grow_stall_us_p99"] > 0
    assert events[-1]["phase"] == "fill" and "refused" in events[-1]["allocation"]


@pytest.mark.parametrize(
    ("error", "status", "source"),
    [
        (type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory."), "oom", "torch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "oom_host", None),
        (MemoryError(), "oom_host", None),
    ],
)
def test_memory_that_runs_out_elsewhere_is_a_result(error, status, source, monkeypatch):
    def fails(settings, device):
        raise error

    monkeypatch.setattr(trial, "allocate_workspace", fails)
    own = made("strategy=paged", "hardware.capacity=8GiB", "context=2K")
    (row,), _ = run(Cell(own, 2_000, purpose="bracket", timing=False))
    assert (row["status"], row["oom_source"]) == (status, source)
    assert row["oom_phase"] == ("workspace" if status == "oom" else None)


def test_another_error_is_not_taken_for_one_of_memory(monkeypatch):
    def fails(settings, device):
        raise RuntimeError("something else")

    monkeypatch.setattr(trial, "allocate_workspace", fails)
    own = made("strategy=paged", "hardware.capacity=8GiB", "context=2K")
    with pytest.raises(RuntimeError, match="something else"):
        run(Cell(own, 2_000, purpose="bracket", timing=False))
