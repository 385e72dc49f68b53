"""The scripts that make reference runs: steps that are done once, resumed, and named."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from harness import forecast
from harness.arms import settings_of_command
from tests.harness.command import LIMIT_SECONDS, QUICK, ROOT, environment

SCRIPTS = ROOT / "results" / "reference"
# Words that come later win: the step's own context and hardware among them.
WORDS = " ".join(w for w in QUICK if not w.startswith("context="))


def steps(results, *names, script="run_h200.sh", words=WORDS, **variables):
    own = {"PYTHON": sys.executable, "HARDWARE": "scale_model", "CONTEXT": "2K"} | variables
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *names],
        env=environment(**own, RESULTS=str(results), WORDS=words),
        cwd=results.parent,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )


@pytest.mark.parametrize("script", ["run_h200.sh", "run_8xh200.sh"])
def test_an_unknown_step_is_named_and_nothing_is_written(tmp_path, script):
    ended = steps(tmp_path / "runs", "reprot", script=script)
    (line,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and "reprot" in line and "allowed: " in line
    assert not (tmp_path / "runs").exists()


def test_the_brackets_of_a_smaller_device_are_a_step(tmp_path):
    """Composed, not run: ``echo`` stands for Python."""
    said = steps(tmp_path / "runs", "ballast", words="", PYTHON="echo").stdout
    words = shlex.split(said.splitlines()[0].partition(" -m harness ")[2])
    own = settings_of_command([w for w in words if w != "-m"], True)
    assert [s.strategy for s in own] == ["static", "paged"]
    for one in own:
        assert one.brackets and one.bracket_repeats == 2 and one.experiment == "ballast"
        assert one.hardware.asked_bytes == 24 << 30
        ends = forecast.points(one)
        assert ends.admit.ok == ends.resident.ok < 1_000_000  # they lie within the sweep
    assert ends.startup.ok == 1_000_000


@pytest.mark.beside
def test_a_step_is_done_once_and_names_its_folder(tmp_path):
    results = tmp_path / "runs"
    ended = steps(results, "report", "nccl")
    assert ended.returncode == 0, ended.stderr
    assert "== nccl: left out" in ended.stdout  # no GPU
    folder = (results / ".done" / "report").read_text().strip()
    (found,) = (p.parent for p in results.glob("*/*/manifest.json"))
    assert str(found) == folder
    assert {"trials.csv", "report.html", "run.bib"} <= {p.name for p in found.iterdir()}
    again = steps(results, "report")
    assert again.returncode == 0 and "== report: done" in again.stdout
    assert len(list(results.glob("*/*/manifest.json"))) == 1


@pytest.mark.beside
def test_a_step_that_reaches_its_limit_is_not_done(tmp_path):
    results = tmp_path / "runs"
    hangs = f"{WORDS} fault.kind=hang fault.phase=pool"
    ended = steps(results, "report", words=hangs, LIMIT_SECONDS="5")
    assert ended.returncode == 75 and "run again to resume" in ended.stdout
    assert not (results / ".done" / "report").exists()
