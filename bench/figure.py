"""Draw a result file: ``python -m bench.figure CSV FIGURE``; ours beside the peers."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench.table import Row, read, works
from harness import style

COLOURS = {
    "ours": (style.INDIGO, "ours, shuffled page table"),
    "FA3": (style.SKY, "FA3 (FlashAttention-3, vLLM's build)"),
    "XQA": (style.YELLOW, "XQA (FlashInfer)"),
    "cuDNN": (style.GREY, "cuDNN (no mask, contiguous K/V)"),
}
# Works, unit, timing, the panel's axis.
PANELS = (
    ("decode", "tb_per_s", "graph", "decode: K/V read, TB/s"),
    ("prefill", "tflop_per_s", "short", "prefill after a rest, TFLOP/s"),
    ("prefill", "tflop_per_s", "sustained", "prefill sustained, TFLOP/s"),
)


def bars(rows: list[Row], kind: str, unit: str, timing: str) -> dict[str, dict[str, float]]:
    """Figures by work and kernel; of ours, those on a shuffled table."""
    found: dict[str, dict[str, float]] = {}
    for work in works(rows, kind):
        for row in rows:
            right = row["work"] == work and row["timing"] == timing and row[unit]
            if right and row["table_order"] != "identity" and row["layers"]:
                found.setdefault(work, {})[row["kernel"]] = float(row[unit])
    return found


@style.styled
def draw(rows: list[Row]) -> Figure:
    """A panel each for decode, prefill after a rest, and prefill sustained; a row a work."""
    panels = [(kind, label, bars(rows, kind, unit, at)) for kind, unit, at, label in PANELS]
    panels = [panel for panel in panels if panel[2]]
    counts = [len(data) for *_, data in panels] or [1]
    figure = Figure(figsize=(6, 1 + 0.19 * sum(counts) + 0.4 * len(counts)), layout="constrained")
    figure.subplots(len(counts), 1, squeeze=False, height_ratios=counts)
    for axes, (kind, label, data) in zip(figure.axes, panels, strict=False):
        for place, figures in enumerate(data.values()):
            height = 0.8 / len(figures)
            for index, (kernel, value) in enumerate(figures.items()):
                at = place + (index - (len(figures) - 1) / 2) * height
                colour = COLOURS.get(kernel, (style.BLACK, ""))[0]
                axes.barh(at, value, 0.94 * height, color=colour, zorder=2)
        axes.set_yticks(range(len(data)), [style.plain(w.removeprefix(f"{kind} ")) for w in data])
        axes.set_ylim(len(data) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="y", visible=False)
        axes.tick_params("y", length=0)
    drawn = {kernel for *_, data in panels for figures in data.values() for kernel in figures}
    handles = [Patch(color=c, label=n) for kernel, (c, n) in COLOURS.items() if kernel in drawn]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    style.badge(figure, f"{rows[0]['device_name']}, one run; longer is better.")
    return figure


def main(words: Sequence[str] | None = None) -> None:
    """Write the figure, in the kind that its name ends in."""
    parser = argparse.ArgumentParser(prog="python -m bench.figure", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("figure", type=Path)
    parsed = parser.parse_args(words)
    with mpl.rc_context(style.RC):
        draw(read(parsed.csv)).savefig(parsed.figure, dpi=200)


if __name__ == "__main__":
    main()
