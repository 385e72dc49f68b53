"""Rows as evidence: the questions that the claims' rules ask of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from harness.rows import Row
from harness.sizes import GIB
from harness.summary import admitted, started

SUPPORTED, REFUTED, CONDITIONAL, UNDECIDED = "supported", "refuted", "conditional", "undecided"
MILLIONS_10 = 10_000_000
REPORTED_DEVICE_BYTES = 150_109_880_320  # an H200, as CUDA shows it
SAME_DEVICE = 0.05


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim.

    ``measured`` and ``reported`` are figures in ``unit``; ``rows`` are the rows that carry it.
    """

    verdict: str
    condition: str
    rows: tuple[Row, ...] = ()
    measured: float | str | None = None
    basis: str = ""


def undecided(what_to_run: str) -> Verdict:
    """Rows are missing."""
    return Verdict(UNDECIDED, f"run: {what_to_run}")


class Evidence:
    """The rows of one or several runs that say something about the report's 140 GiB GPU.

    Rows of another or a smaller device, of other ranks or workloads answer other questions
    (``every`` has them too), and a trial with a deliberate fault or without an answer none.
    """

    def __init__(self, rows: Iterable[Row]) -> None:
        self.every = [r for r in rows if started(r) and not r.get("fault")]
        self.rows = [r for r in self.every if on_reported_device(r) and as_reported(r)]

    def of(
        self,
        strategy: str,
        where: Callable[[Row], bool] = lambda row: True,
        **equal: Any,  # noqa: ANN401
    ) -> list[Row]:
        """Rows of a strategy whose columns, or strategy options, equal what is asked."""
        return [
            r
            for r in self.rows
            if r["strategy"] == strategy
            and r.get("read_weights") != "offload"  # another question, asked by its own rule
            and all(_value(r, k) == v for k, v in equal.items())
            and where(r)
        ]


def _value(row: Row, key: str) -> Any:  # noqa: ANN401
    return row[key] if key in row else option(row, key)


def option(row: Row, key: str) -> Any:  # noqa: ANN401
    """A key of the strategy, as it was configured."""
    return json.loads(row.get("strategy_options") or "{}").get(key)


def scale(row: Row) -> int:
    """Bytes of the modelled device per byte of the row."""
    return int(row.get("scale") or 1)


def on_reported_device(row: Row) -> bool:
    """Whether a trial had all of an H200, or of the scale model of one."""
    if row.get("capacity_bytes") is None:  # an engine that was started for real
        return row.get("device_name") == "NVIDIA H200"
    capacity = int(row["capacity_bytes"]) * scale(row)
    return abs(capacity / REPORTED_DEVICE_BYTES - 1) < SAME_DEVICE


def as_reported(row: Row) -> bool:
    """Whether a trial is the report's: FP8 K/V, heads over 8 ranks, sequences of full context."""
    return (
        row.get("kv_dtype") in (None, "fp8_e4m3")
        and int(row.get("emulated_ranks") or 8) == 8
        and int(row.get("context_ranks") or 1) == 1
        and row.get("workload") in (None, "single")
    )


def token_kib(row: Row) -> float:
    """K/V KiB a token on the modelled device."""
    return int(row["kv_bytes_per_token"]) * scale(row) / 1024


def gib_of(row: Row, column: str) -> float:
    """A byte column in GiB of the modelled device."""
    return int(row.get(column) or 0) * scale(row) / GIB


def starts(row: Row) -> bool:
    """Whether the trial reached ``ready``."""
    return started(row) == "ok"


def admits(row: Row) -> bool:
    """Whether a request of the full context was accepted."""
    return admitted(row) == "ok"


def whole_context(row: Row) -> bool:
    """A static pool for the whole context, the device's full capacity, one sequence."""
    return row.get("mem_fraction") == 1.0 and row["sequences"] == 1


def basis_of(rows: Iterable[Row]) -> str:
    """What rows rest on, in words; names an engine's version where there is one."""
    words = []
    for row in rows:
        if row.get("engine_version"):
            word = f"measured on the engine, version {row['engine_version']}"
        elif row.get("emulated_version"):
            word = (
                f"emulated from {row['strategy']} {row['emulated_version']}'s source, "
                f"{'allocated for real' if row['basis'] == 'measured' else 'on the scale model'}"
            )
        else:
            word = {"measured": "measured here", "scale_model": "scale model"}.get(
                str(row["basis"]), str(row["basis"])
            )
        if word not in words:
            words.append(word)
    return "; ".join(words)
