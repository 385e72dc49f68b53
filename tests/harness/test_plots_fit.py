"""Text of figures: nothing leaves the picture, and no two notes lie on each other."""

from __future__ import annotations

import itertools

import matplotlib as mpl
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from harness import style
from harness.columns import TIMELINE_COLUMNS, ordered
from harness.plots_engines import figure_root_cause
from harness.plots_phases import figure_phases
from harness.plots_real import figure_real_engines
from harness.runs import frame
from tests.harness.engine_fixture import made
from tests.harness.run_fixture import GIB, cell

LONG = "piecewise_cuda_graphs"


def boxes(figure):
    """The box of every text that a figure's author wrote, as it is saved."""
    with mpl.rc_context(style.RC):
        renderer = FigureCanvasAgg(figure).get_renderer()
        figure.draw(renderer)
        written = [t for axes in figure.axes for t in (*axes.texts, axes.yaxis.label)]
        written += [axes.title for axes in figure.axes]
        written += [axes._left_title for axes in figure.axes]
        return {
            (t.get_text(), n): mpl.text.Text.get_window_extent(t, renderer)
            for n, t in enumerate(written)
            if t.get_text()
        }


def outside(figure):
    """The texts that a figure's edge cuts, and by how many pixels."""
    edge = figure.bbox
    over = {
        text: max(edge.x0 - b.x0, b.x1 - edge.x1, edge.y0 - b.y0, b.y1 - edge.y1)
        for (text, _), b in boxes(figure).items()
    }
    return {text: pixels for text, pixels in over.items() if pixels > 0.5}


def on_each_other(figure):
    """Pairs of texts that share more than the lines of a letter's edge."""

    def shared(a, b):
        return min(a.x1, b.x1) - max(a.x0, b.x0) > 1 and min(a.y1, b.y1) - max(a.y0, b.y0) > 2

    found = boxes(figure).items()
    return [(k[0], m[0]) for (k, a), (m, b) in itertools.combinations(found, 2) if shared(a, b)]


def starts(allocation, **flags):
    """Starts of an engine whose second and third fail, the last far beyond the device."""
    options = str(flags).replace("'", '"').lower()
    rows = []
    for context, asked in ((131_072, 0), (1_000_000, 1), (5_893_888, 110)):
        row = cell("paged", context, 0.0, strategy_options=options) | {"strategy": "sglang"}
        row |= {"kv_committed_bytes": 128 * GIB, "experiment": "root_cause"}
        if asked:
            row |= {"status": "oom", "oom_allocation": allocation}
            row["oom_requested_bytes"] = asked * GIB
        rows.append(row)
    return rows


@pytest.mark.parametrize("allocation", ["kv_pool", LONG, LONG * 3])
def test_what_failed_is_named_within_the_picture(allocation):
    figure = figure_root_cause(frame(starts(allocation)), pd.DataFrame())
    assert outside(figure) == {}
    assert on_each_other(figure) == []
    said = ["".join(t.split()) for t, _ in boxes(figure)]
    assert sum(f"outofmemory:{allocation}of" in t for t in said) == 2


def test_a_curves_long_name_is_read_whole():
    flags = {"disable_cuda_graph": True, "max_running_requests": 16, "chunked_prefill_size": 8192}
    rows = starts(LONG) + starts(LONG, **flags, attention_backend="flashinfer")
    figure = figure_root_cause(frame(rows), pd.DataFrame())
    assert outside(figure) == {}
    assert on_each_other(figure) == []
    said = " ".join(" ".join(t.split()) for t, _ in boxes(figure))
    assert all(name in said for name in flags)


def test_a_panel_of_few_bars_has_a_label_no_higher_than_itself():
    figure = figure_root_cause(frame(starts("kv_pool")[:1]), pd.DataFrame())
    (label,) = [b for (text, _), b in boxes(figure).items() if text.startswith("context")]
    assert label.height < figure.axes[0].bbox.height


def test_engines_and_their_emulations_are_named_within_the_picture():
    run = made()
    rows = [ordered(r) for r in run.rows]
    for row in rows:
        if row["status"] == "oom":
            row["oom_allocation"] = LONG
    figure = figure_real_engines(frame(rows), frame(run.timeline, TIMELINE_COLUMNS))
    assert outside(figure) == {}
    assert on_each_other(figure) == []


def test_a_start_that_crashed_without_asking_ends_where_memory_did():
    run = made()
    rows = [ordered(r) for r in run.rows]
    last = next(r for r in rows if r["status"] == "ok" and r["engine_version"])
    last |= {"status": "crash", "peak_device_bytes": 130 * GIB, "oom_requested_bytes": None}
    figure = figure_real_engines(frame(rows), frame(run.timeline, TIMELINE_COLUMNS))
    assert any(t.endswith("crash") and t.startswith("13") for t, _ in boxes(figure))


def test_a_long_title_of_phases_is_broken():
    flags = {"disable_cuda_graph": True, "max_running_requests": 16}
    figure = figure_phases(frame(starts("kv_pool") + starts("kv_pool", **flags)), pd.DataFrame())
    assert outside(figure) == {}
    assert any("\n" in text and "max_running_requests=16" in text for text, _ in boxes(figure))


@pytest.mark.parametrize("text", ["200  out of memory: kv_pool of 1.0", LONG * 4, "a b", "x"])
@pytest.mark.parametrize("points", [30.0, 60.0, 500.0])
def test_broken_text_keeps_its_letters_within_its_width(text, points):
    lines = style.broken(text, points, 6.0)
    assert "".join("".join(lines).split()) == "".join(text.split())
    assert all(style.text_points(line, 6.0) <= points for line in lines)
    assert len(lines) == 1 or points < style.text_points(text, 6.0)


def test_lines_of_broken_text_are_about_as_long():
    assert style.broken("140  out of memory: piecewise_cuda_graphs of 1.0", 150, 6.0) == [
        "140  out of memory:",
        "piecewise_cuda_graphs of 1.0",
    ]
