"""Remedies: every arm keeps its three points and its price, and what it differs by is found."""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from harness import style
from harness.plots_remedies import MARKS, figure_remedies
from harness.remedies import remedies, remedies_table
from harness.report import report_parts
from harness.runs import frame
from tests.harness.run_fixture import SUMMARY, cell, legend, texts

CLOSED = {"ok": 5_893_888, "not_ok": 5_896_704, "limited_by": "oom"}
REFUSED = {"ok": 5_893_888, "not_ok": 5_896_704, "limited_by": "refused"}
WIDE = {"ok": 1_000_000, "not_ok": 100_000_000, "limited_by": "refused"}
NONE = {"ok": None, "not_ok": None, "limited_by": ""}


def end(tokens):
    return {"ok": tokens, "not_ok": None, "limited_by": "sweep_end"}


def entry(startup, admit, resident, rate=None, at=1_000_000):
    timed = [{"resident_tokens": at, "attention_decode_tokens_per_second": rate}]
    timed = timed if rate else []
    return {"startup": startup, "admit": admit, "resident": resident, "decode": timed}


ENTRIES = {
    "static, static": entry(CLOSED, CLOSED, CLOSED, 172.0),
    "paged, on_demand": entry(end(100_000_000), REFUSED, CLOSED, 172.2),
    "static, smaller_context": entry(end(5_000_000), end(5_000_000), end(5_000_000), 172.4),
    "static, weights_on_device": entry(CLOSED, CLOSED, CLOSED, 139.0),
    "static, weights_offloaded": entry(CLOSED, CLOSED, CLOSED, 13.9),
    "static, fp8_kv": entry(CLOSED, CLOSED, CLOSED, 325.0),
    "paged, hybrid_kv": entry(end(100_000_000), REFUSED, CLOSED),
    "sglang, default_requests": entry(NONE, NONE, NONE),
    "sglang, few_requests": entry(end(100_000_000), REFUSED, REFUSED),
    "paged, context_parallel": entry(end(100_000_000), WIDE, end(1_000_000), 586.0),
}
REMEDIES = {"schema": 1, "strategies": ENTRIES, "claims": []}


def arm(name, strategy, context=1_000_000, **given):
    row = cell(strategy, context, 1.0, arm=name, read_weights="none", hybrid=0)
    return row | {"experiment": "remedies"} | given


def rows():
    qwen = {"model": "qwen", "kv_bytes_per_token": 12_288}
    return frame(
        [
            arm("static", "static"),
            arm("on_demand", "paged"),
            arm("smaller_context", "static", 5_000_000),
            arm("weights_on_device", "static", read_weights="device"),
            arm("weights_offloaded", "static", read_weights="offload"),
            arm("fp8_kv", "static", **qwen),
            arm("hybrid_kv", "paged", model="scout", status="crash", hybrid=1),
            arm("default_requests", "sglang", **qwen, status="oom"),
            arm("few_requests", "sglang", **qwen, strategy_options='{"max_running_requests": 16}'),
            arm("context_parallel", "paged", **qwen, parallel="context", context_ranks=8),
        ]
    )


def points(figure):
    marks = {marker for marker, _ in MARKS.values()}
    return [line for line in figure.axes[0].lines if line.get_marker() in marks]


def test_every_arm_is_a_row_by_its_own_name_with_its_points_and_price():
    figure = figure_remedies(rows(), REMEDIES)
    axes, price = figure.axes
    names = [t.get_text() for t in axes.get_yticklabels()]
    assert names[:3] == ["static", "on demand", "smaller context"]
    assert names[5:8] == ["FP8 KV", "hybrid KV", "default requests"]
    assert len(names) == len(ENTRIES) == len(price.patches)
    assert len(points(figure)) == 3 * (len(ENTRIES) - 1)  # one arm never started
    assert {"172", "586", "13.9", "crash at 1M", "OOM at 1M", "emulated, not timed"} <= set(
        texts(figure)
    )


def test_tokens_stand_on_a_log_axis_from_1e5_to_1e8_that_holds_every_point():
    axes = figure_remedies(rows(), REMEDIES).axes[0]
    low, high = axes.get_xlim()
    assert axes.get_xscale() == "log" and 0 < low <= 1e5 and high >= 1e8
    tiny = {"strategies": {"static": entry(end(90), end(90), end(90))}}
    low, _ = figure_remedies(frame([]), tiny).axes[0].get_xlim()
    assert 0 < low < 90


def test_an_arrow_stands_only_where_the_sweep_ended_without_a_failure():
    axes = figure_remedies(rows(), REMEDIES).axes[0]
    arrows = [t for t in axes.texts if getattr(t, "arrow_patch", None) is not None]
    ends = [p for e in ENTRIES.values() for p in e.values() if isinstance(p, dict)]
    assert len(arrows) == sum(p["limited_by"] == "sweep_end" for p in ends) == 8


def test_a_bracket_that_was_not_closed_is_drawn_as_wide_as_it_is():
    figure = figure_remedies(rows(), REMEDIES)
    wide = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [list(line.get_xdata()) for line in wide] == [[1_000_000, 100_000_000]]
    assert any("Dotted" in t for t in texts(figure))


def test_colours_are_the_strategies_and_shapes_the_points():
    figure = figure_remedies(rows(), REMEDIES)
    assert legend(figure) == ["start-up", "static", "admit", "paged", "resident", "sglang"]
    bars = [to_hex(p.get_facecolor()).upper() for p in figure.axes[1].patches]
    assert bars[:2] == [style.look("static")[0], style.look("paged")[0]]


@pytest.mark.parametrize(
    ("name", "base", "difference"),
    [
        ("on demand", "static", "strategy static → paged"),
        ("smaller context", "static", "context at most 5M"),
        ("weights on device", "static", "weights read in each step none → device"),
        ("weights offloaded", "weights on device", "weights read in each step device → offload"),
        ("few requests", "default requests", "max_running_requests default → 16"),
        ("FP8 KV", "", ""),
        ("hybrid KV", "", ""),
        ("default requests", "", ""),
        ("context parallel", "", ""),
    ],
)
def test_an_arm_names_the_arm_that_it_differs_from_by_one_thing(name, base, difference):
    found = {one.name: one for one in remedies(rows(), REMEDIES)}
    assert (found[name].base, found[name].difference) == (base, difference)


def test_the_table_holds_every_arm_its_points_and_its_price():
    table = remedies_table(rows(), REMEDIES)
    assert len(table.rows) == len(ENTRIES)
    lines = {row[0]: row for row in table.rows}
    assert lines["on demand"][3:6] == ("≥ 100,000,000", "5,893,888", "5,893,888")
    assert lines["context parallel"][4] == "1,000,000 to 100,000,000"
    assert lines["default requests"][3:7] == ("–", "–", "–", "OOM at 1M")
    assert lines["weights offloaded"][6:9] == ("13.9", "1M", "0.1")
    assert lines["FP8 KV"][8] == "–"
    assert table.title in [
        t.title for t in report_parts(rows(), REMEDIES, rows()["run_id"].iloc[0])[0]
    ]


def test_what_a_price_leaves_out_and_why_there_is_none_is_said():
    table = remedies_table(rows(), REMEDIES)
    lines = {row[0]: row for row in table.rows}
    assert lines["few requests"][6] == "emulated, not timed" and lines["static"][9] == "–"
    assert lines["context parallel"][9] == "the exchange between ranks"
    assert any("no step to time" in n for n in table.notes)
    assert "context parallel: without the exchange between ranks." in " ".join(
        " ".join(texts(figure_remedies(rows(), REMEDIES))).split()
    )
    ran = rows()
    ran.loc[ran["arm"].eq("context_parallel"), "collective_ms"] = 0.3125
    ran.loc[ran["arm"].eq("context_parallel"), "resident_tokens_all_ranks"] = 1_000_000
    lines = {row[0]: row for row in remedies_table(ran, REMEDIES).rows}
    assert lines["context parallel"][9] == "the exchange between ranks: 0.312 ms a step"
    alone = {"strategies": {"static, static": ENTRIES["static, static"]}}
    assert len(remedies_table(rows()[:1], alone).notes) == 1


def test_a_price_is_compared_at_a_length_that_both_were_timed_at():
    def decode(*pairs):
        keys = ("resident_tokens", "attention_decode_tokens_per_second")
        return {"decode": [dict(zip(keys, pair, strict=True)) for pair in pairs]}

    both = [arm("flat_kv", "paged"), arm("hybrid_kv", "paged", hybrid=1)]
    flat, hybrid = decode((1e6, 331.0), (5e6, 70.0)), decode((1e6, 989.0), (1e7, 145.0))
    entries = {"paged, flat_kv": flat, "paged, hybrid_kv": hybrid}
    shown = remedies(frame(both), {"strategies": entries})
    prices = [(one.tokens_per_second, one.at_tokens, one.base_rate) for one in shown]
    assert prices == [(70.0, 5e6, None), (989.0, 1e6, 331.0)]


def test_other_runs_have_no_such_table():
    other = frame([cell("paged", 1_000_000, 1.0)])
    assert remedies_table(other, SUMMARY).rows == ()


def test_a_summary_alone_still_gives_every_configuration():
    figure = figure_remedies(frame([]), SUMMARY)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["static", "paged"]
    assert len(points(figure)) == 6
    odd = {"strategies": {"odd": {"startup": 3, "decode": "x"}}}
    assert len(figure_remedies(frame([]), odd).axes[1].patches) == 1
    assert figure_remedies(frame([]), {}).axes


def test_arms_of_other_experiments_in_the_summary_are_no_remedies():
    both = {"strategies": ENTRIES | {"eager_pages": entry(CLOSED, CLOSED, CLOSED, 1.0)}}
    assert [one.name for one in remedies(rows(), both)] == [
        one.name for one in remedies(rows(), REMEDIES)
    ]
