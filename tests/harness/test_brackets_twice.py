"""The same bracket in two runs has the same ends: made here, and in the committed runs."""

from __future__ import annotations

import json

import pytest

from harness import run
from harness.folder import Outcome, find_or_create
from harness.progress import Progress
from harness.summary import summarise
from harness.trial import Trial
from tests.harness.command import ROOT
from tests.harness.composed import made

WORDS = (
    "hardware.capacity=6GiB",
    "trial.timing=false",
    "context=1M",
    "sweep.contexts=[1M]",
    "fill=0",
)


def in_this_process(job, scratch, on_record, spares):
    """A trial of the real kind, with its memory really touched, less the process around it."""
    records = []
    trial = Trial(job.cells, records.append, job.extra)
    trial.run()
    trial.device.close()
    return Outcome([r["row"] for r in records if r["type"] == "row"], [], [], "")


def ends(results, settings):
    """The three points of a run of its own."""
    folder, resumed = find_or_create(results, "sweep", "0")
    assert not resumed
    run.Run(folder, [settings], Progress([settings])).execute()
    (found,) = summarise(folder.rows, [])["strategies"].values()
    return {point: found[point] for point in ("startup", "admit", "resident")}


@pytest.mark.parametrize(
    ("strategy", "limits"),
    [("static", ("oom", "oom", "oom")), ("paged", ("sweep_end", "refused", "oom"))],
)
def test_a_bracket_run_twice_has_the_same_ends(tmp_path, monkeypatch, strategy, limits):
    monkeypatch.setattr(run, "run_job", in_this_process)
    own = made(*WORDS, f"strategy={strategy}")
    first, second = (ends(tmp_path / name, own) for name in ("first", "second"))
    assert first == second
    assert tuple(found["limited_by"] for found in first.values()) == limits
    for found in first.values():
        assert found["ok"] > 40_000
        width = found["not_ok"] - found["ok"] if found["not_ok"] else 0
        assert width <= run._chunk_tokens(own) == 2816


def test_what_does_not_start_when_it_is_filled_is_no_end_of_a_bracket(tmp_path, monkeypatch):
    """A driver may grant the last MiB to the bracket's trials and refuse them to the next."""
    held = []

    def refused_at_first(job, scratch, on_record, spares):
        outcome = in_this_process(job, scratch, on_record, spares)
        if job.cells[0].purpose == "resident":
            held.append(job.cells[0].context_tokens)
            if len(held) == 2:
                outcome.rows[0] |= {
                    "status": "oom",
                    "oom_phase": "workspace",
                    "resident_tokens": None,
                }
        return outcome

    monkeypatch.setattr(run, "run_job", in_this_process)
    own = made(*WORDS, "strategy=static")
    usual = ends(tmp_path / "usual", own)
    monkeypatch.setattr(run, "run_job", refused_at_first)
    found = ends(tmp_path / "fickle", own)
    fickle, below = usual["startup"]["ok"], found["startup"]["ok"]
    assert held == [fickle, fickle, below, below]
    assert found["startup"] == found["admit"]
    assert (found["startup"]["not_ok"], found["resident"]["ok"]) == (fickle, below)
    assert 0 < fickle - below <= run._chunk_tokens(own)


REFERENCE = ROOT / "results/reference"


@pytest.mark.parametrize(
    ("point", "named"),
    [
        (
            "startup",
            {
                "h200_report": "static",
                "h200_remedies": "static, static",
                "h200_claims_alone": "static, report, mem_fraction=1.0 mem_fraction_of=context",
            },
        ),
        (
            "resident",
            {
                "h200_report": "paged",
                "h200_remedies": "paged, on_demand",
                "h200_claims_alone": "paged, report",
                "h200_precision": "paged, report, kv_dtype fp8_e4m3",
            },
        ),
    ],
)
def test_committed_runs_of_several_gpus_have_the_same_ends(point, named):
    """Nobody closed one after seeing another: each was opened by the planner and measured."""
    found, gpus = set(), set()
    for run_name, strategy in named.items():
        folder = REFERENCE / run_name
        one = json.loads((folder / "summary.json").read_text())["strategies"][strategy][point]
        found.add((one["ok"], one["not_ok"]))
        gpus |= {g["uuid"] for g in json.loads((folder / "manifest.json").read_text())["gpus"]}
    assert len(found) == 1 and len(gpus) > 1
