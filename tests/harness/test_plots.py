"""Figures: N inputs give N curves, what failed is marked, the same rows give the same bytes."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from harness import style
from harness.columns import TIMELINE_COLUMNS
from harness.plots import TITLES, draw_run, figures
from harness.plots_compare import UNDECIDED
from harness.plots_engines import ITEMS
from harness.plots_memory import figure_memory
from harness.plots_phases import figure_phases, stack_of, whole_ledgers
from harness.plots_scaling import SPLITS
from harness.plots_sharing import SHARES
from harness.plots_throughput import figure_throughput
from harness.plots_verdicts import figure_verdicts
from harness.runs import RunError, frame
from harness.series import STRATEGIES, series
from harness.sizes import GIB
from tests.harness.run_fixture import SUMMARY, bracket, cell, events, legend, sweep, texts


def timeline(rows):
    return pd.DataFrame([e for r in rows for e in events(r)])


def test_every_strategy_keeps_its_own_colour_and_marker():
    names = ["static", "paged", "eager_pages", "sglang", "vllm"]
    assert len({style.look(n) for n in names}) == len({style.look(n)[0] for n in names}) == 5
    assert style.look("mine") == style.look("mine")


# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as it is seen with each kind.
VISIONS = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
               (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
               (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
               (0.004733, 0.691367, 0.303900)),
}  # fmt: skip
TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def seen(colour, vision):
    """CIELAB of a colour as it is seen."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array(TO_XYZ) @ (np.array(VISIONS[vision]) @ linear).clip(0, 1)
    x, y, z = (
        np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / (0.9505, 1, 1.089)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


STRATEGY_COLOURS = [style.look(s)[0] for s in STRATEGIES]
PALETTES = {
    "strategies": STRATEGY_COLOURS,
    "components": [c for n, c in style.COMPONENTS.items() if n != "nccl"],
    "items": list(ITEMS.values()),
    "shares": [colour for _, colour in SHARES.values()],
    "splits": [colour for _, colour, _ in SPLITS.values()],
}


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("palette", PALETTES)
def test_colours_of_a_figure_differ_with_any_kind_of_colour_vision(palette, vision):
    labs = [seen(colour, vision) for colour in PALETTES[palette]]
    pairs = list(itertools.combinations(labs, 2))
    assert min(np.linalg.norm(a - b) for a, b in pairs) > 15, pairs


def test_nothing_else_has_a_strategys_colour():
    for palette in set(PALETTES) - {"strategies"}:
        assert not set(PALETTES[palette]) & set(STRATEGY_COLOURS), palette
    assert UNDECIDED not in STRATEGY_COLOURS


def test_n_strategies_give_n_curves_even_without_one_ok_point():
    rows = [
        cell(name, context, 1.0)
        for name in ("static", "paged", "eager_pages", "sglang", "mine")
        for context in (1_000_000, 2_000_000)
    ]
    rows += [cell("static", 10_000_000, 1.0) | {"strategy": "vllm"}]
    figure = figure_memory(frame(rows))
    for name in ("static", "paged", "eager_pages", "sglang", "mine"):
        assert name in legend(figure)
    assert "vllm (never ok)" in legend(figure)
    speeds = figure_throughput(frame(rows))
    assert "vllm (no timed row)" in legend(speeds) and "mine" in legend(speeds)


def test_a_failed_trial_is_drawn_at_what_it_needed():
    rows = [cell("static", c, 1.0) for c in (5_000_000, 10_000_000)]
    need = rows[1]["capacity_bytes"] - rows[1]["oom_free_bytes"] + rows[1]["oom_requested_bytes"]
    figure = figure_memory(frame(rows))
    marks = [
        line.get_ydata()[0]
        for line in figure.axes[0].lines
        if line.get_marker() == style.ENDS["oom"][0] and len(line.get_ydata()) == 1
    ]
    assert marks == [pytest.approx(need / GIB)]
    assert f"does not start: needs {need / GIB:.0f} GiB" in texts(figure)
    assert "out of memory" in legend(figure)


@pytest.mark.parametrize("status", ["refused", "timeout", "crash", "invalid", "oom_host"])
def test_every_other_end_is_marked_and_named(status):
    bad = cell("paged", 2_000_000, 1.0) | {"status": status}
    figure = figure_memory(frame([cell("paged", 1_000_000, 1.0), bad]))
    assert style.ENDS[status][1] in legend(figure)


@pytest.mark.parametrize("scale", [1, 192])
def test_the_capacity_is_drawn_where_the_modelled_device_ends(scale):
    row = cell("paged", 1_000_000, 1.0, scale=scale)
    figure = figure_memory(frame([row]))
    heights = {line.get_ydata()[0] for line in figure.axes[0].lines if line.get_label()[0] == "_"}
    assert row["capacity_bytes"] * scale / GIB in heights


def test_a_single_point_is_drawn_with_a_marker():
    figure = figure_memory(frame([cell("paged", 1_000_000, 1.0)]))
    (curve,) = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert len(curve.get_xdata()) == 1
    assert legend(figure)[0] == "paged"


def test_a_single_timed_point_is_drawn_in_both_panels():
    rows = [cell("paged", 1_000_000, 1.0), cell("static", 1_000_000, 1.0)]
    for axes in figure_throughput(frame(rows)).axes:
        lengths = [len(c.lines[0].get_xdata()) for c in axes.containers]
        assert lengths == [1, 1]


def test_bracket_trials_do_not_hide_behind_points_nor_vanish_alone():
    alone = figure_memory(frame(bracket()))
    assert any(name.startswith("static") for name in legend(alone))


def test_scale_model_and_attention_only_are_printed_where_true():
    scaled, real = (frame([cell("paged", 10**6, 1.0, scale=n)]) for n in (192, 1))
    for draw in (figure_memory, figure_throughput):
        assert any("Scale model" in t for t in texts(draw(scaled)))
        assert not any("Scale model" in t for t in texts(draw(real)))
    assert any("Attention only" in t for t in texts(figure_throughput(real)))
    assert "attention only" in figure_throughput(real).axes[0].get_ylabel()


def test_the_scale_models_bytes_are_drawn_as_the_modelled_devices():
    small = figure_memory(frame([cell("paged", 1_000_000, 1.0, scale=192)]))
    large = figure_memory(frame([cell("paged", 1_000_000, 1.0)]))
    peaks = [
        next(line.get_ydata()[0] for line in f.axes[0].lines if line.get_marker() == "o")
        for f in (small, large)
    ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.01)


def test_contexts_are_labelled_in_powers_of_ten():
    figure = figure_memory(frame(sweep()))
    figure.draw_without_rendering()
    labels = [t.get_text() for t in figure.axes[-1].get_xticklabels() if t.get_text()]
    assert any("10^{6}" in label for label in labels)


def test_phases_stack_up_to_what_the_ledger_held():
    row = cell("paged", 1_000_000, 1.0)
    stack = stack_of(frame([row]).iloc[0], frame(timeline([row]), ()))
    total = row["context_bytes"] + row["weights_bytes"] + row["workspace_bytes"]
    assert stack.loc["workspace"].sum() == total
    assert stack.loc["fill"].sum() == total + row["kv_committed_bytes"]
    assert stack.loc["pool", "KV"] == 0


def test_phases_show_what_was_asked_and_what_was_never_reached():
    rows = sweep(repeats=1)
    figure = figure_phases(frame(rows), timeline(rows))
    assert "asked, refused" in legend(figure)
    assert any("never reached" in t for t in texts(figure))
    assert [a.get_title(loc="left").split(",")[0] for a in figure.axes] == [
        "static",
        "static",
        "paged",
        "paged",
    ]
    titles = [a.get_title(loc="left") for a in figure.axes]
    assert titles[2:] == ["paged, 10M, fill 10 %", "paged, 10M, fill 100 %: out of memory"]


def test_phases_without_a_ledger_show_the_end():
    figure = figure_phases(frame(sweep(repeats=1)), timeline([]))
    assert {t.get_text() for t in figure.axes[-1].get_xticklabels()} == {"end"}


def test_a_curve_splits_by_what_varies_and_keeps_every_row():
    rows = [
        cell("sglang", 1_000_000, 1.0, strategy_options=options, kernel_variant=kernel)
        for options, kernel in (
            ('{"max_running_requests": null}', "tma"),
            ('{"max_running_requests": 16}', "tma"),
            ('{"max_running_requests": 16}', None),
            ("not json", "tma"),
        )
    ]
    found = series(frame(rows))
    assert sum(len(s.rows) for s in found) == len(rows)
    assert "sglang, max_running_requests=16" in [s.label for s in found]


def test_models_get_a_panel_each():
    rows = sweep(repeats=1) + [r | {"model": "qwen", "trial_id": ""} for r in sweep(repeats=1)]
    figure = figure_memory(frame(rows))
    assert len(figure.axes) == 2
    assert any(t.startswith("qwen") for t in texts(figure))


def test_text_of_a_run_is_printed_not_interpreted():
    rows = [cell("paged", 1_000_000, 1.0) | {"strategy": r"$\frac{$", "model": "a$b^c"}]
    for figure in figures(frame(rows), timeline(rows)).values():
        figure.draw_without_rendering()
        assert any(r"\$" in text for text in texts(figure))


def test_a_run_gets_a_png_and_an_svg_of_each_figure(tmp_path):
    rows = [cell(name, 1_000_000, 1.0) for name in ("static", "paged")]
    paths = draw_run(tmp_path, frame(rows), timeline(rows), SUMMARY)
    names = ("memory_against_context", "memory_over_phases", "throughput")
    assert {p.name for p in paths} == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert set(names) <= set(TITLES)
    assert all(p.parent == tmp_path / "figures" for p in paths)
    for path in paths:
        if path.suffix == ".png":  # one column of a paper, sharp in print
            width, height = Image.open(path).size
            assert abs(width / 300 - 3.4) < 0.02 and 1 < height / 300 < 9


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = frame([cell("paged", 1_000_000, 1.0)])
    first, second = (style.save(figure_memory(rows), tmp_path / n, "m") for n in ("a", "b"))
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


def test_every_claim_is_a_line_with_its_verdict():
    claims = [
        {"id": f"C{n}", "claim": f"{'long ' * 5 * n}$x$ {n}", "verdict": verdict, "basis": basis}
        for n, (verdict, basis) in enumerate(
            [
                ("supported", "measured here"),
                ("refuted", "planned"),
                ("conditional", "emulated; measured on the engine"),
                ("undecided", ""),
                ("invented", "scale model"),
            ]
        )
    ]
    figure = figure_verdicts(claims)
    said = " ".join(texts(figure)).replace("\n", " ")
    assert all(c["id"] in said and c["claim"].strip().replace("$", r"\$") in said for c in claims)
    assert "Hollow" in said and "invented" not in said and said.count("undecided") == 2
    marks = [line for line in figure.axes[0].lines if line.get_marker() != "None"]
    filled = [line.get_markerfacecolor() != "white" for line in marks]
    assert filled == [True, False, True, False, False]
    assert len({line.get_marker() for line in marks}) == 4
    assert "Hollow" not in " ".join(texts(figure_verdicts(claims[:1])))


def test_no_rows_make_no_figure():
    assert figures(frame([])) == {}


def test_an_unwritable_figures_folder_is_one_clear_line(tmp_path):
    (tmp_path / "figures").symlink_to(tmp_path)
    rows = [cell("paged", 1_000_000, 1.0)]
    with pytest.raises(RunError, match="link"):
        draw_run(tmp_path, frame(rows), timeline(rows), {})


def test_the_start_of_a_process_belongs_to_every_length_that_it_fills_to():
    rows = [cell("paged", 1_000_000, fill) for fill in (0.1, 1.0)]
    start, more = events(rows[0]), events(rows[1])[-1]
    grown = rows[1]["kv_committed_bytes"] - rows[0]["kv_committed_bytes"]
    ledger = frame([*start, more | {"event_bytes": grown}], TIMELINE_COLUMNS)
    whole = whole_ledgers(frame(rows), ledger)
    first, second = (stack_of(frame(rows).iloc[n], whole) for n in (0, 1))
    assert first.loc["fill", "KV"] == rows[0]["kv_committed_bytes"]
    assert second.loc["fill", "KV"] == rows[1]["kv_committed_bytes"]
    assert second.loc["workspace", "weights"] == rows[1]["weights_bytes"]


def test_a_sweep_within_a_decade_still_has_a_scale():
    figure = figure_memory(frame([cell("paged", n, 1.0) for n in (2_000_000, 5_000_000)]))
    low, high = figure.axes[0].get_xlim()
    assert low < 1_000_000 and high > 5_000_000
