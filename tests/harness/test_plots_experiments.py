"""Figures of the experiments: every input is drawn, and what failed is named."""

from __future__ import annotations

import pandas as pd
import pytest

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots import OF_A_SWEEP, QUESTIONS, TITLES, draw_run, figures
from harness.plots_churn import figure_churn, figure_fragmentation
from harness.plots_engines import figure_root_cause, items_of
from harness.plots_fractions import figure_mem_fraction
from harness.plots_granularity import figure_granularity
from harness.plots_precision import figure_precision
from harness.plots_sharing import figure_waste
from harness.precision import precision_table
from harness.runs import frame
from harness.shares import NAMES
from harness.sharing import sharing_table
from harness.tables import sweep
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
    said = [" ".join(t.split()) for t in texts(figure)]
    assert any("out of memory: kv_pool" in t and t.startswith("196") for t in said)
    assert any("out of memory: kv_pool of 116.0" in t for t in said)
    assert any("refused: 116.0 > " in t for t in said)
    assert "76.00" in said and any("sglang 0.5.12.post1" in t for t in said)
    assert {axes.get_ylabel() for axes in figure.axes} == {"context, tokens"}
    assert {"sglang", "sglang, max_running_requests=16", "vllm"} <= set(said)
    assert "request-to-token" in legend(figure) and "CUDA graphs" in legend(figure)
    hatched = [p for p in figure.axes[0].patches if p.get_hatch()]
    assert [p.get_width() for p in hatched] == [116.0, 116.0]


def test_a_scale_models_start_is_a_bar_of_its_own_beside_a_devices():
    real = engine_rows()[0]
    scaled = real | {"basis": "scale_model", "scale": 192, "trial_id": "scaled"}
    scaled |= {k: real[k] // 192 for k in ("chunk_bytes", "capacity_bytes", "kv_bytes_per_token")}
    said = texts(figure_root_cause(frame([real, scaled]), pd.DataFrame()))
    assert {"sglang, measured", "sglang, scale model"} <= set(said)
    again = texts(figure_root_cause(frame([real, real | {"repeat": 1}]), pd.DataFrame()))
    assert "sglang" in again and any("first is drawn" in t for t in again)


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
    colours = {line.get_color() for line in figure.axes[0].lines}
    others = {style.look(s)[0] for s in ("paged", "eager_pages", "sglang", "vllm")}
    assert style.look("static")[0] in colours and not colours & others
    drawn = [y for line in figure.axes[0].lines for y in line.get_ydata()]
    assert figure.axes[0].get_ylim()[1] > 1.05 * max(drawn)
    assert "device: 139.3 GiB free" in legend(figure)


def waste_rows():
    """Slots of the longest request in 16 GiB, pages in 8; an engine whose shares nobody knows."""
    rows = [
        cell(name, 1000, 1.0)
        | {f"{part}_share": share for part, share in zip(NAMES, shares, strict=True)}
        | {"sequences_admitted": n, "kv_committed_bytes": kv, "slot_policy": policy}
        for name, policy, shares, n, kv in (
            ("static", "max", (0.2, 0.1, 0.6, 0.1), 8, 16 * GIB),
            ("paged", "", (0.96, 0, 0.04, 0), 33, 8 * GIB),
            ("vllm", "", (None,) * 4, None, None),
        )
    ]
    return [r | {"experiment": "waste"} for r in rows]


def test_waste_stands_beside_the_papers_figures():
    figure = figure_waste(frame(waste_rows()))
    shares, _, held, batched = figure.axes
    widths = [p.get_width() for p in shares.patches]
    assert widths == pytest.approx([20, 10, 60, 10, 96, 0, 4, 0])
    assert [p.get_width() for p in held.patches] == pytest.approx([1, 8.25, 0])
    assert {"57.3", "96.3", "8.25×: 33.0 in 8.00 GiB", "no figure"} <= set(texts(figure))
    drawn = sorted(p.get_width() for p in batched.patches)
    paper = (7, 9.81, 13.62, 30.42, 7, 43.24, 72.75, 132.44)
    assert drawn == pytest.approx(sorted(n / 7 for n in paper))


def test_without_slots_of_the_longest_request_sequences_are_a_gib_s():
    (_, paged, _) = waste_rows()
    figure = figure_waste(frame([paged]))
    assert [p.get_width() for p in figure.axes[2].patches] == pytest.approx([33 / 8])
    assert "4.12: 33.0 in 8.00 GiB" in texts(figure)
    assert figure.axes[2].get_xlabel() == "sequences a GiB of KV"


def test_the_waste_table_compares_sequences_in_equal_memory():
    rows = frame(waste_rows())
    table = sharing_table(rows)
    lines = {line[0]: line[1:] for line in table.rows}
    assert lines["static"][4:] == ("8.00", "16.0", "0.500", "1.00")
    assert lines["paged"][4:] == ("33.0", "8.00", "4.12", "8.25")
    assert lines["vllm"] == ("–",) * 8
    assert lines["vLLM, paper"][-1] == "4.35 / 18.9"
    assert not sharing_table(rows.assign(experiment="sweep")).rows


def churn_rows():
    """Arms of three strategies; one failed, one never grew, one has two names for one strategy."""
    whole = {"workload": "churn", "fill_seconds": 2.0, "live_share": 0.9}
    whole |= {"largest_admissible_tokens": 200_000, "admissible_of_free_min": 0.5}
    grown = {"kv_end_committed_bytes": 0, "grow_events": 200, "grow_stall_us_p99": 3000.0}
    rows = [
        cell("static", 1_000_000, 0.5) | whole | {"kv_end_committed_bytes": 8 * GIB},
        cell("paged", 1_000_000, 1.0) | whole | grown,
        cell("paged", 1_000_000, 1.0, chunk_bytes=6 << 20) | whole | grown | {"arm": "chunk_2MiB"},
        cell("eager_pages", 1_000_000, 1.0) | {"status": "crash"},
    ]
    return [r | {"experiment": "fragmentation"} for r in rows]


def test_churn_draws_committed_and_live_bytes_of_every_arm_over_its_operations():
    rows = churn_rows()
    changes = [
        events(rows[n])[0]
        | {"phase": "fill", "seconds": n * k**2, "resident_tokens": 1000 * k}
        | {"kv_committed_bytes": GIB}
        for n in (1, 2)
        for k in range(5)
    ]
    figure = figure_churn(frame(rows), pd.DataFrame(changes))
    titles = [a.get_title(loc="left") for a in figure.axes if a.axison]
    assert titles == ["static", "paged", "chunk 6 MiB", "eager_pages"]
    said = texts(figure)
    assert "no ledger events" in said and "no ledger events (crash)" in said
    for axes in figure.axes[1:3]:  # a slow arm is as wide as a fast one
        committed, live = axes.lines
        assert list(committed.get_xdata()) == [0, 25, 50, 75, 100]
        assert list(committed.get_ydata()) == [1] * 5
        assert live.get_ydata()[-1] == pytest.approx(4000 * 24_576 / GIB)


def test_what_churn_costs_is_a_bar_an_arm_and_metric():
    figure = figure_fragmentation(frame(churn_rows()))
    assert [len(axes.patches) for axes in figure.axes] == [4] * 6
    names = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert names == ["static", "paged", "chunk 6 MiB", "eager_pages"]
    said = texts(figure)
    assert said.count("crash") == 6 and said.count("–") == 1 and said.count("8.00") == 1
    assert legend(figure) == ["static", "paged", "eager_pages"]


def test_churn_says_how_long_it_stands_for_where_its_rows_do():
    rows = churn_rows()
    for hours, row in zip((2.5, 3.0, None), rows, strict=False):
        row |= {"simulated_hours": hours, "step_ms": 25.0 if hours else None}
    changes = pd.DataFrame(columns=["trial_id"])
    for figure in (figure_fragmentation(frame(rows)), figure_churn(frame(rows), changes)):
        said = " ".join(" ".join(texts(figure)).split())
        assert "stand for 2.5 to 3.0 h of decoding" in said and "to last 25 ms" in said
        assert "rounded up to whole pages" in said
    earlier = " ".join(texts(figure_fragmentation(frame(churn_rows()[:2]))))
    assert "of decoding" not in earlier and "rounded up" not in earlier


def test_a_trials_table_gives_a_chunk_its_real_size():
    names = {line[0] for line in sweep(frame(churn_rows())).rows}
    assert names == {"static", "paged", "paged, chunk_2MiB (6 MiB)", "eager_pages"}


def grain_rows():
    common = {"experiment": "granularity", "growth": "sync", "grow_events": 400}
    kernels = [
        cell("paged", 1_000_000, 1.0, chunk_bytes=n << 20, arm=f"chunk_{n}MiB")
        | common
        | {"grow_stall_us_p50": n, "grow_stall_us_p99": 2 * n}
        for n in (2, 16, 64, 256)
    ]
    kernels.append(
        cell("paged", 1_000_000, 1.0, page_tokens=16, chunk_bytes=64 << 20)
        | common
        | {"grow_stall_us_p50": 5, "grow_stall_us_p99": 9}
    )
    trace = [
        cell("paged", 14_089, 1.0, page_tokens=n, chunk_bytes=64 << 20, workload="trace")
        | common
        | {"grow_events": 50, "grow_stall_us_p50": 3, "grow_stall_us_p99": 70_000}
        | {"internal_share": n / 1000, "attention_decode_bytes_per_second": None}
        for n in (1, 16, 256)
    ]
    return [*kernels, *trace]


def curves(axes, hollow=False):
    """Each curve's points; hollow ones are those of few growth events."""
    return [
        dict(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if len(line.get_xdata()) and (line.get_markerfacecolor() == "white") == hollow
    ]


def test_granularity_holds_other_sizes_while_one_varies():
    figure = figure_granularity(frame(grain_rows()))
    page, chunk = figure.axes[:2]
    assert [a.get_title(loc="left") for a in (page, chunk)] == ["chunk 64 MiB", "page 128 tokens"]
    assert curves(chunk) == [{2: 0.002, 16: 0.016, 64: 0.064, 256: 0.256}]
    assert curves(page) == [{16: 0.005, 128: 0.064}]
    assert legend(figure) == [
        "kernels, synchronous growth",
        "allocator under a trace, synchronous growth",
    ]


def test_granularity_names_how_memory_grows_and_when_it_goes_back():
    first = grain_rows()[0]
    ahead = {"growth": "ahead", "strategy_options": '{"growth": "ahead", "release": "immediate"}'}
    late = {"workload": "churn", "strategy_options": '{"growth": "sync", "release": "deferred"}'}
    assert legend(figure_granularity(frame([first, first | ahead, first | late]))) == [
        "kernels, synchronous growth",
        "kernels, mapped ahead",
        "allocator, churn, synchronous growth, deferred release",
    ]


def test_stalls_of_few_growth_events_are_hollow_and_said_to_be():
    figure = figure_granularity(frame(grain_rows()))
    p99 = figure.axes[2]
    assert "p99" in p99.get_ylabel()
    assert curves(p99, hollow=True) == [{1: 70.0, 16: 70.0, 256: 70.0}]
    assert any("fewer than 100 growth events" in t for t in texts(figure))
    waste = figure.axes[4]
    assert "waste" in waste.get_ylabel()
    assert curves(waste) == [{1: pytest.approx(0.1), 16: pytest.approx(1.6), 256: 25.6}]


def test_granularity_says_what_it_leaves_out():
    apart = cell("paged", 1_000_000, 1.0, page_tokens=16, chunk_bytes=2 << 20)
    failed = cell("paged", 1_000_000, 1.0) | {"status": "crash"}
    rows = [*grain_rows(), apart | {"grow_stall_us_p50": 1}, failed]
    said = texts(figure_granularity(frame(rows)))
    assert any("not ended well: 1 of 10" in t and "columns: 1 of 10" in t for t in said)


def test_granularity_of_a_single_size_is_still_a_figure():
    figure = figure_granularity(frame(grain_rows()[:1]))
    assert curves(figure.axes[0]) == [{128: 0.002}]


def precision_rows():
    rows = []
    for dtype, token, rate in (("fp8_e4m3", 24_576, 170.0), ("bf16", 49_152, 87.0)):
        base = cell("paged", 1_000_000, 1.0, kv_dtype=dtype, kv_bytes_per_token=token)
        base |= {"experiment": "precision", "gate_error": 0.001}
        short = {"context_tokens": 250_000, "resident_tokens": 250_000}
        rows.append(base | {"attention_decode_tokens_per_second": rate})
        rows.append(base | short | {"attention_decode_tokens_per_second": 4 * rate})
        full = cell("paged", 10_000_000, 1.0, kv_dtype=dtype, kv_bytes_per_token=token)
        rows.append(full | {"purpose": "resident", "experiment": "precision"})
    return rows


def test_precision_draws_rate_and_error_at_the_longest_length_that_was_timed():
    figure = figure_precision(frame(precision_rows()))
    widths = [[p.get_width() for p in axes.patches] for axes in figure.axes]
    assert widths[0] == [48, 24] and widths[2] == [87, 170] and widths[3] == [1, 1]
    assert "at 1M resident" in figure.axes[2].get_xlabel()
    assert all(0 < n < 10 for n in widths[1]) and "→" not in "".join(texts(figure))


def rounded_rows():
    """The same, of a version that measures what rounding K and V costs."""
    cost = {"fp8_e4m3": 0.035, "bf16": 0.0002}
    return [
        r | {"decode_gate_error": 0.0002, "unrounded_decode_error": cost[r["kv_dtype"]]}
        for r in precision_rows()
    ]


def test_precision_draws_what_rounding_costs_beside_the_kernels_error():
    figure = figure_precision(frame(rounded_rows()))
    panels = [axes for axes in figure.axes if axes.axison]
    widths = [[p.get_width() for p in axes.patches] for axes in panels]
    assert len(panels) == 5 and widths[2] == [87, 170]
    assert widths[3] == pytest.approx([0.2, 0.2]) and widths[4] == pytest.approx([0.2, 35])
    assert "with rounding" in panels[4].get_xlabel()
    assert panels[3].get_xlim() == panels[4].get_xlim() != panels[2].get_xlim()


def test_the_precision_table_holds_both_errors_at_every_length():
    lines = precision_table(frame(rounded_rows())).rows
    errors = {(line[1], line[3]): line[5:] for line in lines}
    assert errors["fp8_e4m3", "1M"] == ("0.00100", "0.000200", "0.0350")
    assert errors["bf16", "1M"] == ("0.00100", "0.000200", "0.000200")
    earlier = {line[5:] for line in precision_table(frame(precision_rows())).rows}
    assert earlier == {("0.00100", "–", "–")}
    assert not precision_table(frame([cell("paged", 1_000_000, 1.0)])).rows


def test_precision_names_what_was_not_timed_or_failed():
    crashed = cell("paged", 1_000_000, 1.0, kv_dtype="bf16") | {"status": "crash"}
    untimed = cell("paged", 1_000_000, 1.0, kv_dtype="fp8_e4m3")
    untimed |= {"attention_decode_tokens_per_second": None, "gate_error": None}
    figure = figure_precision(frame([crashed, untimed]))
    assert [len(axes.patches) for axes in figure.axes] == [2] * 4
    assert {"crash", "not timed"} <= set(texts(figure))


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        ("root_cause", {"root_cause"}),
        ("waste", {"waste"}),
        ("fragmentation", {"fragmentation", "churn"}),
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


@pytest.mark.parametrize("experiment", ["waste", "remedies", "fragmentation", "granularity"])
def test_an_engine_among_the_arms_asks_for_no_other_figure(experiment):
    rows = [cell(n, 1_000_000, 1.0) | {"experiment": experiment} for n in ("paged", "sglang")]
    own = set(QUESTIONS[experiment]) - {"waste"}  # no row has shares
    assert set(figures(frame(rows), None, SUMMARY)) == own


def test_claims_draw_no_sweep_of_contexts_but_what_engines_and_fractions_ask_for():
    rows = [cell(n, 10_000_000, 0.0) | {"experiment": "claims"} for n in ("static", "sglang")]
    rows += [rows[0] | {"mem_fraction": f, "trial_id": f"f{f}"} for f in (0.5, 0.8)]
    drawn = figures(frame(rows), None, SUMMARY)
    assert set(drawn) == {"verdicts", "root_cause", "mem_fraction"}


def test_every_figure_is_of_a_question_and_has_a_title():
    assert {n for names in QUESTIONS.values() for n in names} | set(OF_A_SWEEP) == set(TITLES)


def test_figures_that_these_rows_cannot_make_are_removed(tmp_path):
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("root_cause.png", "root_cause.svg", "compare_a_b.png", "mine.png"):
        (folder / name).write_bytes(b"old")
    rows = frame([cell("paged", 1_000_000, 1.0) | {"experiment": "precision"}])
    draw_run(tmp_path, rows, pd.DataFrame(), {})
    assert {p.name for p in folder.iterdir()} == {
        "precision.png",
        "precision.svg",
        "compare_a_b.png",
        "mine.png",
    }


def test_what_a_failed_start_gave_back_is_drawn_as_it_was_when_it_failed():
    row = engine_rows()[0]
    held = engine_events([row, row | {"trial_id": "other"}])
    held = [e for e in held if e["trial_id"] == row["trial_id"]]
    back = [e | {"event_bytes": -e["event_bytes"]} for e in held[:0:-1]]
    found = items_of(frame([row]).iloc[0], frame(held + back, TIMELINE_COLUMNS))
    assert found == {"weights": 4 * GIB, "request-to-token": 76 * GIB}
