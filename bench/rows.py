"""The result file: one row a timing, written as it is made, so that a crash loses nothing."""

from __future__ import annotations

import csv
import platform
import time
from pathlib import Path
from typing import Any

import torch
import triton

from bench.gate import Verdict
from bench.timing import Sample

COLUMNS = (
    "work, kernel, variant, sequences, context_tokens, query_tokens, q_heads, kv_heads, head_dim,"
    " kv_dtype, page_tokens, table_order, layers, timing, gate, error, lse_error, median_us,"
    " iqr_us, samples, tb_per_s, tflop_per_s, target, device_name, torch, triton, cuda, host, note"
).split(",")
COLUMNS = tuple(name.strip() for name in COLUMNS)


class Rows:
    """Appends to a CSV file and prints a line; remembers when it began."""

    def __init__(self, path: Path, budget_s: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", newline="")
        self.writer = csv.DictWriter(self.file, COLUMNS)
        self.writer.writeheader()
        self.begin, self.budget_s = time.monotonic(), budget_s
        gpu = torch.cuda.is_available()
        self.common = {
            "device_name": torch.cuda.get_device_name() if gpu else platform.machine(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda or "",
            "host": platform.platform(),
        }

    @property
    def elapsed_s(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.begin

    def spent(self) -> bool:
        """Whether the budget is used up."""
        return self.elapsed_s > self.budget_s

    def add(
        self,
        sample: Sample | None,
        verdict: Verdict | None,
        moved_bytes: float = 0.0,
        flops: float = 0.0,
        **fields: Any,  # noqa: ANN401
    ) -> None:
        """Write one row. A figure is written only where the gate passed, or there is none."""
        row = self.common | fields
        if verdict is not None:
            row["error"] = f"{verdict.error:.3e}"
            row["lse_error"] = f"{verdict.lse_error:.3e}"
            row["gate"] = f"failed: {verdict.failed}" if verdict.failed else "ok"
        if sample is not None and not (verdict and verdict.failed):
            row["median_us"] = f"{sample.median_us:.3f}"
            row["iqr_us"] = f"{sample.iqr_us:.3f}"
            row["samples"] = sample.count
            if moved_bytes:
                row["tb_per_s"] = f"{moved_bytes / sample.median_us / 1e6:.4f}"
            if flops:
                row["tflop_per_s"] = f"{flops / sample.median_us / 1e6:.2f}"
        self.writer.writerow(row)
        self.file.flush()
        shown = ("work", "kernel", "variant", "table_order", "timing", "gate", "median_us",
                 "tb_per_s", "tflop_per_s", "note")  # fmt: skip
        line = "  ".join(str(row[name]) for name in shown if row.get(name) not in (None, ""))
        print(f"{self.elapsed_s:6.1f}  {line}", flush=True)
