"""Places of ranks, shares of pages, and how ranks of one trial end together."""

from __future__ import annotations

import json
import os
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.ranks import BadLaunch, Launched, Place, all_tokens, launched, share_tokens
from harness.ranks_control import Alone, Control, EndedByPeer
from harness.ranks_ends import ENDED_BY_PEER, Failure, settle
from harness.ranks_summary import complete, held_tokens, per_trial
from harness.runs import frame, trials
from harness.sizes import BadValue
from harness.validate import compose_settings
from harness.visible_gpus import nvml_key

TOKENS = st.integers(0, 200_000)
RANKS = st.integers(1, 16)


@given(TOKENS, st.sampled_from([16, 128]), RANKS)
def test_shares_make_up_the_sequence_and_differ_by_a_page_at_most(tokens, page, ranks):
    shares = [share_tokens(tokens, page, ranks, index) for index in range(ranks)]
    assert sum(shares) == tokens
    assert max(shares) == shares[0]
    assert max(shares) - min(shares) <= page


@given(st.integers(0, 4000), st.integers(1, 8))
def test_a_share_is_the_pages_that_are_dealt_to_a_rank(tokens, ranks):
    dealt = [0] * ranks
    for position in range(tokens):
        dealt[position // 128 % ranks] += 1
    assert [share_tokens(tokens, 128, ranks, index) for index in range(ranks)] == dealt


@given(TOKENS, RANKS)
def test_the_longest_sequence_of_a_share_is_the_longest(local, ranks):
    longest = all_tokens(local, 128, ranks)
    assert share_tokens(longest, 128, ranks) <= local < share_tokens(longest + 1, 128, ranks)


@given(st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 5]))
def test_a_rank_has_the_kv_heads_that_its_query_heads_read(kv_heads, ranks, group):
    q_heads = max(kv_heads, ranks) * group
    for rank in range(ranks):
        read = {h * kv_heads // q_heads for h in range(q_heads) if h * ranks // q_heads == rank}
        assert set(Place(rank, ranks, ranks).kv_heads(kv_heads)) == read


def test_groups_of_the_product_of_tensor_and_context_ranks():
    place = Place(5, 8, tensor_ranks=4, context_ranks=2)
    assert (place.tensor_index, place.context_index) == (1, 1)
    assert place.tensor_group == (4, 5, 6, 7)
    assert place.context_group == (1, 5)


def test_groups_hold_only_ranks_that_run():
    assert Place(2, 3, tensor_ranks=4, context_ranks=2).tensor_group == (0, 1, 2)
    assert Place(2, 3, tensor_ranks=4, context_ranks=2).context_group == (2,)


def test_a_launcher_is_read_from_the_environment():
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert launched(env) == Launched(3, 4, 1)
    assert launched({}) is None


@pytest.mark.parametrize(("lone", "missing"), [("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")])
def test_half_of_what_a_launcher_sets_is_refused(lone, missing):
    with pytest.raises(BadLaunch, match=f"^{missing}="):
        launched({lone: "0"} if lone == "RANK" else {lone: "2"})


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"RANK": "x"}, "RANK"),
        ({"RANK": "4"}, "RANK"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE"),
        ({"RANK": "-1"}, "RANK"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT"),
        ({"MASTER_PORT": ""}, "MASTER_PORT"),
    ],
)
def test_a_launcher_that_contradicts_itself_is_refused(wrong, key):
    env = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(BadLaunch, match=f"^{key}="):
        launched(env | wrong)


def test_visible_devices_name_the_gpu_that_nvml_knows():
    assert nvml_key(1, {}) == 1
    assert nvml_key(1, {"CUDA_VISIBLE_DEVICES": "3, 5"}) == 5
    assert nvml_key(0, {"CUDA_VISIBLE_DEVICES": "GPU-12ab"}) == "GPU-12ab"
    assert nvml_key(0, {"CUDA_VISIBLE_DEVICES": ""}) is None
    assert nvml_key(1, {"CUDA_VISIBLE_DEVICES": "0,-1,2"}) is None


@pytest.mark.parametrize(
    "word",
    [
        "parallel.processes=9",
        "parallel.processes=0",
        "parallel.context_ranks=3",
        "parallel.backend=nccl",
        "parallel.context_ranks=2",
        "parallel.plan_beyond=none",
        "fault.rank=first",
    ],
)
def test_ranks_that_cannot_be_are_refused_in_one_line(word):
    with pytest.raises(BadValue) as refused:
        compose_settings(["hardware=scale_model", "fault.kind=hang", word])
    assert str(refused.value).startswith(word.partition("=")[0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("parallel.plan_beyond=1.5", "plan_beyond"),
        ("parallel.context_ranks=2", "context_ranks"),  # of parallel=tp
        ("parallel.kind=context", "context_ranks"),  # which is 1
    ],
)
def test_a_plan_refuses_what_a_run_would(word, key):
    with pytest.raises(BadValue, match=rf"^parallel\.{key}="):
        compose_settings(["hardware=scale_model", word], planning=True)


def test_a_window_is_shared_like_the_sequence():
    hybrid = ("hardware=scale_model", "model=llama4_scout", "model.hybrid=true")
    settings = compose_settings([*hybrid, "parallel=context"])
    (local,) = [g for g in settings.full_model().groups if g.window_tokens]
    assert local.window_tokens == 8192 // 8
    with pytest.raises(BadValue, match=r"parallel\.context_ranks"):
        compose_settings([*hybrid, "parallel=context", "parallel.ranks=20"])


def test_context_parallel_ranks_are_given_the_share_of_the_context():
    settings = compose_settings(["hardware=scale_model", "parallel=context", "parallel.ranks=4"])
    assert settings.local_tokens(1000) == 256
    assert settings.all_tokens(256) == 1024
    assert settings.parallel.tp == 1


class Line:
    """A rank's standard input, and what it said."""

    def __init__(self, rank: int = 0) -> None:
        self.source, self._into = os.pipe()
        self.said: list[dict] = []
        self.control = Control(Place(rank, 2), self.said.append, self.source)

    def hear(self, *messages: dict) -> None:
        os.write(self._into, b"".join(json.dumps(m).encode() + b"\n" for m in messages))


def test_a_rank_waits_at_a_join_until_all_have_come():
    line = Line()
    found: list = []
    waiting = threading.Thread(target=lambda: found.extend(line.control.join("ready", 7)))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    line.hear({"go": "1 ready", "values": [7, 8]})
    waiting.join(10)
    assert found == [7, 8]
    assert line.said == [{"type": "join", "stage": "1 ready", "value": 7}]


def test_a_crash_elsewhere_ends_a_rank_at_its_next_stage():
    line = Line()
    line.hear({"stop": {"rank": 1, "limit": None}})
    with pytest.raises(EndedByPeer):
        line.control.stage("pool")


def test_a_rank_grows_to_what_the_one_that_ran_out_of_memory_held():
    line = Line()
    line.hear({"stop": {"rank": 1, "limit": 512}})
    line.control.stage("pool")
    line.control.check(511)
    with pytest.raises(EndedByPeer):
        line.control.check(512)
    with pytest.raises(EndedByPeer):
        line.control.join("filled")


def test_a_crash_after_an_orderly_end_is_heard_too():
    line = Line()
    line.hear({"stop": {"rank": 1, "limit": 512}}, {"stop": {"rank": 0, "limit": None}})
    with pytest.raises(EndedByPeer):
        line.control.check(0)


def test_a_rank_by_itself_waits_for_nothing():
    alone = Alone()
    alone.stage("pool")
    alone.check(0)
    assert alone.join("ready", 3) == [3]
    assert not alone.broken()


def row(rank: int, status: str, tokens: int = 0, **more) -> dict:
    base = {"trial_id": "a", "rank": rank, "status": status, "resident_tokens": tokens}
    base |= {"context_ranks": 1, "world_size": 3, "basis": "scale_model", "admitted": "true"}
    return base | more


def test_of_ranks_that_ran_out_of_memory_the_smallest_ended_the_trial():
    rows = [
        row(0, "oom", 900, oom_phase="fill"),
        row(1, "oom", 500, oom_phase="fill", oom_requested_bytes=64),
        row(2, ENDED_BY_PEER, 900, oom_phase="fill"),
    ]
    settled = settle(rows, Failure(0, "oom", 900))
    assert [r["status"] for r in settled] == ["oom", "oom", "oom"]
    assert {r["failed_rank"] for r in settled} == {1}
    assert {r["resident_tokens_all_ranks"] for r in settled} == {500}
    assert settled[2].get("oom_requested_bytes") is None
    assert settled[2]["error"].startswith("ended by rank 1")


def test_a_crash_names_its_rank_even_when_others_ran_out_of_memory():
    rows = [row(0, "oom", 5, oom_phase="fill"), row(1, "crash", 9, signal="SIGKILL")]
    settled = settle(rows, Failure(1, "crash"))
    assert [r["status"] for r in settled] == ["oom", "crash"]
    assert {r["failed_rank"] for r in settled} == {1}


def test_ok_rows_stay_as_they_are():
    rows = [row(0, "ok"), row(1, "ok")]
    assert settle(rows, None) == rows


def test_ranks_that_all_hang_time_out_without_one_to_blame():
    late = {"status": "timeout", "error": "killed after 4 s: ranks 0 and 1 had not answered"}
    rows = [row(0, ENDED_BY_PEER), row(1, "timeout")]
    settled = settle(rows, Failure(None, "timeout", silent=(0, 1)), late)
    assert [r["status"] for r in settled] == ["timeout", "timeout"]
    assert {r["error"] for r in settled} == {late["error"]}
    assert not any(r.get("failed_rank") for r in settled)


def test_a_trial_is_its_largest_peak_smallest_share_and_slowest_rank():
    rows = [
        row(0, "ok", 900, peak_device_bytes=10, attention_decode_step_ms=2.0),
        row(1, "ok", 896, peak_device_bytes=30, attention_decode_step_ms=1.0),
        row(2, "ok", 900, peak_device_bytes=20, attention_decode_step_ms=3.0, admitted="false"),
    ]
    (one,) = per_trial(rows)
    assert one["peak_device_bytes"] == 30
    assert one["resident_tokens"] == 896
    assert one["attention_decode_step_ms"] == 3.0
    assert one["admitted"] == "false"


def test_collectives_are_those_of_the_rank_that_is_slowest_in_them():
    times = ((2.0, 9.0, 4.0), (3.0, 8.0, 5.0))  # attention, collectives, the step with both
    rows = [
        row(
            rank,
            "ok",
            attention_decode_step_ms=attention,
            collective_ms=collective,
            collective_ms_iqr=collective / 8,
            parallel_decode_step_ms=step,
            parallel_decode_step_ms_iqr=step / 8,
        )
        for rank, (attention, collective, step) in enumerate(times)
    ]
    columns = ("attention_decode_step_ms", "collective_ms", "collective_ms_iqr")
    columns += ("parallel_decode_step_ms", "parallel_decode_step_ms_iqr")
    for one in (per_trial(rows)[0], trials(frame(rows)).iloc[0]):
        assert tuple(one[c] for c in columns) == (3.0, 9.0, 1.125, 5.0, 0.625)


def test_a_failed_trial_is_told_by_the_rank_that_ended_it():
    rows = [row(0, "oom", 9, failed_rank=1), row(1, "oom", 5, failed_rank=1, oom_phase="fill")]
    assert per_trial(rows)[0]["rank"] == 1
    assert trials(frame(rows)).iloc[0]["rank"] == 1


def test_a_trial_of_which_a_rank_is_missing_is_run_again():
    rows = [row(0, "ok"), row(1, "ok")]
    assert complete(rows) == []
    assert len(complete([*rows, row(2, "ok")])) == 3
    planned = row(0, "ok") | {"basis": "planned"}
    assert complete([planned]) == [planned]


def test_tokens_over_all_ranks_are_those_that_a_trial_holds():
    assert held_tokens({"resident_tokens": 5, "resident_tokens_all_ranks": 40}) == 40
    assert held_tokens({"resident_tokens": 5}) == 5
