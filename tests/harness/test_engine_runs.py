"""A run of real_engines: what is started in which order, brackets, and resuming, without a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness import forecast, provenance, run
from harness.arms import settings_of_command
from harness.folder import Outcome, RunFolder, find_or_create
from harness.progress import Progress
from harness.rows import identity
from harness.session import begin

WORDS = ["hardware=h200", "experiment=real_engines"]
POINT = ("vllm", "report", False)


def arms():
    made = settings_of_command(WORDS, False, planning=True)
    return [replace(s, engine={"python": "/engine"}) for s in made]


@pytest.fixture
def ran(monkeypatch, tmp_path):
    """Runs arms; every trial ends as the planner says, or as ``truth`` says of an engine itself."""
    seen = []

    def go(settings, truth=None):
        def run_job(job, scratch, on_record, spares):
            (cell,) = job.cells
            seen.append(cell)
            status = forecast.predict_cell(cell).outcome
            if truth is not None and cell.real:
                status = "ok" if cell.context_tokens <= truth else "oom"
            row = identity(cell, job.extra) | {"status": status, "oom_phase": "pool"}
            row |= {"engine_version": "0.5.12.post1"} if cell.real else {}
            return Outcome([row | {"resident_tokens": 0}], [], [])

        monkeypatch.setattr(run, "run_job", run_job)
        (tmp_path / "run").mkdir(exist_ok=True)
        folder = RunFolder(tmp_path / "run")
        assert folder.recover()
        progress = Progress()
        run.Run(folder, settings, progress).execute()
        progress.close()
        folder.close()
        return folder, [(c.real, c.context_tokens) for c in seen]

    return go


def test_each_engine_is_started_just_before_its_emulation_is_run(ran):
    points = [s for s in arms() if not s.brackets]
    _, order = ran(points)
    assert len(order) == 2 * len(points)
    assert [real for real, _ in order] == [True, False] * len(points)
    assert [context for _, context in order[::2]] == [context for _, context in order[1::2]]
    first = points[0]
    assert (first.strategy, first.options["max_running_requests"]) == ("sglang", None)
    assert order[0] == (True, 10_000_000)


def test_nothing_is_started_twice(ran):
    points = [s for s in arms() if (s.strategy, s.model.name, s.brackets) == POINT]
    folder, order = ran(points)
    again, more = ran(points)
    assert len(more) == len(order) and len(again.rows) == len(folder.rows)


def test_another_card_of_the_kind_takes_up_a_run_that_was_left(tmp_path):
    """Minutes of a lent machine end; what was measured there stays."""
    here = arms()[:2]
    there = [replace(s, hardware=replace(s.hardware, uuid="GPU-2", free_bytes=1)) for s in here]
    assert provenance.config_hash(here) == provenance.config_hash(there)
    ours = [replace(s, engine={}) for s in there]
    assert provenance.config_hash(ours) != provenance.config_hash(
        [replace(s, engine={}) for s in here]
    )

    folder, resumed = find_or_create(tmp_path, "real_engines", "0" * 16, provenance.hash_in)
    begin(folder, here, WORDS, "real_engines")
    folder.close()
    said = folder.manifest()
    assert not resumed and said["config_hash"] == provenance.config_hash(here)
    # As it was written when another rule hashed it.
    folder.write_json("manifest.json", said | {"config_hash": "f" * 16})
    digest = provenance.config_hash(there)
    assert not find_or_create(tmp_path, "real_engines", digest)[1]
    found, resumed = find_or_create(tmp_path, "real_engines", digest, provenance.hash_in)
    assert resumed and found.path == folder.path
    found.close()
    other = provenance.config_hash(there[:1])
    assert not find_or_create(tmp_path, "real_engines", other, provenance.hash_in)[1]
    folder.write_json("manifest.json", folder.manifest() | {"finished_utc": "x"})
    assert not find_or_create(tmp_path, "real_engines", digest, provenance.hash_in)[1]


@pytest.mark.parametrize("text", ["", "{", "arms: 3", "arms: [{}]", "- 1", "\0", "arms: [[]]"])
def test_a_folder_whose_configuration_cannot_be_read_has_no_hash(tmp_path, text):
    assert provenance.hash_in(tmp_path) == ""
    (tmp_path / "config.yaml").write_text(text)
    assert provenance.hash_in(tmp_path) == ""


def brackets():
    return [s for s in arms() if s.strategy == "sglang" and s.brackets][:1]


def test_two_starts_close_a_bracket_where_the_planner_is_right(ran):
    _, order = ran(brackets())
    low, high = (tokens for real, tokens in order if real)
    assert high / low < 1.025
    assert sorted(order) == sorted([(True, low), (True, high), (False, low), (False, high)])


@pytest.mark.parametrize("factor", [0.8, 1.3])
def test_more_starts_close_it_where_the_planner_is_wrong(ran, factor):
    (arm,) = brackets()
    truth = int(forecast.startup_guess(arm) * factor)
    _, order = ran([arm], truth)
    real = sorted(tokens for is_real, tokens in order if is_real)
    low = max(t for t in real if t <= truth)
    high = min(t for t in real if t > truth)
    assert 3 <= len(real) <= 10
    assert (high - low) / truth < 0.0275


def test_every_arm_of_the_experiment_is_of_use():
    found = {(s.strategy, s.model.name, s.brackets) for s in arms()}
    both = {(e, m, False) for e in ("sglang", "vllm") for m in ("report", "qwen3_30b_a3b")}
    assert both <= found and sum(s.brackets for s in arms()) == 3
