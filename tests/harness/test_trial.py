"""Trials on the scale model, in this process: any geometry ends as the planner says."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from harness import forecast, trial
from harness.cell import Cell
from harness.columns import ordered
from harness.launch import unfinished
from harness.provenance import attempt
from harness.ranks import Place
from harness.rows import own_crash
from harness.sizes import BadValue
from harness.steps import STEP_TOKENS
from harness.summary import summarise
from harness.trial import Trial
from strategies.device_host import HostDevice
from tests.harness.composed import made

SMALL = "hardware.capacity=3GiB"


class Untouched(Trial):
    """A trial whose sequences are grown and not written: no torch, and pages stay zero."""

    _writes = False


def run(*cells):
    """Rows and ledger events of one process's cells."""
    records = []
    ran = Untouched(list(cells), records.append, {})
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
    # How the windows of hundreds of sequences share chunks, and what a thread maps ahead in one
    # of two groups when memory is nearly full, is foreseen to some chunks only.
    sequences = one(1, 2) if hybrid == "true" else one(1, 2, 300)
    growth = "sync" if hybrid == "true" else one("sync", "ahead")
    strategy = one("static", "paged", "eager_pages", "sglang", "vllm")
    keys = {
        "static": [f"strategy.mem_fraction_of={one('context', 'device')}"],
        "paged": [
            f"strategy.growth={growth}",
            f"strategy.release={one('immediate', 'deferred')}",
            f"strategy.low_water={one('1GiB', '40MiB')}",
        ],
    }
    words = [
        f"strategy={strategy}",
        *keys.get(strategy, []),
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
    return words, one("bracket", "resident", "point"), one(0.3, 1.0)


def off_by(row, own):
    """What a prediction is off by.

    In ``paged``, the pages of a window and of the step that crosses into the next may lie in more
    chunks, or fewer, than they would fill.
    """
    groups = own.kv_model().groups
    named = (row["predicted_off_by"] or "").split("; ")
    if own.strategy == "paged" and len(groups) > 1:
        step = [1 + -(-g.pages(STEP_TOKENS) // g.pages_per_chunk) for g in groups]
        allowed = sum(n * g.chunk_bytes for n, g in zip(step, groups, strict=True))
        if abs(row["kv_committed_bytes"] - row["predicted_kv_bytes"]) <= own.sequences * allowed:
            named = [n for n in named if not n.startswith("kv ")]
    return [n for n in named if n and not n.startswith("status ")]


def ends(row, cell):
    """How a trial may end: as predicted, or, in ``paged``, as on a device a few chunks smaller.

    Behind a step that crosses into the next window, a sequence's pages may lie in one chunk more
    than they would fill.
    """
    own = cell.settings
    if own.strategy != "paged" or row["oom_phase"] != "fill":
        return {row["predicted_status"]}
    windows = sum(g.chunk_bytes for g in own.kv_model().groups if g.window_tokens)
    capacity = own.hardware.capacity_bytes - own.sequences * windows * own.scale
    smaller = replace(own, hardware=replace(own.hardware, capacity_bytes=capacity))
    made = forecast.predict_cell(replace(cell, settings=smaller))
    return {row["predicted_status"], made.outcome}


# Halved near the capacity, its last window lies in three chunks, of which it would fill two.
SCATTERED = """
    strategy=paged strategy.growth=sync strategy.release=deferred strategy.low_water=40MiB
    parallel.ranks=2 model.layers=54 model.kv_heads_total=16 model.q_heads_total=64
    model.head_dim=128 model.kv_dtype=fp8_e4m3 model.weights_per_rank=189 model.local_layers=27
    model.window_tokens=640 model.hybrid=true context=159400 workload.sequences=1
    trial.page_tokens=16 trial.chunk_target=1MiB
""".split()


def narrow(layers, local, kv_heads, dim, dtype, window, page, context, ranks=1, q_heads=1):
    """Two sequences of eager_pages, whose windows are narrower than a step."""
    words = [
        f"strategy=eager_pages parallel.ranks={ranks} model.layers={layers} model.hybrid=true",
        f"model.local_layers={local} model.kv_heads_total={kv_heads} model.head_dim={dim}",
        f"model.q_heads_total={q_heads} model.kv_dtype={dtype} model.window_tokens={window}",
        f"model.weights_per_rank=1 context={context} workload.sequences=2",
        f"trial.page_tokens={page} trial.chunk_target=1MiB {SMALL}",
    ]
    return " ".join(words).split()


@settings(max_examples=30, deadline=None)
@given(asked=geometries())
@example(([*SCATTERED, SMALL], "point", 0.3))
@example((narrow(32, 16, 1, 64, "fp8_e4m3", 128, 16, 30_724), "point", 0.3))
@example((narrow(32, 16, 8, 256, "fp8_e4m3", 128, 16, 673, ranks=8, q_heads=32), "point", 1.0))
@example((narrow(56, 55, 8, 128, "fp8_e4m3", 384, 128, 81_004, q_heads=32), "point", 0.3))
@example((narrow(47, 46, 1, 256, "bf16", 256, 128, 4_970, ranks=2, q_heads=8), "point", 0.3))
def test_any_geometry_ends_as_planned(asked):
    words, purpose, fill = asked
    try:
        own = made(*words)
        forecast.check(own)
    except BadValue:
        assume(False)
    cell = Cell(own, own.context_tokens, fill=fill, purpose=purpose, timing=False)
    (row,), events = run(cell)
    assert row["status"] in ends(row, cell)
    assert not off_by(row, own)
    assert abs(row["unexplained_bytes"]) <= row["tolerance_bytes"]
    assert row["peak_ledger_bytes"] <= row["capacity_bytes"]
    if row["status"] == "oom":
        assert row["oom_requested_bytes"] > row["oom_free_bytes"] >= 0
        assert row["oom_phase"] == events[-1]["phase"]
        assert row["oom_source"] in ("budget", "pool")  # the device, or the pages of a pool
    if row["status"] == "ok" and purpose == "bracket":
        assert row["resident_tokens"] == 0 and row["resident_limited_by"] is None
    elif row["status"] == "ok":
        assert row["resident_limited_by"] == "target"
        filled = own.sequences if purpose == "point" else 1
        assert row["resident_tokens"] == cell.target_tokens * filled


@pytest.mark.parametrize("context", ["1M", "10M"])
def test_a_refusal_makes_the_thread_give_back_what_it_kept_in_every_group(context):
    words = ("strategy=paged", "strategy.growth=ahead", "model=llama4_scout", "model.hybrid=true")
    own = made(*words, "model.weights_per_rank=1", f"context={context}", "hardware.capacity=8GiB")
    (row,), _ = run(Cell(own, own.context_tokens, purpose="resident", timing=False))
    refused = row["status"] == "oom"
    assert refused == (context == "10M") and not off_by(row, own)
    assert row["status"] == row["predicted_status"]
    kept = row["kv_committed_bytes"] - row["kv_live_bytes"]
    assert kept == 0 if refused else kept > 0


@pytest.mark.parametrize(
    ("window", "context"), [(3072, 300_007), (40_960, 70_000), (106_496, 200_000)]
)
def test_a_peak_is_read_before_a_window_is_given_back(window, context, monkeypatch):
    """Held against the budget, which counts every chunk as it is committed."""
    most = []
    take = HostDevice.take

    def counted(self, *given, **named):
        take(self, *given, **named)
        most.append(self.capacity_bytes - self.free_bytes())

    monkeypatch.setattr(HostDevice, "take", counted)
    own = made(
        *("strategy=paged", f"context={context}", "hardware.capacity=12GiB"),
        *("model=llama4_scout", "model.hybrid=true", "model.local_layers=47"),
        f"model.window_tokens={window}",
        *("model.weights_per_rank=1", "trial.chunk_target=2MiB"),
    )
    (row,), _ = run(Cell(own, context, timing=False))
    chunk = own.kv_model().groups[0].chunk_bytes  # of the layers that give nothing back
    assert row["status"] == "ok"
    assert 0.995 * max(most) - chunk <= row["peak_device_bytes"] <= max(most)
    assert row["peak_ledger_bytes"] == pytest.approx(row["peak_device_bytes"], abs=64 << 10)


@pytest.mark.parametrize("growth", ["sync", "ahead"])
@pytest.mark.parametrize("low_water", ["1B", "40MiB", "200MiB", "1GiB"])
@pytest.mark.parametrize(("window", "context"), [(3072, 300_007), (40_960, 70_000)])
def test_what_is_kept_behind_a_window_is_as_planned(window, context, low_water, growth):
    own = made(
        *("strategy=paged", f"context={context}", "hardware.capacity=12GiB"),
        *("model=llama4_scout", "model.hybrid=true", f"model.window_tokens={window}"),
        *("model.weights_per_rank=1", "trial.chunk_target=2MiB", f"strategy.growth={growth}"),
        *("strategy.release=deferred", f"strategy.low_water={low_water}"),
    )
    (row,), _ = run(Cell(own, context, timing=False))
    # In which chunks the thread finds a window's pages depends on when it looks.
    ahead = sum(4 * g.chunk_bytes for g in own.kv_model().groups) if growth == "ahead" else 0
    assert abs(row["kv_committed_bytes"] - row["predicted_kv_bytes"]) <= ahead
    off = abs(row["peak_device_bytes"] - row["predicted_peak_bytes"])
    assert off <= ahead + 0.005 * row["peak_device_bytes"]


@pytest.mark.parametrize("chunk", ["2MiB", "64MiB"])
def test_growth_mapped_ahead_has_the_events_of_synchronous_growth(chunk):
    rows = []
    for growth in ("sync", "ahead"):
        words = ("strategy=paged", f"strategy.growth={growth}", f"trial.chunk_target={chunk}")
        own = made(*words, "context=300K", "hardware.capacity=12GiB")
        (row,), _ = run(Cell(own, own.context_tokens, timing=False))
        rows.append(row)
    sync, ahead = rows
    held = -(-300_000 * 128 // sync["chunk_bytes"])
    steps = -(-300_000 // STEP_TOKENS)
    assert sync["grow_events"] == ahead["grow_events"] == min(held, steps) >= 100
    assert all(r["grow_stall_us_p99"] >= r["grow_stall_us_p50"] > 0 for r in rows)


@pytest.mark.parametrize("strategy", ["static", "paged", "eager_pages"])
def test_a_resident_cell_fills_one_sequence_of_several(strategy):
    words = (f"strategy={strategy}", "context=1M", "workload.sequences=3", "hardware.capacity=9GiB")
    own = made(*words)
    context = forecast.startup_guess(own)
    (row,), _ = run(Cell(own, context, purpose="resident", timing=False))
    assert row["sequences"] == 3 and row["status"] == row["predicted_status"]
    points = forecast.points(own)
    found = summarise([row], [])["strategies"][strategy]["resident"]
    assert found["ok"] == row["resident_tokens"] == points.resident.ok
    if strategy == "static":
        assert found["ok"] == context == points.startup.ok < 1_000_000
    else:
        assert found["limited_by"] == points.resident.limited_by == "oom"


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


def test_ranks_hold_tokens_and_heads_of_their_own_and_copies_of_a_head_alike():
    own = made("model=qwen3_30b_a3b")  # 4 KV heads
    seeds = {}
    for rank in range(16):
        place = Place(rank, 16, tensor_ranks=8, context_ranks=2)
        seed = Trial([Cell(own, 1)], print, {}, SimpleNamespace(place=place))._content_seed
        seeds.setdefault(seed, []).append((place.tensor_index // 2, place.context_index))
    assert sorted(seeds.values()) == [[(h, c)] * 2 for h in range(4) for c in range(2)]


VLLM_AUTO = ("strategy=vllm", "strategy.max_model_len=auto", "strategy.max_num_seqs=16")


@pytest.mark.parametrize(
    ("words", "block_tokens"),
    [
        (["strategy=sglang", "strategy.max_running_requests=16"], 1),
        (["strategy=sglang", "strategy.max_running_requests=16", "strategy.page_size=64"], 64),
        ([*VLLM_AUTO], 16),
        ([*VLLM_AUTO, "strategy.block_size=32"], 32),
    ],
)
def test_an_engines_row_says_nothing_of_our_arena_and_holds_to_its_own_block(words, block_tokens):
    own = made(*words, "context=4M", "hardware.capacity=80GiB")
    (row,), _ = run(Cell(own, 4_000_000, purpose="resident", timing=False))
    empty = ("arena", "layout", "table_order", "page_tokens", "chunk_bytes", "kv_scales")
    assert [row[c] for c in empty] == [None] * 6
    assert row["block_tokens"] == block_tokens
    assert row["status"] == "refused" and row["oom_phase"] == "fill"
    assert row["resident_tokens"] % block_tokens == 0
    assert row["resident_tokens"] == forecast.predict_cell(Cell(own, 4_000_000)).resident_tokens
    held = summarise([row], [])["strategies"][own.strategy]["resident"]
    assert held["not_ok"] == held["ok"] + block_tokens == row["resident_tokens"] + block_tokens


def test_an_emulated_crash_is_a_result_that_was_foreseen():
    own = made("strategy=vllm", "context=4M")
    cell = Cell(own, 4_000_000, timing=False)
    row = forecast.with_prediction(run(cell)[0][0], cell)
    assert (row["status"], row["predicted_status"]) == ("crash", "crash")
    assert "do not fit into 32 bits" in row["error"] and row["peak_device_bytes"] > 0
    assert own_crash(row) and not own_crash(row | {"predicted_status": "ok"})
    assert summarise([row], [])["strategies"]["vllm"]["startup"]["limited_by"] == "crash"


def test_our_own_rows_say_what_ran():
    own = made("strategy=paged", "context=2K", "hardware.capacity=8GiB", "trial.page_tokens=64")
    (row,), _ = run(Cell(own, 2_000, purpose="bracket", timing=False))
    assert (row["arena"], row["layout"], row["table_order"]) == ("mmap", "page_major", "identity")
    assert (row["page_tokens"], row["block_tokens"]) == (64, None)
    assert row["chunk_bytes"] == max(g.chunk_bytes for g in own.kv_model().groups)
    assert row["gpu_uuid"] is None


def test_a_row_names_the_gpu_that_its_device_names(monkeypatch):
    own = made("strategy=paged", "context=2K", "hardware.capacity=8GiB")
    open_device = trial.open_device

    def opened(*given, **named):
        device = open_device(*given, **named)
        device.uuid = "GPU-that-ran"
        return device

    monkeypatch.setattr(trial, "open_device", opened)
    (row,), _ = run(Cell(own, 2_000, purpose="bracket", timing=False))
    assert row["gpu_uuid"] == "GPU-that-ran"


def test_a_process_that_died_had_the_gpu_of_its_settings():
    own = made("strategy=paged", "context=2K")
    gpu = replace(own, hardware=replace(own.hardware, kind="cuda", uuid="GPU-0"))
    ended = {"status": "crash"}
    assert unfinished(Cell(gpu, 2_000), {}, ended, {}, 1.0)["gpu_uuid"] == "GPU-0"
    ranks = replace(gpu, parallel=replace(gpu.parallel, processes=2))  # each knows only its own
    assert unfinished(Cell(ranks, 2_000), {}, ended, {}, 1.0)["gpu_uuid"] is None
    assert attempt([gpu, gpu])["gpu_uuids"] == ["GPU-0"] and attempt([own])["gpu_uuids"] == []


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
