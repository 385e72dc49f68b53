"""Verdicts on the report's two ideas turn when the rows under them do."""

from __future__ import annotations

import pytest

from harness.plots_sharing import SHARES
from tests.harness.claim_rows import (
    GIB,
    GROWTH,
    NO_POOL,
    REFUSED_FILL,
    SMALL,
    STATIC_EMPTY,
    M,
    decided,
    fractions,
    full,
    oom,
    row,
    verdict,
    waste,
)


def offloaded(here, away):
    """A static pool's brackets with the weights on the device and streamed from the host."""
    rows = []
    for largest, read in ((here, "none"), (away, "offload")):
        rows.append(row("static", largest, read_weights=read))
        rows.append(row("static", largest + 2816, read_weights=read, **NO_POOL))
    return rows


END_OF_STATIC = row("static", 5_844_800, **NO_POOL)
# 10M tokens filled to 10 %, and until a page was refused.
UNTIL_REFUSED = [
    REFUSED_FILL | {"kv_committed_bytes": 5_843_200 * 24_576},
    full("paged", 10 * M, 0.1),
]

CASES = [
    # C1: 10M static, by the cost of a token
    ("C1", [row("static", **NO_POOL), row("static", **SMALL)], "conditional"),
    ("C1", [row("static", **NO_POOL), row("static", **SMALL, **NO_POOL)], "supported"),
    ("C1", [row("static"), row("static", **SMALL)], "refuted"),
    ("C1", [row("static", **NO_POOL)], "conditional"),
    ("C1", [row("static", **SMALL)], "conditional"),
    ("C1", [row("static", 5 * M)], "undecided"),
    (
        "C1",
        [row("static", **NO_POOL), row("static", repeat=1), row("static", **SMALL, **NO_POOL)],
        "conditional",
    ),
    (
        "C1",
        [row("static", **NO_POOL), row("static", **SMALL), row("static", **SMALL, **NO_POOL)],
        "conditional",
    ),
    # C2: 10M paged
    ("C2", [row("paged")], "supported"),
    ("C2", [row("paged", **oom("tables"))], "refuted"),
    ("C2", [row("paged"), row("paged", repeat=1, **oom("tables"))], "conditional"),
    ("C2", [row("paged", 5 * M)], "undecided"),
    # C3: what is held at ready
    ("C3", [row("paged"), STATIC_EMPTY], "supported"),
    ("C3", [row("paged", kv_committed_bytes=GIB), STATIC_EMPTY], "refuted"),
    ("C3", [row("paged"), row("static", 5 * M)], "refuted"),
    ("C3", [row("paged", peak_device_bytes=60 * GIB), STATIC_EMPTY], "refuted"),
    ("C3", [row("paged")], "undecided"),
    # C4: growth with length
    ("C4", [full("paged", 5 * M), full("paged", 5 * M, 0.1), *GROWTH], "supported"),
    (
        "C4",
        [full("paged", 5 * M), full("paged", 5 * M, 0.1, kv_committed_bytes=100 * GIB), *GROWTH],
        "refuted",
    ),
    (
        "C4",
        [
            full("paged", 5 * M),
            full("paged", 5 * M, 0.1),
            full("static", 5 * M),
            full("static", 5 * M, 0.1),
        ],
        "refuted",
    ),
    ("C4", [full("paged", 5 * M), full("paged", 5 * M, 0.1)], "undecided"),
    ("C4", [*UNTIL_REFUSED, STATIC_EMPTY, full("static", 5 * M)], "supported"),
    ("C4", [*UNTIL_REFUSED, row("static", 5 * M), full("static", 5 * M)], "refuted"),
    (
        "C4",  # a page pool that has all of its bytes at once
        [
            REFUSED_FILL | {"kv_committed_bytes": 130 * GIB},
            full("paged", 10 * M, 0.1, kv_committed_bytes=130 * GIB),
            STATIC_EMPTY,
            full("static", 5 * M),
        ],
        "refuted",
    ),
    ("C4", [*UNTIL_REFUSED, full("static", 5 * M)], "undecided"),
    (
        "C4",  # two layouts are not one pool that grew
        [
            *(r | {"hybrid": n} for n, r in enumerate(UNTIL_REFUSED)),
            STATIC_EMPTY,
            full("static", 5 * M),
        ],
        "undecided",
    ),
    ("C4", [UNTIL_REFUSED[0], row("paged"), STATIC_EMPTY, full("static", 5 * M)], "undecided"),
    # C5: bytes of 10M tokens
    ("C5", [row("static", **NO_POOL)], "conditional"),
    ("C5", [row("static", **oom("pool", oom_requested_bytes=182_000_000_000))], "supported"),
    ("C5", [row("static", **oom("pool", oom_requested_bytes=20_000_000_000))], "refuted"),
    ("C5", [row("static", **SMALL)], "undecided"),
    # C6: where a full sequence ends
    ("C6", [REFUSED_FILL, full("static", 5_842_000), END_OF_STATIC], "conditional"),
    ("C6", [REFUSED_FILL, full("static", 4 * M), row("static", 4_003_000, **NO_POOL)], "supported"),
    ("C6", [REFUSED_FILL, full("static", 8 * M), row("static", 8_003_000, **NO_POOL)], "refuted"),
    # the ends of static were only sampled
    ("C6", [REFUSED_FILL, full("static", 5_842_000)], "undecided"),
    ("C6", [REFUSED_FILL, full("static", 5 * M), row("static", 6 * M, **NO_POOL)], "undecided"),
    (
        "C6",  # the pool starts with 5.84M, but a sequence in it ends at 1M
        [
            REFUSED_FILL,
            full("static", 5_842_000, resident_tokens=M),
            row("static", M + 1000, **NO_POOL),
        ],
        "supported",
    ),
    ("C6", [REFUSED_FILL, row("static", 5_842_000)], "undecided"),
    ("C6", [row("paged", fill=1.0), full("static", 5 * M)], "undecided"),
    # C7: lower fractions
    ("C7", fractions((0.5, 0.58), True), "conditional"),
    ("C7", fractions((0.5, 0.58, 0.65), True), "refuted"),
    ("C7", fractions((), False), "supported"),
    ("C7", fractions((0.5,), True)[:-1], "undecided"),
    ("C7", fractions((0.5,), True)[:-2], "undecided"),
    # C12: live share under a trace
    ("C12", [waste("static", 0.1), waste("paged", 0.9)], "conditional"),
    ("C12", [waste("static", 0.5, external_share=0.4), waste("paged", 0.9)], "supported"),
    ("C12", [waste("static", 0.9), waste("paged", 0.8)], "refuted"),
    (
        "C12",  # slots of one size lose nothing between them, those of many do
        [
            waste("static", 0.1),
            waste("static", 0.5, slot_policy="pow2", external_share=0.1),
            waste("paged", 0.9),
        ],
        "conditional",
    ),
    ("C12", [waste("paged", 0.8)], "undecided"),
    ("C12", [waste("static", 0.5, slot_policy="pow2"), waste("paged", 0.8)], "undecided"),
    # C14: on demand
    ("C14", [row("paged"), row("static", **NO_POOL)], "supported"),
    ("C14", [row("paged"), row("static")], "refuted"),
    ("C14", [row("paged", **oom("tables")), row("static", **NO_POOL)], "refuted"),
    ("C14", [row("paged")], "undecided"),
    # C15: weight offload
    ("C15", offloaded(5_890_000, 6_060_000), "conditional"),
    ("C15", offloaded(5_890_000, 10 * M), "supported"),
    ("C15", offloaded(5_890_000, 5_890_000), "refuted"),
    # C16: 5 - 6M tokens
    ("C16", [row("static", 5_800_000), row("static", 6 * M, **NO_POOL)], "supported"),
    ("C16", [row("static", 3 * M), row("static", 4 * M, **NO_POOL)], "refuted"),
    ("C16", [row("static", 5_800_000), row("static", **NO_POOL)], "supported"),
    ("C16", [row("static", 3 * M), row("static", **NO_POOL)], "undecided"),
    ("C16", [row("static", 3 * M)], "undecided"),
]


@pytest.mark.parametrize(("claim", "rows", "expected"), CASES)
def test_the_rows_decide(claim, rows, expected):
    decided(claim, rows, expected)


def test_what_offloaded_weights_cost_is_told_where_it_was_measured():
    timed = {"read_weights": "offload", "attention_decode_step_ms": 123.4}
    told = verdict("C15", [row("paged", **timed)])
    assert "123.4 ms" in told["condition"] and len(told["trials"]) == 1
    assert "123.4" not in verdict("C15", [row("paged", **timed, basis="scale_model")])["condition"]


@pytest.mark.parametrize("fill", [0.0, 1.0])
def test_a_brackets_trial_is_an_empty_start_once_whatever_fill_an_old_row_says(fill):
    paged = row("paged", purpose="bracket", fill=fill)
    found = verdict("C3", [paged, STATIC_EMPTY])
    assert found["verdict"] == "supported"
    assert sorted(found["trials"]) == sorted([paged["trial_id"], STATIC_EMPTY["trial_id"]])


def test_one_cost_of_a_token_decides_c1_for_itself_only():
    fails, begins = (verdict("C1", [row("static", **r)]) for r in (NO_POOL, SMALL))
    assert fails["condition"].startswith("at 24 KiB a token it asks 228.9 GiB and cannot; ")
    assert begins["condition"].startswith("at 12 KiB a token it starts; ")
    assert (fails["measured"], begins["measured"]) == ("asks 228.88 GiB", "starts")
    assert all("other costs of a token: run" in c["condition"] for c in (fails, begins))


def test_c4_says_between_which_lengths_memory_grew():
    found = verdict("C4", [*UNTIL_REFUSED, STATIC_EMPTY, full("static", 5 * M)])
    assert "1,000,000 of 5,843,200 tokens (17.1%) paged commits 17.1%" in found["condition"]
    assert "static with 0 of 5,000,000 100%" in found["condition"]
    assert found["measured"] is None  # its unit is 10 and 100 %


def test_c12_quotes_every_slot_policy_in_the_words_of_the_figure():
    rows = [
        waste("static", 0.09, internal_share=0.895, external_share=0.004),
        waste("static", 0.55, slot_policy="pow2", internal_share=0.28, external_share=0.096),
        waste("static", 0.74, slot_policy="exact", internal_share=0.04, external_share=0.112),
        waste("paged", 0.95, internal_share=0.01, external_share=0.001),
    ]
    found = verdict("C12", rows)
    names = [SHARES[f"{part}_share"][0] for part in ("live", "internal", "external")]
    assert found["condition"] == (
        f"external fragmentation with slots pow2 and exact only; {' / '.join(names)}: "
        "static slots max 9.0% / 89.5% / 0.4%; static slots pow2 55.0% / "
        "28.0% / 9.6%; static slots exact 74.0% / 4.0% / 11.2%; pages 95.0% / 1.0% / 0.1%"
    )
    assert set(found["trials"]) == {r["trial_id"] for r in rows}


def test_c14_says_what_fits_only_where_it_was_filled():
    started = [row("paged"), row("static", **NO_POOL)]
    assert verdict("C14", started)["condition"] == "for start-up"
    filled = [*started, REFUSED_FILL, full("static", 5_842_000)]
    assert verdict("C14", filled)["condition"] == "for start-up"  # static may hold more
    assert "5,843,200 tokens" in verdict("C14", [*filled, END_OF_STATIC])["condition"]


@pytest.mark.parametrize(
    ("failing", "told"),
    [
        ([5_844_800, 10 * M], 5_842_000),
        ([6 * M], "5,842,000 - 6,000,000"),
        ([], "at least 5,842,000"),
    ],
)
def test_c16_gives_a_figure_only_where_its_bracket_is_closed(failing, told):
    rows = [row("static", 5_842_000), *(row("static", tokens, **NO_POOL) for tokens in failing)]
    assert verdict("C16", rows)["measured"] == told


def test_c16_names_what_lies_above_an_edge_that_ended_both_ways():
    rows = [row("static", 5_893_888), row("static", 5_893_888, **NO_POOL)]
    rows.append(row("static", 5_896_704, **NO_POOL))
    assert verdict("C16", rows)["condition"] == "starts at 5,893,888 tokens, not at 5,896,704"


def test_what_offload_gains_is_measured_where_both_brackets_are_closed():
    rows = offloaded(5_890_000, 6_060_000)
    found = verdict("C15", rows)
    assert (found["measured"], found["basis"]) == (170_000, "measured here")
    assert set(found["trials"]) == {r["trial_id"] for r in rows}
    for missing in range(4):
        planned = verdict("C15", rows[:missing] + rows[missing + 1 :])
        assert planned["basis"] == "planned" and planned["trials"] == []


def test_an_arm_whose_end_failed_once_leaves_the_verdict_to_one_that_is_closed():
    rows = offloaded(5_890_000, 6_060_000)
    shaky = [
        row("static", 5_891_000, read_weights="device", arm="device"),
        row("static", 5_891_000, read_weights="device", arm="device", **NO_POOL),
        row("static", 5_893_816, read_weights="device", arm="device", **NO_POOL),
    ]
    for mixed in (rows + shaky, shaky + rows):
        found = verdict("C15", mixed)
        assert (found["measured"], found["basis"]) == (170_000, "measured here")
        assert "170,000 tokens (166,144 planned) on top of 5,890,000" in found["condition"]
    assert verdict("C15", shaky + rows[2:])["basis"] == "planned"


def test_both_brackets_of_offload_are_one_runs_where_it_has_both():
    there = [r | {"run_id": "there"} for r in offloaded(5_700_000, 5_800_000)]
    here = [r | {"run_id": "here"} for r in offloaded(5_890_000, 6_060_000)]
    found = verdict("C15", [*there[:2], *here])
    assert found["measured"] == 170_000
    assert set(found["trials"]) == {r["trial_id"] for r in here}
    assert verdict("C15", [*there[:2], *here[2:]])["measured"] == 360_000


def test_a_step_with_offloaded_weights_is_told_beside_one_without():
    times = (("device", 7.2), ("offload", 77.4), ("none", 5.8))
    rows = [
        row("static", M, read_weights=read, attention_decode_step_ms=ms, resident_tokens=M)
        for read, ms in times
    ]
    found = verdict("C15", rows)
    assert "at 1,000,000 tokens then takes 77.4 ms instead of 7.2" in found["condition"]
    assert set(found["trials"]) == {r["trial_id"] for r in rows[:2]}


def test_c5_counts_as_the_report_does_and_leaves_out_what_rounds_up_to_chunks():
    found = verdict("C5", [row("static", **oom("pool", oom_requested_bytes=245_830_000_000))])
    assert found["measured"] == 245.8
    assert "182.8 of those, 191.7 GB (178.5 GiB)" in found["condition"]
