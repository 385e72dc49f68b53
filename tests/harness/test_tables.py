"""Tables: every cell's row is in them, bytes as GiB, and no text of a run breaks a format."""

from __future__ import annotations

import pytest

from harness import tables
from harness.runs import frame
from harness.tabular import Table, figure_of, gib, scaled_bytes, tokens
from tests.harness.run_fixture import SUMMARY, bracket, cell, sweep

NASTY = "a|b&c_d%e#f{g}$h\\i~j^k<script>\"l'm\n=cmd"


def test_the_sweep_says_bytes_as_gib_and_why_a_trial_failed():
    text = tables.sweep_table(frame(sweep()))
    line = next(line for line in text.splitlines() if line.split()[1:3] == ["static", "5M"])
    assert "114.47 GiB" in line
    assert "asked 228.94 GiB" in text and "pool/kv_pool" in text
    assert "attention only" in text


def test_the_scale_model_shows_its_own_bytes_and_the_modelled_ones():
    text = tables.sweep_table(frame(sweep(scale=192)))
    line = next(line for line in text.splitlines() if line.split()[1:3] == ["paged", "1M"])
    assert "122.38 MiB (22.95 GiB)" in line
    assert "x 192" in text and "speeds do not" in text


def test_every_point_has_a_line_and_bracket_trials_are_counted():
    rows = sweep() + bracket()
    table = tables.sweep(frame(rows), each=True)
    assert sorted(table.anchors) == sorted(r["trial_id"] for r in sweep())
    assert any(note.startswith("6 further trials") for note in table.notes)
    folded = tables.sweep(frame(rows))
    assert sum(int(row[0]) for row in folded.rows) == len(sweep())


def of_ranks(status, **ended):
    """Rows of two ranks of one trial that rank 1 ended, holding less than rank 0."""
    row = cell("paged", 10_000_000, 1.0, **dict.fromkeys(OOM_BYTES), **ended)
    row |= {"status": status, "world_size": 2, "failed_rank": 1}
    other = {"error": f"ended by rank 1: {status}", "peak_device_bytes": 2 << 30}
    return [row | other | {"rank": 0}, row | {"rank": 1, "resident_tokens": 7}]


OOM_BYTES = ("oom_requested_bytes", "oom_free_bytes")


def test_a_trial_of_ranks_is_told_by_the_one_that_ended_it():
    rows = of_ranks("crash", oom_phase="pool", error="rank 1 was killed by signal 9 (SIGKILL)")
    table = tables.sweep(frame(rows), each=True)
    (line,) = table.rows
    assert dict(zip(table.headings, line, strict=True))["failed rank"] == "1"
    assert "7" in line
    assert table.notes[0] == (
        "paged at 10M, fill 100 %: crash on rank 1 in pool/kv_pages: "
        "rank 1 was killed by signal 9 (SIGKILL)."
    )


def test_ranks_of_which_none_is_to_blame_are_told_too():
    why = "killed after 4 s: ranks 0 and 1 had not answered since decode began"
    rows = [r | {"failed_rank": None, "error": why} for r in of_ranks("timeout")]
    table = tables.sweep(frame(rows))
    assert "failed rank" not in table.headings
    assert f": {why}." in table.notes[0]


def test_repeats_that_other_ranks_ended_have_lines_of_their_own():
    rows = [
        r | {"repeat": n, "trial_id": f"t{n}", "failed_rank": n, "oom_phase": "fill"}
        for n in range(2)
        for r in of_ranks("oom")
    ]
    table = tables.sweep(frame(rows))
    at = table.headings.index("failed rank")
    assert [line[at] for line in table.rows] == ["0", "1"]


def test_a_run_of_one_rank_has_no_column_of_ranks():
    assert "failed rank" not in tables.sweep(frame(sweep())).headings


def test_oom_points_show_brackets_and_what_ended_them():
    text = tables.oom_points_table(SUMMARY)
    assert "5,800,000" in text and "5,802,816" in text
    assert "end of the sweep, no failure" in text
    assert len(tables.oom_points(SUMMARY).rows) == 6


def test_verdicts_show_measured_beside_reported():
    text = tables.verdict_table(SUMMARY)
    assert "C1" in text and "conditional" in text and "228.9" in text and "182" in text


@pytest.mark.parametrize(
    "summary",
    [
        {},
        {"strategies": None},
        {"strategies": {"a": {"startup": 3, "admit": {"ok": "x"}, "decode": 1}}},
        {"claims": [{"id": {"x": 1}, "measured": [1, None], "trials": 3}]},
    ],
)
def test_odd_summaries_make_tables_not_errors(summary):
    assert isinstance(tables.oom_points(summary).text(), str)
    assert isinstance(tables.verdicts(summary).text(), str)


def test_the_planner_stands_beside_the_measurement():
    row = cell("paged", 1_000_000, 1.0)
    row["predicted_peak_bytes"] = row["peak_device_bytes"] * 2
    (line,) = tables.planner(frame([row])).rows
    assert "-50.00 %" in line


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (10_000_000, "10M"),
        (2_500_000, "2.5M"),
        (100_000, "100K"),
        (131_072, "128Ki"),
        (10_485_760, "10Mi"),
        (5_832_704, "5696Ki"),
        (5_832_705, "5,832,705"),
        (float("nan"), "–"),
    ],
)
def test_tokens_are_exact(count, text):
    assert tokens(count) == text


def test_bytes_and_figures():
    assert gib(80.04 * 2**30) == "80.04 GiB"
    assert scaled_bytes(2**30, 1) == "1.00 GiB"
    assert figure_of(1234.5678) == "1,235" and figure_of(0.00012345) == "0.0001234"
    assert figure_of(None) == figure_of(float("nan")) == "–"


def test_cells_cannot_break_out_of_a_format():
    table = Table(NASTY, ("name", ">n"), ((NASTY, "1"),), (NASTY,), (NASTY,))
    assert "<script>" not in table.html()
    assert "<script>" not in table.markdown()
    header, _, row = table.markdown().splitlines()[:3]
    assert row.replace("\\|", "").count("|") == header.count("|")
    body = table.latex("t").split("\\midrule")[1].split("\\bottomrule")[0]
    for character in "&%#_$":
        assert body.count(character) == body.count(f"\\{character}") + (character == "&")
