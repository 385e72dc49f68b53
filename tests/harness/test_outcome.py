"""The command that the terminal names next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from harness.outcome import next_command, warnings
from tests.harness.composed import made


@pytest.mark.parametrize(
    ("experiment", "tokens", "context"),
    [
        ("waste", 14_089, "10M"),  # a trace's longest request
        ("fragmentation", 262_144, "10M"),
        ("remedies", 100_000_000, "10M"),  # a bound of a search
        ("headline", 20_000_000, "20M"),
        ("sweep", 20_000_000, "20M"),
        ("sweep", 4_000, "10M"),  # root_cause starts at 128Ki and 1M anyway
    ],
)
def test_the_engines_are_asked_for_a_context_that_means_something(
    tmp_path, experiment, tokens, context
):
    both = [
        replace(made(f"strategy={name}"), experiment=experiment, context_tokens=tokens)
        for name in ("static", "paged")
    ]
    told = next_command(tmp_path, both)
    assert told == f"python -m harness experiment=root_cause context={context}"


def test_a_warning_names_the_rank_that_ended_a_trial():
    row = {"strategy": "paged", "context_tokens": 64_000, "fill": 0.0, "basis": "scale_model"}
    row |= {"status": "crash", "signal": "SIGKILL", "oom_phase": "pool"}
    of_ranks = row | {"failed_rank": 1, "world_size": 2}
    assert warnings([row, of_ranks]) == [
        "warning  paged 64K x 0%: crash in pool (SIGKILL)",
        "warning  paged 64K x 0%: crash on rank 1 in pool (SIGKILL)",
    ]


def test_one_strategy_is_followed_by_both_at_the_same_context(tmp_path):
    one = replace(made("strategy=static"), experiment="sweep", context_tokens=2_000_000)
    told = next_command(tmp_path, [one])
    assert told.startswith("python -m harness -m strategy=static,paged context=2M")
