"""What FP8 K/V buy and cost, in a table: bytes a token, decode, and two errors."""

from __future__ import annotations

import pandas as pd

from harness.runs import trials
from harness.series import scale, series
from harness.tabular import Table, figure_of, tokens


def precision_table(rows: pd.DataFrame) -> Table:
    """Return a line a model, K/V dtype and timed length of ``experiment=precision``, of medians.

    Both errors are decode's relative RMS against float64: on the stored K/V, and on the BF16 values
    before the K/V dtype rounded them. Rows of earlier versions know neither; the largest error of
    any kernel on the stored K/V they do.
    """
    own = trials(rows)
    own = own[own["experiment"].eq("precision") & own["status"].eq("ok")]
    own = own[own["attention_decode_tokens_per_second"].gt(0)]
    lines = []
    for one in series(own, ("model", "kv_dtype"), leave=("fill",)):
        for length, part in one.rows.groupby("resident_tokens"):
            errors = ("gate_error", "decode_gate_error", "unrounded_decode_error")
            lines.append(
                (
                    part["model"].iloc[0],
                    part["kv_dtype"].iloc[0],
                    figure_of((part["kv_bytes_per_token"] * scale(part)).median() / 1024, 3),
                    tokens(length),
                    figure_of(part["attention_decode_tokens_per_second"].median(), 3),
                    *(figure_of(part[name].median(), 3) for name in errors),
                )
            )
    columns = (
        "model",
        "K/V",
        ">KiB a token",
        ">resident",
        ">decode tok/s",
        ">kernels' error",
        ">decode's error",
        ">with rounding",
    )
    notes = (
        "Errors are relative RMS against float64. Kernels': the worst of decode, prefill and "
        "needles, on the stored K/V, which holds no rounding of K and V. Decode's: with random "
        "queries alone; with rounding: the same answers against the BF16 K and V before the K/V "
        "dtype rounded them. Synthetic normal values; queries have the K/V dtype in both.",
    )
    return Table("What FP8 K/V cost in precision", columns, tuple(lines), notes)
