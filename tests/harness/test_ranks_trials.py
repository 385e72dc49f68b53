"""Trials on several ranks of the scale model: one ends, all end, and the row says which."""

from __future__ import annotations

import pytest

from tests.harness.ranks_fixture import processes_about, ranks, rows_of


def hidden(gib: int, rank: int) -> tuple[str, ...]:
    """An allocation on one rank that leaves it less memory than the others have."""
    fault = ("fault.kind=hidden_allocation", "fault.phase=tables")
    return (*fault, f"fault.bytes={gib}GiB", f"fault.rank={rank}")


@pytest.mark.beside
def test_ranks_have_their_own_rows_of_one_trial(tmp_path):
    words = ("parallel=context", "parallel.context_ranks=2", "parallel.nccl=512MiB")
    rows = rows_of(ranks(4, *words), tmp_path)
    assert [r["rank"] for r in rows] == [0, 1, 2, 3]
    assert len({r["trial_id"] for r in rows}) == 1
    assert {(r["status"], r["world_size"], r["admitted"]) for r in rows} == {("ok", 4, "true")}
    assert {r["nccl_bytes"] for r in rows} == {-(-(512 << 20) // rows[0]["scale"])}
    assert all(r["peak_device_bytes"] > r["nccl_bytes"] + r["weights_bytes"] for r in rows)


@pytest.mark.beside
def test_out_of_memory_on_rank_3_only(tmp_path):
    # A sequence that three ranks hold whole, and rank 3, less what it lost, does not.
    words = ("context=100K", "sweep.contexts=[100K]", *hidden(5, rank=3))
    rows = rows_of(ranks(4, *words, purpose="resident", fill=1.0), tmp_path)
    assert {r["status"] for r in rows} == {"oom"}
    assert {r["failed_rank"] for r in rows} == {3}
    held = [r["resident_tokens"] for r in rows]
    assert min(held) == held[3] > 0
    assert {r["resident_tokens_all_ranks"] for r in rows} == {held[3]}
    assert rows[3]["oom_requested_bytes"] > rows[3]["oom_free_bytes"]
    for other in rows[:3]:
        assert other.get("oom_requested_bytes") is None
        assert other["error"].startswith("ended by rank 3: oom in fill")
    assert processes_about(tmp_path) == []


@pytest.mark.beside
def test_a_static_pool_that_does_not_fit_one_rank(tmp_path):
    words = ("strategy=static", "context=50K", "sweep.contexts=[50K]", *hidden(3, rank=1))
    rows = rows_of(ranks(2, *words), tmp_path)
    assert [(r["status"], r["oom_phase"]) for r in rows] == [("oom", "pool")] * 2
    assert {r["failed_rank"] for r in rows} == {1}
    assert rows[0]["admitted"] == "true"


@pytest.mark.beside
@pytest.mark.parametrize("phase", ["context", "fill"])
def test_kill_9_of_a_rank_ends_all(phase, tmp_path):
    rows = rows_of(ranks(2, "fault.kind=kill", f"fault.phase={phase}", "fault.rank=1"), tmp_path)
    assert [r["status"] for r in rows] == ["crash", "crash"]
    assert rows[1]["signal"] == "SIGKILL"
    assert rows[1]["error"] == "rank 1 was killed by signal 9 (SIGKILL)"
    assert rows[1]["oom_phase"] == phase
    assert rows[0].get("signal") is None
    assert {r["failed_rank"] for r in rows} == {1}
    assert processes_about(tmp_path) == []


@pytest.mark.beside
def test_a_rank_that_hangs_is_named(tmp_path):
    fault = ("fault.kind=hang", "fault.phase=pool", "fault.rank=1", "trial.timeout_seconds=4")
    rows = rows_of(ranks(4, *fault), tmp_path)
    assert [r["status"] for r in rows] == ["timeout"] * 4
    assert {r["failed_rank"] for r in rows} == {1}
    assert rows[1]["error"] == "killed after 4 s: rank 1 had not answered since pool began"
    assert rows[0]["error"].startswith("ended by rank 1: timeout in pool")
    assert processes_about(tmp_path) == []


@pytest.mark.beside
def test_an_error_of_a_rank_is_its_own_words(tmp_path):
    rows = rows_of(ranks(2, "fault.kind=exception", "fault.rank=0"), tmp_path)
    assert [r["status"] for r in rows] == ["crash", "crash"]
    assert "deliberate fault" in rows[0]["error"]
    assert rows[1]["error"].startswith("ended by rank 0: crash")
