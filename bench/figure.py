"""Draw a result file: ``python -m bench.figure CSV FIGURE``; ours beside the peers."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.table import Row, read, works

COLOURS = {"ours": "#1b5e9e", "FA3": "#b0662c", "XQA": "#7a7a7a", "cuDNN": "#a8a8a8"}


def bars(rows: list[Row], kind: str, unit: str, timing: str) -> dict[str, dict[str, float]]:
    """Figures by work and kernel; of ours, those on a shuffled table."""
    found: dict[str, dict[str, float]] = {}
    for work in works(rows, kind):
        for row in rows:
            right = row["work"] == work and row["timing"] == timing and row[unit]
            if right and row["table_order"] != "identity" and row["layers"]:
                found.setdefault(work, {})[row["kernel"]] = float(row[unit])
    return found


def main() -> None:
    """Two panels: decode bandwidth, and sustained prefill."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(prog="python -m bench.figure", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("figure", type=Path)
    parsed = parser.parse_args()
    rows = read(parsed.csv)
    panels = (
        ("decode", "tb_per_s", "graph", "K/V read, TB/s"),
        ("prefill", "tflop_per_s", "short", "prefill, TFLOP/s (short)"),
    )
    canvas, axes = pyplot.subplots(1, len(panels), figsize=(13, 6), constrained_layout=True)
    for axis, (kind, unit, timing, label) in zip(axes, panels, strict=True):
        data = bars(rows, kind, unit, timing)
        for place, (_, figures) in enumerate(data.items()):
            for index, (kernel, value) in enumerate(figures.items()):
                at = place + (index - (len(figures) - 1) / 2) * 0.8 / len(figures)
                height = 0.75 / len(figures)
                axis.barh(at, value, height=height, color=COLOURS.get(kernel, "black"))
        axis.set_yticks(range(len(data)), [work.removeprefix(f"{kind} ") for work in data])
        axis.invert_yaxis()
        axis.set_xlabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS.values()]
    axes[0].legend(handles, COLOURS, frameon=False, loc="lower right")
    canvas.suptitle(f"{rows[0]['device_name']}, one run; longer is better")
    canvas.savefig(parsed.figure, dpi=150)


if __name__ == "__main__":
    main()
