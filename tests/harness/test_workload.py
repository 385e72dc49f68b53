"""Traces, churn and batches as trials: what their rows say, and that nothing is left."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from harness import forecast
from harness.arms import settings_of_command
from harness.cell import Cell
from harness.columns import ordered
from harness.lengths import batch_lengths, filled_tokens, targets
from harness.sizes import BadValue
from harness.trace_file import Request, read_trace
from harness.trial import Trial
from harness.validate import compose_settings
from harness.workload import arrival_steps

SMALL = ["hardware=scale_model", "hardware.capacity=24GiB", "context=14089"]


def run(*words):
    """Row, ledger events and samples of a trial in this process."""
    settings = compose_settings([*SMALL, *words])
    records = []
    cell = Cell(settings, settings.context_tokens, settings.fills[0] if settings.fills else 1.0)
    Trial([cell], records.append, {"experiment": "test"}).run()
    (row,) = [r["row"] for r in records if r["type"] == "row"]
    row = ordered(forecast.with_prediction(row, cell))
    events = [r["row"] for r in records if r["type"] == "timeline"]
    return row, events, [r for r in records if r["type"] == "sample"]


@pytest.fixture(scope="module")
def paged():
    return run("strategy=paged", "workload=trace")


def test_ten_thousand_requests_leave_nothing_behind(paged):
    row, events, _ = paged
    trace = read_trace()
    assert row["status"] == "ok"
    assert (row["trace_requests"], row["sequences_refused"]) == (10_000, 0)
    assert row["trace_input_tokens"] == trace.input_tokens == 12_424_297
    assert row["trace_output_tokens"] == trace.output_tokens == 2_184_052
    assert row["kv_end_committed_bytes"] == 0
    assert events[-1]["kv_committed_bytes"] == 0 and events[-1]["resident_tokens"] == 0
    ready = next(e for e in events if e["allocation"] == "ready")
    assert events[-1]["ledger_bytes"] == ready["ledger_bytes"]
    assert abs(events[-1]["device_used_bytes"] - ready["device_used_bytes"]) <= 1 << 16
    assert abs(row["unexplained_bytes"]) <= row["tolerance_bytes"]


def test_a_rows_bytes_and_shares_agree(paged):
    row, events, samples = paged
    shares = [row[f"{n}_share"] for n in ("live", "reserved", "internal", "external")]
    assert sum(shares) == pytest.approx(1)
    assert row["kv_live_bytes"] / row["kv_committed_bytes"] == pytest.approx(shares[0], rel=1e-6)
    assert row["live_share"] > 0.9
    assert 0.5 < row["admission_limited_share"] <= 1
    assert row["sequences_admitted"] <= row["peak_sequences"] <= row["sequences"]
    assert row["resident_tokens"] == max(e["resident_tokens"] for e in events)
    assert row["attention_decode_step_ms"] is None and row["gate_error"] is None
    assert row["predicted_status"] == "ok" and row["predicted_off_by"] is None
    for measured, predicted in (("kv_committed", "kv"), ("peak_device", "peak")):
        foreseen = row[f"predicted_{predicted}_bytes"]
        assert row[f"{measured}_bytes"] == pytest.approx(foreseen, rel=0.01)
    assert len(samples) >= 100
    assert all(s["live_bytes"] <= s["committed_bytes"] for s in samples)


@pytest.mark.parametrize("policy", ["max", "pow2", "exact"])
def test_slots_waste_what_the_paper_says_they_do(policy, paged):
    row, _, _ = run(
        "strategy=static",
        "strategy.mem_fraction_of=device",
        f"strategy.slot_policy={policy}",
        "workload=trace",
        "workload.requests=3000",
    )
    assert row["status"] == "ok" and row["trace_requests"] == 3000
    assert row["sequences_preempted"] == 0
    assert row["predicted_off_by"] is None
    assert row["kv_committed_bytes"] == pytest.approx(paged[0]["kv_committed_bytes"], rel=1e-3)
    assert row["live_share"] < paged[0]["live_share"] - 0.1
    if policy == "max":
        pool = row["kv_committed_bytes"] // row["kv_bytes_per_token"]
        assert row["peak_sequences"] == pool // (-(-14089 // 128) * 128)
        assert row["internal_share"] > 0.8


def test_engines_serve_the_same_trace():
    row, _, _ = run(
        "strategy=vllm",
        "strategy.gpu_memory_utilization=0.95",
        "strategy.max_num_seqs=1024",
        "workload=trace",
        "workload.requests=2000",
    )
    assert (row["status"], row["trace_requests"]) == ("ok", 2000)
    assert row["live_share"] > 0.95
    assert row["kv_end_committed_bytes"] == row["kv_reserved_bytes"]


def test_requests_longer_than_the_context_are_refused_and_counted():
    row, _, _ = run("strategy=paged", "workload=trace", "workload.requests=500", "context=1024")
    long = sum(r.total_tokens > 1024 for r in read_trace(limit=500).requests)
    assert row["sequences_refused"] == long > 0
    assert row["trace_requests"] == 500 - long


def test_blocks_of_one_token_for_the_allocator_alone():
    words = ["strategy=paged", "workload=trace", "workload.requests=60", "hardware.capacity=8GiB"]
    row, _, _ = run(*words, "trial.page_tokens=1")
    assert row["status"] == "ok" and row["internal_share"] == 0
    with pytest.raises(BadValue, match=r"trial\.page_tokens"):
        compose_settings([*SMALL, "trial.page_tokens=1"])


def test_churn_tells_how_long_a_sequence_still_fits():
    row, events, samples = run(
        "strategy=paged", "workload=churn", "workload.operations=300", "context=32Ki"
    )
    assert row["status"] == "ok" and row["kv_end_committed_bytes"] == 0
    assert 0 < row["largest_admissible_tokens"] <= 32 << 10
    assert 0 < row["admissible_of_free_min"] <= row["admissible_of_free"] <= 1
    assert samples[-1]["open"] == 0 and events[-1]["resident_tokens"] == 0
    assert row["predicted_tables_bytes"] == row["tables_bytes"]
    assert row["predicted_peak_bytes"] is row["predicted_kv_bytes"] is None
    assert row["predicted_off_by"] == "kv and peak not foreseen: memory may not be filled"
    assert row["step_ms"] == 25 and 0 < row["simulated_hours"] < 100
    committed = [e["kv_committed_bytes"] for e in events if "kv_committed_bytes" in e]
    rises = sum(b > a for a, b in pairwise(committed))
    falls = sum(b < a for a, b in pairwise(committed))
    assert min(rises, falls) > 20


@pytest.mark.parametrize("options", [[], ["strategy.release=deferred", "strategy.growth=ahead"]])
def test_churn_that_fills_memory_has_its_peak_foreseen(options):
    words = ("workload=churn", "workload.operations=300", "context=32Ki", "hardware.capacity=8GiB")
    row, events, _ = run("strategy=paged", *words, *options)
    ready = next(e for e in events if e["allocation"] == "ready")["device_used_bytes"]
    assert row["predicted_peak_bytes"] > 1.5 * ready
    assert row["peak_device_bytes"] == pytest.approx(row["predicted_peak_bytes"], rel=0.01)
    assert row["predicted_kv_bytes"] is None
    assert row["predicted_off_by"] == "kv not foreseen: a mean over the operations"


def test_a_batch_is_filled_to_its_own_lengths_and_timed():
    words = ["workload=batch", "workload.sequences=5", "workload.min_tokens=100"]
    row, _, _ = run("strategy=paged", "context=4096", *words, "workload.max_tokens=4096")
    settings = compose_settings([*SMALL, "context=4096", *words, "workload.max_tokens=4096"])
    lengths = batch_lengths(Cell(settings, 4096))
    assert row["status"] == "ok" and row["gate_error"] < 0.05
    assert row["resident_tokens"] == sum(lengths) and len(set(lengths)) == 5
    assert row["predicted_kv_bytes"] == row["kv_committed_bytes"]
    assert lengths[-1] == max(lengths) and all(100 <= n <= 4096 for n in lengths)
    assert row["attention_decode_tokens_per_second"] == pytest.approx(
        5e3 / row["attention_decode_step_ms"]
    )
    halved = Cell(settings, 4096, fill=0.5)
    assert targets(halved) == [n // 2 for n in lengths]
    assert filled_tokens(halved) == sum(n // 2 for n in lengths)


def test_decode_alone_is_timed_where_no_histories_are_asked_for():
    words = ["strategy=paged", "context=4096", "trial.prefill_histories=0"]
    row, events, samples = run(*words)
    assert row["status"] == "ok" and row["gate_error"] < 0.05
    assert row["attention_decode_step_ms"] > 0 and row["prefill_kernel_variant"]
    assert row["attention_prefill_chunk_ms"] is row["prefill_samples"] is None
    assert "prefill" not in {s["what"] for s in samples} | {e["phase"] for e in events}
    for wrong in ("1", "-1", "51"):
        with pytest.raises(BadValue, match="0, or from 2 to 50"):
            compose_settings([*SMALL, f"trial.prefill_histories={wrong}"])


def test_arrivals():
    requests = [Request(0.0, 1, 1), Request(1.0, 1, 1), Request(1.01, 1, 1)]
    assert arrival_steps(requests, "max", 25, 0) == [0, 0, 0]
    assert arrival_steps(requests, "recorded", 25, 0) == [0, 40, 41]
    many = [Request(0.0, 1, 1)] * 4000
    steps = arrival_steps(many, 10.0, 25, 0)
    assert steps == sorted(steps) == arrival_steps(many, 10.0, 25, 0)
    assert steps != arrival_steps(many, 10.0, 25, 1)
    assert steps[-1] * 0.025 == pytest.approx(400, rel=0.1)


def test_a_slow_trace_is_not_limited_by_admission():
    row, _, _ = run(
        "strategy=paged", "workload=trace", "workload.requests=200", "workload.rate=recorded"
    )
    assert row["status"] == "ok" and row["admission_limited_share"] == 0
    assert row["predicted_off_by"] == "kv and peak not foreseen: they follow the arrivals"
    assert row["sequences_admitted"] > 0 and row["live_share"] > 0
    assert row["simulated_hours"] * 3600 == pytest.approx(row["workload_steps"] * 0.025)
    assert row["workload_steps"] * 0.025 >= read_trace(limit=200).requests[-1].arrival_seconds


@pytest.mark.parametrize(
    "word",
    [
        "workload.kind=party",
        "workload.rate=0",
        "workload.rate=fast",
        "workload.rate=true",
        "workload.requests=0",
        "workload.requests=2.5",
        "workload.step_ms=0",
        "workload.sequences=0",
        "workload.operations=0",
        "workload.min_tokens=300Ki",
        "workload.path=/nowhere/trace.csv",
        "workload.path=[1,2]",
        "parallel=context",
    ],
)
def test_what_is_no_workload_is_refused_in_one_line(word):
    with pytest.raises(BadValue) as caught:
        compose_settings([*SMALL, "workload=trace", word])
    assert "\n" not in str(caught.value)


def test_a_changed_trace_is_another_cell(tmp_path):
    path = tmp_path / "trace.csv"

    def cell(output):
        path.write_text(f"TIMESTAMP,ContextTokens,GeneratedTokens\n1.0,5,{output}\n")
        settings = compose_settings([*SMALL, "workload=trace", f"workload.path={path}"])
        return Cell(settings, settings.context_tokens)

    first, second = cell(1), cell(2)
    assert first.trial_id != second.trial_id
    assert json.dumps(first.to_json())


@pytest.mark.parametrize(
    ("experiment", "arms"),
    [("waste", 7), ("fragmentation", 11), ("granularity", 27), ("precision", 4), ("remedies", 13)],
)
def test_an_experiments_arms_are_distinct_and_known_to_the_planner(experiment, arms):
    found = settings_of_command([f"experiment={experiment}", "hardware=scale_model"], False)
    assert len(found) == arms
    named = [s.arm for s in found if s.arm]
    assert len(named) == len(set(named))
    for settings in found:
        forecast.check(settings)
