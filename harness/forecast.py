"""What the planner says of a configuration: a row's ``predicted_*`` columns, and where to look.

The planner itself (:mod:`harness.planner`) takes plain numbers; this module makes them from
settings, and holds a measured row against the prediction, item by item.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from harness.cell import Cell
from harness.lengths import targets
from harness.off_by import OFF_BY, off_by
from harness.offload import device_weights
from harness.options import engine_model
from harness.planner import OomPoints, Prediction, oom_points, predict
from harness.planner_engines import ENGINES
from harness.planner_spec import (
    CUDA_GRANULARITY_BYTES,
    HOST_GRANULARITY_BYTES,
    PlanSpec,
)
from harness.rows import Row
from harness.settings import Settings
from harness.sizes import BadValue, gib, tokens_text
from harness.summary import ENDED
from harness.workspace import workspace_items

MAX_CONTEXT_TOKENS = 1 << 40


def plan_spec(
    settings: Settings,
    context_tokens: int | None = None,
    fill: float = 1.0,
    context_index: int = 0,
) -> PlanSpec:
    """The numbers that the planner needs, in the device's own bytes (scaled on the host)."""
    scale = settings.scale
    hardware = settings.hardware
    context = settings.context_tokens if context_tokens is None else context_tokens
    return PlanSpec(
        strategy=settings.strategy,
        options=dict(settings.options),
        model=settings.kv_model(),
        engine_model=engine_model(settings) if settings.strategy in ENGINES else None,
        context_tokens=settings.local_tokens(context, context_index),
        fill=fill,
        sequences=settings.sequences,
        capacity_bytes=settings.device_bytes,
        context_bytes=-(-hardware.context_bytes // scale),
        nccl_bytes=-(-settings.parallel.nccl_bytes // scale),
        weights_bytes=device_weights(settings)[1],
        workspace_items=tuple((n, -(-b // scale)) for n, b in workspace_items(settings)),
        scale=scale,
        device_total_bytes=hardware.total_bytes,
        hopper="H100" in hardware.device_name or "H200" in hardware.device_name,
        granularity_bytes=HOST_GRANULARITY_BYTES if settings.on_host else CUDA_GRANULARITY_BYTES,
    )


def cell_spec(cell: Cell) -> PlanSpec:
    """What the planner is asked of a cell that fills its sequences."""
    settings = cell.settings
    spec = plan_spec(settings, cell.context_tokens, cell.fill, cell.context_index)
    if settings.workload["kind"] == "batch" and cell.purpose == "point":
        return dataclasses.replace(spec, lengths=tuple(targets(cell)))
    return spec


def predict_cell(cell: Cell) -> Prediction:
    """How a cell's trial would go; ``bracket`` cells are not filled, nor are traces foreseen."""
    spec = cell_spec(cell)
    if cell.purpose == "bracket" or cell.settings.accounts_only:
        spec = spec.filled(0.0)
    if cell.purpose == "resident":
        spec = dataclasses.replace(spec, filled_sequences=1)
    if cell.purpose != "bracket":
        return predict(spec)
    # No sequence is opened: nothing is committed ahead of one, and none is refused.
    if "growth" in spec.options:
        spec = spec.with_options(growth="sync")
    made = predict(spec)
    return dataclasses.replace(made, outcome="ok") if made.started else made


_COMPLAINT = re.compile(
    r"(?:\w+ )?(?P<key>\w+)=(?P<value>.*?): (?:not allowed; allowed: |allowed are )?(?P<allowed>.*)"
)


def check(settings: Settings) -> None:
    """Ask the planner once, so that a flag that does not exist is said before anything runs.

    Raises
    ------
    BadValue
        Names the strategy's key, its value and what is allowed.
    """
    try:
        for context in settings.contexts:
            predict(plan_spec(settings, context))
    except BadValue:
        raise
    except ValueError as error:
        said = _COMPLAINT.fullmatch(str(error))
        if said is None:
            raise BadValue("strategy", settings.strategy, str(error)) from None
        raise BadValue(f"strategy.{said['key']}", said["value"], said["allowed"]) from None


def with_prediction(row: Row, cell: Cell) -> Row:
    """``row`` with its ``predicted_*`` columns.

    ``predicted_off_by`` names what is off (:mod:`harness.off_by`), and what of a trace or churn
    formulas do not know; it is empty where a trial of ours died, and of an engine that crashed it
    tells no more than the peak: what it held then, nobody knows.
    """
    made = predict_cell(cell)
    if cell.timing and made.outcome == "ok":
        peak = made.predicted_peak_bytes + cell.settings.hardware.cuda_graph_bytes
        made = dataclasses.replace(made, predicted_peak_bytes=peak)
    row = row | {
        "predicted_tables_bytes": made.predicted_tables_bytes,
        "predicted_kv_bytes": made.predicted_kv_bytes,
        "predicted_peak_bytes": made.predicted_peak_bytes,
        "predicted_status": made.outcome,
    }
    unknown = ""
    if cell.settings.accounts_only and made.started:
        row, made, unknown = _of_workload(row, cell, made)
    ended, engine_died = row["status"] in ENDED, bool(row.get("engine_version"))
    if row.get("peak_device_bytes") is None or not (ended or engine_died):
        return row
    named = off_by(row, made) if ended else []
    peak, foreseen = int(row["peak_device_bytes"]), row["predicted_peak_bytes"]
    if foreseen is not None and not named:
        named = [f"peak {peak - foreseen:+d}"] if abs(peak - foreseen) > OFF_BY * peak else []
    return row | {"predicted_off_by": "; ".join([*named, unknown] if unknown else named) or None}


def _of_workload(row: Row, cell: Cell, made: Prediction) -> tuple[Row, Prediction, str]:
    """The row and the prediction of a trace or churn that starts, and what is not foreseen."""
    made = dataclasses.replace(made, outcome="ok")
    row = row | {"predicted_status": "ok"}
    if cell.settings.strategy != "paged":
        return row, made, ""
    from harness.forecast_workload import foresee

    found = foresee(cell, plan_spec(cell.settings, cell.context_tokens, 0.0), made)
    row |= {"predicted_kv_bytes": found.kv_bytes, "predicted_peak_bytes": found.peak_bytes}
    held = found.kv_bytes if found.kv_bytes is not None else row.get("kv_committed_bytes") or 0
    return row, dataclasses.replace(made, predicted_kv_bytes=held), found.unknown


def points(settings: Settings) -> OomPoints:
    """The three OOM points as the planner sees them."""
    return _points(_Key(settings))


@dataclasses.dataclass(frozen=True)
class _Key:
    """Settings as a cache key: equal content, equal answer."""

    settings: Settings

    def __hash__(self) -> int:
        return hash(repr(self.settings))


@functools.lru_cache(maxsize=64)
def _points(key: _Key) -> OomPoints:
    return oom_points(plan_spec(key.settings))


def startup_guess(settings: Settings) -> int:
    """Largest context that the planner expects to start, in tokens over all ranks."""
    return settings.all_tokens(points(settings).startup.ok or 1)


def admit_guess(settings: Settings) -> int:
    """Largest context that the planner expects to be admitted."""
    return settings.all_tokens(points(settings).admit.ok or 1)


def context_beyond_capacity(settings: Settings) -> int:
    """A context, over all ranks, that a trial cannot fill; the largest that starts if none fails.

    A tenth above what the planner expects a rank to hold, so that tables stay near their size at
    the capacity.
    """
    context = settings.context_tokens
    made = predict(plan_spec(settings, context))
    while made.started and made.outcome == "ok" and context < MAX_CONTEXT_TOKENS:
        context *= 2
        made = predict(plan_spec(settings, context))
    if not made.started:
        return startup_guess(settings)
    return settings.all_tokens(made.resident_tokens + made.resident_tokens // 10 + 1)


def largest_ok_context(settings: Settings) -> int:
    """The largest context of the sweep that the planner expects to be filled wholly."""
    good = [c for c in settings.contexts if predict(plan_spec(settings, c)).outcome == "ok"]
    return max(good, default=0)


def sentence(settings: Settings, strategy: str) -> str:
    """One line: what the planner expects of another strategy, with its default keys."""
    from harness.validate import compose_settings

    words = [w for w in settings.overrides if not w.startswith("strategy")]
    words = [w for w in words if not w.startswith("experiment=")]
    other = compose_settings([*words, f"strategy={strategy}"], planning=True)
    other = dataclasses.replace(other, hardware=settings.hardware)
    spec = plan_spec(other)
    made = predict(spec)
    found = oom_points(spec)
    context = tokens_text(other.context_tokens)
    peak = gib(made.predicted_peak_bytes * other.scale)
    if not made.started:
        asked = gib(made.requested_bytes * other.scale)
        free = gib(made.free_bytes * other.scale)
        return (
            f"{strategy} does not start at {context}: {made.allocation} asks {asked}, {free} free; "
            f"largest context that starts: {found.startup.ok or 0:,} tokens"
        )
    if made.outcome == "ok":
        return f"{strategy} starts at {context} and holds it whole, peak {peak}"
    return (
        f"{strategy} starts at {context}; filling it ends in {made.outcome} at "
        f"{made.resident_tokens:,} tokens, peak {peak}"
    )
