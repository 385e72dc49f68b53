"""A closed pipe ends every command quietly; any other broken pipe is a fault as before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from harness.closed_pipe import CLOSED_EXIT, ends_quietly
from tests.harness.command import ROOT, environment
from tests.harness.run_fixture import sweep, write_run

COMMANDS = {
    "harness": ["--help"],
    "harness.check": ["{run}"],
    "harness.compare": ["{run}", "--strategies", "static", "paged", "--out", "{out}"],
    "harness.explain": ["--help"],
    "harness.pages": ["--help"],
    "harness.plan": ["strategy=sglang", "hardware=h200"],
    "harness.report": ["--help"],
}


@pytest.mark.parametrize(
    ("module", "unbuffered"), [*((module, "") for module in COMMANDS), ("harness.plan", "1")]
)
def test_a_reader_that_has_seen_enough(module, unbuffered, tmp_path):
    run = write_run(tmp_path / "run", sweep(3))
    words = [w.format(run=run, out=tmp_path / "out") for w in COMMANDS[module]]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=ROOT,
        env=environment(PYTHONUNBUFFERED=unbuffered),
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=100,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (CLOSED_EXIT, "")


def test_another_pipe_is_not_hidden():
    @ends_quietly
    def main(words):
        raise BrokenPipeError("a trial's")

    with pytest.raises(BrokenPipeError, match="a trial's"):
        main([])


def test_what_a_command_returns_is_kept():
    assert ends_quietly(lambda words: len(words or []))(["a", "b"]) == 2
    assert ends_quietly(lambda words: 7 if words is None else 0)() == 7
