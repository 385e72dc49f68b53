"""What an arm's ranks come to: each figure is what its name says, over every trial."""

from __future__ import annotations

import pytest

from harness.ranks_spread import rank_spread
from harness.runs import frame
from harness.tables_ranks import ranks_table


def trial(name: str, *peaks: int, **more) -> list[dict]:
    """Rows of one trial's ranks, by their peaks; a sequence gives each rank its own value."""
    return [
        {"trial_id": name, "rank": rank, "status": "ok", "context_tokens": 1000, "scale": 1}
        | {"peak_device_bytes": peak}
        | {k: v[rank] if isinstance(v, tuple) else v for k, v in more.items()}
        for rank, peak in enumerate(peaks)
    ]


def oom(name: str, failed: int, phase: str, *peaks: int, **more) -> list[dict]:
    return trial(name, *peaks, status="oom", oom_phase=phase, failed_rank=failed, **more)


def test_the_largest_peak_is_not_that_of_the_trial_whose_ranks_differ_most():
    spread = rank_spread([*trial("even", 90, 91), *trial("uneven", 10, 50)])
    assert spread["largest_peak"] == {"peak_device_bytes": 91, "rank": 1, "trial_id": "even"}
    assert spread["spread"]["peak_device_bytes"] == {
        "smallest": 10,
        "largest": 50,
        "trial_id": "uneven",
    }


def test_the_smallest_oom_is_the_shortest_start_and_the_shortest_fill():
    rows = [
        *oom("long", 0, "pool", 9, 9, context_tokens=5000),
        *oom("short", 1, "tables", 9, 9, context_tokens=2000),
        *oom("more", 1, "fill", 9, 9, resident_tokens=(700, 650), resident_tokens_all_ranks=1300),
        *oom("less", 0, "fill", 9, 9, resident_tokens=(600, 610), resident_tokens_all_ranks=1200),
        *trial("none", 9, 9, resident_tokens=3),
    ]
    spread = rank_spread(rows)
    assert spread["smallest_oom"] == {
        "startup": {"context_tokens": 2000, "rank": 1, "trial_id": "short"},
        "resident": {
            "resident_tokens": 600,
            "resident_tokens_all_ranks": 1200,
            "rank": 0,
            "trial_id": "less",
        },
    }
    assert spread["failed_ranks"] == [0, 1]


def test_the_slowest_rank_is_named_for_every_time():
    rows = [
        *trial("a", 1, 1, attention_decode_step_ms=(2.0, 3.0), collective_ms=(9.0, 8.0)),
        *trial("b", 1, 1, attention_decode_step_ms=(1.0, 7.0), collective_ms=(1.0, 1.0)),
    ]
    spread = rank_spread(rows)
    assert spread["slowest"] == {
        "attention_decode_step_ms": {"attention_decode_step_ms": 7.0, "rank": 1, "trial_id": "b"},
        "collective_ms": {"collective_ms": 9.0, "rank": 0, "trial_id": "a"},
    }
    assert spread["spread"]["collective_ms"]["trial_id"] == "a"


@pytest.mark.parametrize(
    "ended",
    [
        trial("died", 10, 900, status="crash", oom_phase="fill", failed_rank=0),
        oom("early", 0, "pool", 10, 900),
        oom("full", 1, "fill", 10, 900),  # the other was ahead of it
        trial("late", 10, 900, status="timeout", failed_rank=None),
    ],
    ids=lambda rows: rows[0]["trial_id"],
)
def test_ranks_that_were_ended_on_the_way_are_not_apart(ended):
    spread = rank_spread([*ended, *trial("whole", 20, 30)])
    assert spread["largest_peak"]["peak_device_bytes"] == 900
    assert spread["spread"]["peak_device_bytes"]["trial_id"] == "whole"


def test_single_ranks_have_no_spread():
    assert rank_spread(trial("alone", 7)) == {}


def test_the_table_names_rank_and_trial_and_what_lies_apart():
    gib = 1 << 30
    rows = [
        *trial("even", 90 * gib, 91 * gib, collective_ms=(0.5, 0.75)),
        *oom("full", 1, "fill", 10 * gib, 50 * gib, resident_tokens=(7000, 6400)),
    ]
    summary = {"strategies": {"paged": {"ranks": rank_spread(rows)}, "static": {}}}
    table = ranks_table(summary, frame(rows))
    assert [" | ".join(line) for line in table.rows] == [
        "paged | largest peak | 91.00 GiB | 1 | even | 90.00 GiB | 91.00 GiB | even",
        "paged | smallest OOM, resident: tokens of the rank | 6,400 | 1 | full | – | – | –",
        "paged | slowest collectives | 0.7500 ms | 1 | even | 0.5000 ms | 0.7500 ms | even",
    ]


def test_bytes_of_the_scale_model_are_told_as_the_modelled_device_s_too():
    rows = [r | {"scale": 192} for r in trial("a", 1 << 20, 2 << 20)]
    summary = {"strategies": {"paged": {"ranks": rank_spread(rows)}}}
    assert ranks_table(summary, frame(rows)).rows[0][2] == "2.00 MiB (0.38 GiB)"


@pytest.mark.parametrize(
    "ranks",
    [
        None,
        [],
        {"largest_peak": 3, "slowest": None},
        {"largest_peak": {"peak_device_bytes": "much"}},
        {
            "largest_peak": {"peak_device_bytes": 5, "rank": {}, "trial_id": []},
            "spread": {"peak_device_bytes": {"smallest": "x", "trial_id": {}}},
        },
    ],
)
def test_what_a_stranger_s_summary_holds_instead_makes_no_error(ranks):
    table = ranks_table({"strategies": {"paged": {"ranks": ranks}}}, frame(trial("a", 1)))
    assert len(table.rows) == (1 if isinstance(ranks, dict) and "spread" in ranks else 0)
    assert isinstance(table.text(), str)
