"""summary.json from rows alone: brackets, what was resident, peaks, and how arms are named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.summary import admitted, arms, bracket, resident, started, summarise
from tests.harness.run_fixture import cell, sweep


@pytest.mark.parametrize(
    ("given_", "start", "admit"),
    [
        ({"status": "ok", "admitted": "true"}, "ok", "ok"),
        ({"status": "ok", "admitted": "false"}, "ok", "refused"),
        ({"status": "ok", "admitted": None}, "ok", ""),
        ({"status": "invalid", "admitted": "true"}, "ok", "ok"),
        ({"status": "oom", "oom_phase": "pool", "admitted": None}, "oom", "oom"),
        ({"status": "oom", "oom_phase": "workspace", "admitted": None}, "oom", "oom"),
        ({"status": "oom", "oom_phase": "fill", "admitted": "false"}, "ok", "refused"),
        ({"status": "refused", "oom_phase": "pool", "admitted": None}, "refused", "refused"),
        ({"status": "crash", "oom_phase": "fill", "admitted": None}, "", ""),
        ({"status": "timeout", "oom_phase": None, "admitted": None}, "", ""),
        ({"status": "oom_host", "oom_phase": None, "admitted": None}, "", ""),
    ],
)
def test_what_one_row_says(given_, start, admit):
    row = cell("paged", 1_000_000, 1.0, **given_)
    assert (started(row), admitted(row)) == (start, admit)


@given(
    boundary=st.integers(0, 100),
    points=st.lists(st.tuples(st.integers(1, 100), st.booleans()), max_size=20),
)
def test_bracket_of_answers(boundary, points):
    answers = [(t, "" if dead else "ok" if t <= boundary else "oom") for t, dead in points]
    good = [t for t, a in answers if a == "ok"]
    bad = [t for t, a in answers if a == "oom"]
    found = bracket(answers)
    assert found["ok"] == max(good, default=None)
    assert found["not_ok"] == min(bad, default=None)
    lost = any(t > found["ok"] for t, a in answers if not a) if good else True
    assert found["limited_by"] == ("oom" if bad else "" if lost else "sweep_end")


def test_what_failed_once_is_not_ok():
    answers = [(5, "ok"), (7, "ok"), (7, "oom"), (7, ""), (9, "refused"), (9, "ok")]
    assert bracket(answers) == {"ok": 5, "not_ok": 7, "limited_by": "oom"}
    assert bracket(reversed(answers)) == bracket(answers)


def test_a_context_that_was_held_is_not_where_holding_fails():
    rows = [cell("static", 5_000_000, 1.0, purpose="resident")]
    start = bracket([(5_000_000, "ok"), (5_000_000, "oom"), (1_000_000, "ok")])
    assert start == {"ok": 1_000_000, "not_ok": 5_000_000, "limited_by": "oom"}
    assert resident(rows, start)["not_ok"] is None


def test_what_a_trial_that_died_would_have_said_is_unknown():
    assert bracket([(5, "ok"), (9, "")]) == {"ok": 5, "not_ok": None, "limited_by": ""}
    rows = [cell("paged", 2_000_000, 1.0), cell("paged", 5_000_000, 1.0, status="timeout")]
    start = bracket([(10_000_000, "ok")])
    assert start["limited_by"] == "sweep_end"
    assert resident(rows, start) == {"ok": 2_000_000, "not_ok": None, "limited_by": ""}
    rows.append(cell("paged", 5_000_000, 1.0, repeat=1))  # the same again, to its end
    assert resident(rows, start)["limited_by"] == "sweep_end"


def test_one_sequence_of_several_is_filled_until_it_is_refused():
    rows = [
        cell("paged", 10_000_000, 1.0, purpose="resident", sequences=3),
        cell("paged", 1_000_000, 1.0, sequences=3, resident_tokens=3_000_000),
    ]
    found = resident(rows, bracket([(10_000_000, "ok")]))
    assert found["ok"] == rows[0]["resident_tokens"] and found["limited_by"] == "oom"
    assert resident(rows[1:], bracket([]))["ok"] is None


def test_resident_tokens_of_a_refused_fill_have_both_ends():
    rows = [
        cell("paged", 10_000_000, 1.0, purpose="resident"),
        cell("paged", 10_000_000, 0.1),
        cell("paged", 5_000_000, 1.0),
    ]
    longest = rows[0]["resident_tokens"]
    assert rows[0]["status"] == "oom"
    found = resident(rows, bracket([(10_000_000, "ok")]))
    assert found == {"ok": longest, "not_ok": longest + 128, "limited_by": "oom"}


def test_resident_tokens_of_a_static_pool_end_where_it_starts_no_more():
    rows = [cell("static", 5_000_000, 1.0), cell("static", 10_000_000, 1.0)]
    start = bracket((r["context_tokens"], started(r)) for r in rows)
    found = resident(rows, start)
    assert found == {"ok": 5_000_000, "not_ok": 10_000_000, "limited_by": "oom"}


def test_an_unfilled_pool_says_nothing_of_resident_tokens():
    rows = [cell("paged", 1_000_000, 0.0), cell("paged", 1_000_000, 1.0, purpose="bracket")]
    assert resident(rows, bracket([]))["ok"] is None


def test_an_arm_is_named_by_what_tells_it_from_the_others():
    def named(*rows):
        return list(arms(rows))

    static, paged = cell("static", 1_000_000, 1.0), cell("paged", 1_000_000, 1.0)
    assert named(static, paged) == ["static", "paged"]
    other = paged | {"model": "qwen3_30b_a3b"}
    assert named(paged, other) == ["paged, report", "paged, qwen3_30b_a3b"]
    half = static | {"strategy_options": json.dumps({"mem_fraction": 0.5, "slot_policy": "max"})}
    whole = static | {"strategy_options": json.dumps({"mem_fraction": 1.0, "slot_policy": "max"})}
    assert named(half, whole, paged) == [
        "static, mem_fraction=0.5",
        "static, mem_fraction=1.0",
        "paged",
    ]
    small = paged | {"capacity_bytes": 1 << 30}
    assert named(paged, small)[1] == "paged, capacity 1.00 GiB"
    default = paged | {"strategy_options": json.dumps({"max_num_seqs": None})}
    few = paged | {"strategy_options": json.dumps({"max_num_seqs": 16})}
    assert named(default, few) == ["paged, defaults", "paged, max_num_seqs=16"]


@given(order=st.permutations(range(len(sweep()))))
def test_arms_hold_every_row_once_whatever_their_order(order):
    every = sweep()
    found = arms(every[i] for i in order)
    assert sorted(found) == ["paged", "static"]
    ids = sorted(r["trial_id"] for own in found.values() for r in own)
    assert ids == sorted(r["trial_id"] for r in every)


def test_summary_of_a_sweep():
    rows = sweep(repeats=3)
    found = summarise(rows, [])
    assert found["schema"] == 1 and list(found["strategies"]) == ["static", "paged"]
    static = found["strategies"]["static"]
    assert static["startup"] == {"ok": 5_000_000, "not_ok": 10_000_000, "limited_by": "oom"}
    assert static["peak_device_bytes"] == max(
        r["peak_device_bytes"] for r in rows if r["strategy"] == "static"
    )
    rates = {
        d["resident_tokens"]: d["attention_decode_tokens_per_second"] for d in static["decode"]
    }
    assert list(rates) == [100_000, 1_000_000, 5_000_000]
    of_one = sorted(
        r["attention_decode_tokens_per_second"]
        for r in rows
        if r["strategy"] == "static" and r["context_tokens"] == 1_000_000
    )
    assert rates[1_000_000] == of_one[1]


def test_a_really_started_engine_is_no_emulation():
    emulated = cell("vllm", 1_000_000, 0.0, emulated_version="0.23.0")
    real = cell("vllm", 10_000_000, 0.0, engine_version="0.23.0", status="ok")
    found = summarise([emulated, real], [])["strategies"]["vllm"]
    assert found["startup"]["ok"] == 1_000_000


def test_arms_of_many_scales_keep_names_of_their_own():
    """Ranks of a scale model have a scale each; all are called scale model."""
    base = {"strategy": "paged", "model": "report", "strategy_options": "{}", "context_ranks": 1}
    rows = [
        base | {"scale": scale, "emulated_ranks": ranks, "parallel": kind, "context_ranks": spread}
        for scale, ranks, kind, spread in (
            (1, 8, "tp", 1),
            (96, 16, "tp", 1),
            (192, 8, "tp", 1),
            (384, 4, "tp", 1),
            (1536, 16, "context", 16),
        )
    ]
    named = arms(rows)
    assert len(named) == len(rows) and all(len(own) == 1 for own in named.values())
