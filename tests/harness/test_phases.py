"""What people read of a phase: true whatever the ranks talk through."""

from __future__ import annotations

import pytest

from harness import tables
from harness.phases import PHASES, SIZED_PHASES, START_PHASES, phase_name, place_name
from harness.plan import main as plan
from harness.plots_phases import figure_phases
from harness.progress import row_line
from harness.runs import frame
from tests.harness.run_fixture import cell, events, legend

# A rank that ran out of memory while the ranks connected, as every row has said it so far.
NO_ROOM = {"status": "oom", "oom_phase": "nccl", "oom_allocation": "nccl"}


@pytest.fixture
def row():
    asked = {"oom_requested_bytes": 1 << 30, "oom_free_bytes": 1 << 20, "world_size": 2}
    return cell("paged", 1_000_000, 1.0, **NO_ROOM, **asked)


def test_phases_are_in_order_and_a_start_ends_with_the_workspace():
    assert PHASES[: len(START_PHASES)] == START_PHASES
    assert START_PHASES[-1] == "workspace"
    assert set(START_PHASES) - set(SIZED_PHASES) == {"pool"}


def test_only_the_communicator_has_another_name():
    assert [p for p in PHASES if phase_name(p) != p] == ["nccl"]
    assert place_name("nccl", "nccl") == "communicator/nccl"
    assert place_name("pool", None) == "pool"
    assert place_name(None, "") == phase_name(None) == ""


def test_rows_that_say_nccl_are_read_as_communicator(row):
    assert " in communicator: nccl asked" in row_line(row)
    table = tables.sweep(frame([row]))
    assert "communicator/nccl" in table.rows[0]
    assert "in communicator/nccl: asked" in table.notes[0]


def test_a_figure_of_phases_names_the_communicator(row):
    event = events(row)[0] | {"phase": "nccl", "allocation": "nccl", "event_bytes": 1 << 30}
    figure = figure_phases(frame([row]), [*events(row)[:1], event])
    assert "communicator" in legend(figure)
    ticks = [t.get_text() for t in figure.axes[0].get_xticklabels()]
    assert "communicator" in ticks and "nccl" not in ticks


def test_the_planner_names_the_communicator(capsys):
    words = ("parallel.processes=2", "parallel.nccl=2GiB", "hardware=h200")
    assert plan(["strategy=paged", "context=1M", *words]) == 0
    (line,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("communicator")]
    assert "2.00 GiB" in line
