"""Figures of the experiments: every input is drawn, and what failed is named."""

from __future__ import annotations

import pandas as pd
import pytest

from harness.columns import TIMELINE_COLUMNS
from harness.plots import figures
from harness.plots_costs import (
    figure_granularity,
    figure_precision,
    figure_remedies,
)
from harness.plots_engines import figure_mem_fraction, figure_root_cause, items_of
from harness.plots_sharing import SHARES, figure_fragmentation, figure_waste
from harness.runs import frame
from tests.harness.run_fixture import GIB, SUMMARY, cell, events, legend, texts


def engine_rows():
    """SGLang at 10M: its table took 76 GiB, so the pool does not fit; vLLM refuses by its rule."""
    flags = '{"max_running_requests": null, "disable_cuda_graph": false}'
    failed = cell("static", 10_000_000, 0.0, strategy_options=flags) | {
        "strategy": "sglang",
        "experiment": "root_cause",
        "emulated_version": "0.5.12.post1",
        "oom_requested_bytes": 116 * GIB,
    }
    few = cell("paged", 10_000_000, 0.0, strategy_options='{"max_running_requests": 16}')
    few["emulated_version"] = failed["emulated_version"]
    refused = failed | {"strategy": "vllm", "status": "refused", "trial_id": "v"}
    return [failed, few | {"strategy": "sglang", "experiment": "root_cause"}, refused]


def engine_events(rows):
    steps = [
        ("weights", "weights", 4),
        ("tables", "req_to_token", 76),
        ("pool", "kv_pool", 50),
        ("workspace", "piecewise_cuda_graphs", 1),
    ]
    return [
        events(rows[0])[0] | {"phase": p, "allocation": a, "event_bytes": n * GIB, "trial_id": i}
        for i in (rows[0]["trial_id"], rows[1]["trial_id"])
        for p, a, n in steps[: 3 if i == rows[0]["trial_id"] else 4]
    ]


def test_what_an_engine_asked_for_is_stacked_and_the_failing_item_named():
    rows = engine_rows()
    figure = figure_root_cause(frame(rows), pd.DataFrame(engine_events(rows)))
    said = texts(figure)
    assert any("out of memory: kv_pool" in t and t.startswith("196") for t in said)
    assert any("refused: " in t and "allowed" in t for t in said)
    assert {"sglang", "sglang, max_running_requests=16", "vllm"} <= set(said)
    assert "req_to_token" in legend(figure) and "CUDA graphs" in legend(figure)
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert [p.get_width() for p in hatched] == [116.0, 116.0]


def test_items_of_a_trial_without_events_come_from_its_row():
    row = cell("paged", 1_000_000, 0.5)
    found = items_of(frame([row]).iloc[0], frame([], TIMELINE_COLUMNS))
    assert found["KV pool"] == row["kv_committed_bytes"] and found["weights"] == 4 * GIB


def test_fractions_are_a_curve_for_each_meaning_and_crosses_did_not_start():
    rows = []
    for of, shrink in (("context", 1.0), ("device", 0.5)):
        for fraction in (0.5, 0.65, 0.8):
            row = cell("static", int(1e7 * fraction * shrink), 0.0)
            options = f'{{"mem_fraction_of": "{of}", "mem_fraction": {fraction}}}'
            own = {"mem_fraction": fraction, "strategy_options": options}
            rows.append(row | own | {"context_tokens": 10_000_000})
    figure = figure_mem_fraction(frame(rows))
    assert legend(figure)[:2] == [
        "static, fraction of the context",
        "static, fraction of the device",
    ]
    crosses = [
        x for line in figure.axes[0].lines if line.get_marker() == "X" for x in line.get_xdata()
    ]
    assert crosses == [0.65, 0.8]


def test_waste_stands_beside_the_papers_figure():
    rows = [
        cell(name, 1000, 1.0) | dict(zip(SHARES, shares, strict=True)) | {"sequences_admitted": n}
        for name, shares, n in (
            ("static", (0.2, 0.1, 0.6, 0.1), 7),
            ("paged", (0.96, 0, 0.04, 0), 33),
            ("vllm", (None,) * 4, None),
        )
    ]
    figure = figure_waste(frame(rows))
    widths = [p.get_width() for p in figure.axes[0].patches]
    assert widths == pytest.approx([20, 10, 60, 10, 96, 0, 4, 0])
    assert {"57.3", "96.3", "33", "no figure", "Orca (Pow2)"} <= set(texts(figure))


def test_churn_draws_committed_and_live_bytes_of_every_strategy():
    rows = [cell(name, 1_000_000, 1.0) for name in ("static", "paged")]
    changes = [
        events(rows[1])[0] | {"seconds": n, "resident_tokens": 1000 * n, "kv_committed_bytes": GIB}
        for n in range(4)
    ]
    figure = figure_fragmentation(frame(rows), pd.DataFrame(changes))
    assert "no ledger events" in texts(figure) and len(figure.axes) == 2
    committed, live = (line.get_ydata() for line in figure.axes[1].lines)
    assert list(committed) == [1] * 4
    assert live[-1] == pytest.approx(3000 * 24_576 / GIB)


def test_granularity_holds_other_sizes_while_one_varies():
    rows = [
        cell("paged", 1_000_000, 1.0, chunk_bytes=n << 20) | {"grow_stall_us_p99": n}
        for n in (2, 16, 64, 256)
    ]
    rows += [cell("paged", 1_000_000, 1.0, page_tokens=16) | {"grow_stall_us_p99": 9}]
    figure = figure_granularity(frame(rows))
    by_label = {axes.get_xlabel(): axes.lines[0] for axes in figure.axes}
    assert list(by_label["chunk, MiB"].get_xdata()) == [2, 16, 64, 256]
    assert list(by_label["page, tokens"].get_xdata()) == [16, 128]


def test_precision_draws_a_mark_for_each_input():
    rows = [cell("paged", 1_000_000, 1.0, kv_dtype=d) for d in ("fp8_e4m3", "bf16")]
    assert [len(axes.patches) for axes in figure_precision(frame(rows)).axes] == [2, 2, 2]


def test_remedies_draw_every_point_of_every_configuration():
    figure = figure_remedies(SUMMARY)
    points = [line for line in figure.axes[0].lines if line.get_marker() in ("^", "s", "o")]
    assert len(points) == 6
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["static", "paged"]
    assert figure_remedies({"strategies": {"odd": {"startup": 3, "decode": "x"}}}).axes


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        ("root_cause", {"root_cause"}),
        ("waste", {"waste"}),
        ("fragmentation", {"fragmentation"}),
        ("granularity", {"granularity"}),
        ("precision", {"precision"}),
        ("remedies", {"remedies"}),
        ("sweep", {"memory_against_context", "memory_over_phases", "throughput"}),
    ],
)
def test_each_experiment_draws_its_own_figures(experiment, names):
    row = cell("sglang" if experiment == "root_cause" else "paged", 1_000_000, 1.0)
    found = figures(frame([row | {"experiment": experiment, "live_share": 0.9}]), None, SUMMARY)
    assert set(found) == names


def test_what_a_failed_start_gave_back_is_drawn_as_it_was_when_it_failed():
    row = engine_rows()[0]
    held = engine_events([row, row | {"trial_id": "other"}])
    held = [e for e in held if e["trial_id"] == row["trial_id"]]
    back = [e | {"event_bytes": -e["event_bytes"]} for e in held[:0:-1]]
    found = items_of(frame([row]).iloc[0], frame(held + back, TIMELINE_COLUMNS))
    assert found == {"weights": 4 * GIB, "req_to_token": 76 * GIB}
