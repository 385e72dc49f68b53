"""Each fault of a folder fails its own checks and no other."""

from __future__ import annotations

import pytest

from harness.columns import ordered
from tests.harness.checked import failures, first_ok, first_oom, write_run
from tests.harness.run_fixture import MANIFEST, bracket, sweep


def unexplained(rows, manifest):
    first_ok(rows)["unexplained_bytes"] = 1 << 40


def no_reconciliation(rows, manifest):
    first_ok(rows)["unexplained_bytes"] = None


def unexplained_where_memory_ended(rows, manifest):
    first_oom(rows)["unexplained_bytes"] = 10 << 30


def no_reconciliation_where_memory_ended(rows, manifest):
    first_oom(rows)["unexplained_bytes"] = None


def ledger_above_the_meter(rows, manifest):
    row = first_oom(rows)
    row["peak_ledger_bytes"] = row["peak_device_bytes"] + (10 << 30)


def more_free_than_there_is(rows, manifest):
    row = first_oom(rows)
    row["oom_free_bytes"] = row["capacity_bytes"] + (10 << 30)


def unrepeatable(rows, manifest):
    row = first_ok(rows)
    row["attention_decode_step_ms"] *= 1.05
    row["attention_decode_tokens_per_second"] /= 1.05


def unrepeatable_memory(rows, manifest):
    row = first_ok(rows)
    row["peak_device_bytes"] = row["predicted_peak_bytes"] = row["peak_device_bytes"] + (1 << 30)


def bracket_once(rows, manifest):
    del rows[-1]


def resident_once(rows, manifest):
    rows.remove(next(r for r in rows if r["purpose"] == "resident"))


def never_filled(rows, manifest):
    rows[:] = [r for r in rows if r["purpose"] != "resident"]


def held_less_the_second_time(rows, manifest):
    last = [r for r in rows if r["purpose"] == "resident"][-1]
    last["resident_tokens"] -= 6_000


def filled_where_it_does_not_start_each_time(rows, manifest):
    """It was filled twice at the upper end, of which another trial says that it does not start."""
    for row in list(rows):
        if row["purpose"] == "resident":
            row |= {"context_tokens": 5_802_816, "resident_tokens": 5_802_816}
        elif row["purpose"] == "bracket" and row["status"] == "oom":
            rows.append(row | {"context_tokens": 5_802_817, "trial_id": f"{row['trial_id']}b"})


def wide_bracket(rows, manifest):
    for row in rows[-4:]:
        if row["context_tokens"] == 5_802_816:
            row["context_tokens"] = 5_900_000


def bracket_both_ways(rows, manifest):
    """An end that was ok in one trial and not in its repeat."""
    ends = [r for r in rows if r["purpose"] == "bracket"]
    ok, oom = (next(r for r in ends if r["status"] == s) for s in ("ok", "oom"))
    again = {"context_tokens": ok["context_tokens"], "trial_id": "z" * 12, "repeat": 9}
    rows.append(ordered(oom | again))


def dirty(rows, manifest):
    manifest["git"] = {"commit": "c" * 40, "dirty": True}


def speed_in_a_failed_row(rows, manifest):
    next(r for r in rows if r["status"] == "oom")["attention_decode_step_ms"] = 1.0


def ungated(rows, manifest):
    first_ok(rows)["gate_error"] = None


def gate_beyond_its_limit(rows, manifest):
    first_ok(rows)["gate_error"] = 0.9


def lse_beyond_its_limit(rows, manifest):
    first_ok(rows)["gate_lse_error"] = -0.9


def merged_gate_beyond_its_limit(rows, manifest):
    first_ok(rows)["merged_gate_error"] = 0.9


def another_configuration(rows, manifest):
    manifest["config_hash"] = "fedcba9876543210"


def renamed(rows, manifest):
    manifest["run_id"] = "the best of three"
    for row in rows:
        row["run_id"] = manifest["run_id"]


def resumed_on_another_gpu(rows, manifest):
    manifest["attempts"] = [*manifest["attempts"], {"pid": 2, "gpu_uuids": ["GPU-1"]}]


def attempt_without_a_gpu(rows, manifest):
    manifest["attempts"] = [*manifest["attempts"], {"pid": 2}]


def row_of_another_gpu(rows, manifest):
    rows[-1]["gpu_uuid"] = "GPU-1"


def row_without_a_gpu(rows, manifest):
    rows[-1]["gpu_uuid"] = None


def unplanned(rows, manifest):
    first_ok(rows)["predicted_peak_bytes"] *= 1.02


def another_end(rows, manifest):
    first_ok(rows)["predicted_status"] = "oom"


def hot(rows, manifest):
    manifest["gpus_after"] = [{"throttle_reasons": "0x40"}]


def unfinished(rows, manifest):
    manifest["finished_utc"] = None


def crashed(rows, manifest):
    rows.append(ordered(rows[0] | {"status": "crash", "signal": "SIGSEGV", "trial_id": "z"}))


def unknown_status(rows, manifest):
    rows[-1]["status"] = "fine"


def twice_the_same_trial(rows, manifest):
    rows[1]["trial_id"] = rows[0]["trial_id"]


FAULTS = {
    unexplained: {"reconciliation"},
    no_reconciliation: {"reconciliation"},
    unexplained_where_memory_ended: {"reconciliation"},
    no_reconciliation_where_memory_ended: {"reconciliation"},
    ledger_above_the_meter: {"reconciliation", "events"},
    more_free_than_there_is: {"reconciliation"},
    unrepeatable: {"repeatability"},
    unrepeatable_memory: {"repeatability", "events"},
    bracket_once: {"brackets"},
    resident_once: {"brackets"},
    never_filled: {"brackets"},
    held_less_the_second_time: {"brackets"},
    filled_where_it_does_not_start_each_time: {"brackets"},
    wide_bracket: {"brackets"},
    bracket_both_ways: {"brackets"},
    dirty: {"tree"},
    speed_in_a_failed_row: {"speeds"},
    ungated: {"gate"},
    gate_beyond_its_limit: {"gate"},
    lse_beyond_its_limit: {"gate"},
    merged_gate_beyond_its_limit: {"gate"},
    another_configuration: {"identity"},
    renamed: {"identity"},
    resumed_on_another_gpu: {"one gpu"},
    attempt_without_a_gpu: {"one gpu"},
    row_of_another_gpu: {"one gpu"},
    row_without_a_gpu: {"one gpu"},
    unplanned: {"planner"},
    another_end: {"planner"},
    hot: {"throttling"},
    unfinished: {"finished"},
    crashed: {"statuses"},
    unknown_status: {"schema"},
    twice_the_same_trial: {"schema"},
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_each_fault_fails_its_checks_and_no_other(tmp_path, fault):
    rows, manifest = sweep() + bracket(), dict(MANIFEST)
    fault(rows, manifest)
    folder = write_run(tmp_path / "run", rows, **manifest)
    assert failures(folder) == FAULTS[fault]
