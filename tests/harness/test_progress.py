"""What a person sees while a run goes on: names that tell arms apart, and an honest bar."""

from __future__ import annotations

import io
import sys

import pytest

from harness.arms import settings_of_command
from harness.cell import Cell
from harness.progress import Progress, row_line
from harness.rows import identity
from harness.session import scales
from harness.tabular import scaled_bytes

HOST = "hardware=scale_model"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def settings_of(*words, multirun=False):
    return settings_of_command([HOST, *words], multirun)


def row_of(settings, **given):
    cell = Cell(settings, given.pop("context_tokens", 5_896_704), purpose="bracket", timing=False)
    row = identity(cell, {}) | {"status": "ok", "peak_device_bytes": 1 << 20, "admitted": "true"}
    return row | given


def lines_of(capsys, settings):
    progress = Progress(settings)
    progress.expect(len(settings))
    for one in settings:
        progress.row(row_of(one))
        progress.advance(1, Cell(one, 5_896_704))
    progress.done()
    progress.close()
    said = capsys.readouterr()
    return said.out.splitlines(), said.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["experiment=waste"], ["static, slots_max ", "static, slots_pow2 ", "paged "]),
        (
            ["experiment=root_cause"],
            ["sglang, report, disable_cuda_graph=False max_running_requests=16 ",
             "vllm, qwen3_30b_a3b "],
        ),
    ],
)  # fmt: skip
def test_every_arm_has_a_name_of_its_own(capsys, words, named):
    settings = settings_of(*words)
    lines, err = lines_of(capsys, settings)
    assert len(set(lines)) == len(lines) == len(settings)
    assert len({line.index(" x 100%") for line in lines}) == 1
    for name in named:
        assert sum(line.startswith(name) for line in lines) == 1
    assert err == ""


def test_a_plain_sweep_names_the_strategies(capsys):
    lines, _ = lines_of(capsys, settings_of("strategy=static,paged", multirun=True))
    assert [line.split()[0] for line in lines] == ["static", "paged"]


def test_a_bracket_that_started_is_not_ok_for_all():
    (settings,) = settings_of("strategy=paged")
    assert "  bracket  started, not admitted peak " in row_line(row_of(settings, admitted="false"))
    assert "  bracket  ok       peak " in row_line(row_of(settings))
    assert "  point    ok " in row_line(row_of(settings, admitted="false", purpose="point"))


def test_the_rank_that_ended_a_trial_is_named():
    (settings,) = settings_of("strategy=paged", "parallel.processes=4")
    asked = {"oom_requested_bytes": 192 << 20, "oom_free_bytes": 0, "oom_allocation": "kv_pages"}
    oom = row_of(settings, status="oom", failed_rank=3, oom_phase="fill", **asked)
    assert " oom      on rank 3 in fill: kv_pages asked " in row_line(oom)


@pytest.mark.parametrize(
    ("nbytes", "scale", "line", "table"),
    [
        (512, 192, "512 B", "512 B (0.1 MiB)"),
        (24 << 10, 192, "24.0 KiB", "0.02 MiB (4.5 MiB)"),
        (352 << 10, 192, "0.3 MiB", "0.34 MiB (0.06 GiB)"),
        (2 << 20, 1, "2.0 MiB", "2.0 MiB"),
        (66 << 20, 1, "0.06 GiB", "0.06 GiB"),
    ],
)
def test_bytes_that_were_refused_are_never_told_as_nothing(nbytes, scale, line, table):
    (settings,) = settings_of("strategy=paged")
    asked = {"oom_requested_bytes": nbytes, "oom_free_bytes": 0, "oom_allocation": "kv_pages"}
    oom = row_of(settings, status="oom", oom_phase="fill", scale=scale, **asked)
    assert f" asked {line}, 0.0" in row_line(oom)
    assert scaled_bytes(nbytes, scale) == table


def test_an_engine_itself_is_named_so():
    (settings,) = settings_of("strategy=sglang")
    line = row_line(row_of(settings, engine_version="0.5.12"), "sglang, report")
    assert line.startswith("sglang itself, report ")


def test_a_row_of_an_engine_itself_finds_its_arm(capsys):
    settings = settings_of("strategy=sglang,vllm", "model=report,qwen3_30b_a3b", multirun=True)
    progress = Progress(settings)
    progress.row(row_of(settings[0], engine_version="0.5.12", arena=None, capacity_bytes=None))
    assert capsys.readouterr().out.startswith("sglang itself, report ")


def test_the_header_names_every_scale():
    assert scales(settings_of("experiment=root_cause")) == (
        "1:192 (report), 1:96 (qwen3_30b_a3b, llama4_scout)"
    )
    assert scales(settings_of("strategy=paged")) == "1:192"


def test_no_bar_where_there_is_no_terminal(capsys):
    lines, err = lines_of(capsys, settings_of("strategy=paged"))
    assert len(lines) == 1 and err == ""


def test_a_bar_begins_with_its_count_and_ends_where_it_was_left(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    (settings,) = settings_of("strategy=paged")
    progress = Progress([settings])
    assert err.getvalue() == ""
    progress.expect(8)
    assert "0/8 trials" in err.getvalue() and "0/0" not in err.getvalue()
    for _ in range(2):
        progress.advance(1, Cell(settings, 1000))
    progress.close()
    last = err.getvalue().rstrip().rpartition("\r")[2]
    assert "2/8 trials" in last and "25%" in last and "100%" not in err.getvalue()


def test_a_bar_of_a_run_that_needed_fewer_trials_is_full(monkeypatch):
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    (settings,) = settings_of("strategy=paged")
    progress = Progress([settings])
    progress.expect(8)
    progress.advance(6, Cell(settings, 1000))
    progress.done()
    progress.close()
    assert "6/6 trials" in err.getvalue().rstrip().rpartition("\r")[2]
