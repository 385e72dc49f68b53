"""A run's folder as harness.check is asked of it, and what it finds."""

from __future__ import annotations

from functools import cache

from harness.check import check_run
from harness.runs import load_run
from harness.session import config_yaml
from tests.harness import run_fixture
from tests.harness.composed import made
from tests.harness.run_fixture import bracket, of_rows, sweep


def write_run(folder, rows=None, summary=None, **manifest):
    """A folder whose summary is that of its rows, as a run leaves it."""
    rows = sweep() + bracket() if rows is None else rows
    path = run_fixture.write_run(folder, rows, summary or of_rows(rows), **manifest)
    (path / "config.yaml").write_text(configuration())
    return path


@cache
def configuration():
    """A run's config.yaml."""
    return config_yaml([made("strategy=paged")])


def first_ok(rows):
    return next(r for r in rows if r["status"] == "ok" and r["attention_decode_step_ms"])


def first_oom(rows):
    return next(r for r in rows if r["status"] == "oom")


def failures(folder):
    return {name for name, r in check_run(load_run(folder)).items() if r.outcome == "fail"}
