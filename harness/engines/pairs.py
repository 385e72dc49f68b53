"""Pairs: what an engine itself held, beside its emulation and the planner with the same flags.

A figure agrees when it is within 1 % of the engine's (or within what a driver rounds a tensor up
to); a start-up bracket when the planner's point is within 2 % of its middle.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from harness import forecast
from harness.cell import Cell
from harness.planner_spec import Prediction
from harness.rows import Row
from harness.settings import Settings
from harness.summary import bracket, started

AGREES = 0.01
BRACKET_AGREES = 0.02
GRANULARITY_BYTES = 2 << 20
HIDDEN = ("version", "page_size", "block_size")  # options that are no choice of the experiment
# In the order in which they are made; other items of a start follow.
ITEMS = (
    "weights rope_cos_sin req_to_token block_tables input_block_tables all_token_ids kv_pool "
    "free_slots page_table strided_indices decode_cuda_graphs piecewise_cuda_graphs cuda_graphs"
).split()
FREE, ASKED, WHOLE, TOKENS = "free before it", "asked for", "whole at ready", "pool tokens"


def pairs_of(
    rows: Sequence[Row],
    timeline: Iterable[Row],
    samples: Iterable[Row],
    settings: Sequence[Settings],
) -> list[dict[str, Any]]:
    """A pair for every start of an engine, in the order of the experiment.

    Parameters
    ----------
    rows, timeline, samples : rows of trials.csv, of timeline.csv, and of samples.jsonl
    settings : sequence of Settings
        The arms, for what the planner says of them.

    Returns
    -------
    list of dict
        As summary.json holds them under ``pairs``.
    """
    by_id = {str(r["trial_id"]): r for r in rows}
    events = _by_trial(timeline)
    starts = {str(s["trial_id"]): s for s in samples if s.get("what") == "engine_start"}
    found: list[dict[str, Any]] = []
    seen: set[str] = set()
    for arm in settings:
        if not arm.engine:
            continue
        for cell in _cells(arm, rows):
            real = by_id.get(cell.trial_id)
            if real is None or cell.trial_id in seen:
                continue
            seen.add(cell.trial_id)
            twin = replace(cell, real=False)
            emulated = by_id.get(twin.trial_id)
            start = starts.get(cell.trial_id, {})
            held = events.get(twin.trial_id, [])
            found.append(_pair(cell, real, start, emulated, held, forecast.predict_cell(twin)))
    return found


def _cells(arm: Settings, rows: Sequence[Row]) -> list[Cell]:
    """Every start that an arm may have made, at the contexts that there are."""
    contexts: Iterable[int] = arm.contexts
    purpose = "point"
    if arm.brackets:
        contexts = dict.fromkeys(int(r["context_tokens"]) for r in rows)
        purpose = "bracket"
    return [
        Cell(arm, context, 0.0, purpose=purpose, timing=False, repeat=repeat, real=True)
        for context in contexts
        for repeat in range(arm.repeats)
    ]


def _by_trial(timeline: Iterable[Row]) -> dict[str, list[Row]]:
    out: dict[str, list[Row]] = {}
    for event in timeline:
        out.setdefault(str(event["trial_id"]), []).append(event)
    return out


def _pair(
    cell: Cell, real: Row, start: Row, emulated: Row | None, held: list[Row], planned: Prediction
) -> dict[str, Any]:
    options = {k: v for k, v in json.loads(real["strategy_options"] or "{}").items() if v}
    status = {
        "real": real["status"],
        "emulated": emulated["status"] if emulated else None,
        "planned": planned.outcome,
    }
    failing = {
        "real": real.get("oom_allocation"),
        "emulated": emulated.get("oom_allocation") if emulated else None,
        "planned": planned.allocation or None,
    }
    ended_alike = _alike(status) and _alike(failing)
    items = _items(real, start, emulated, held, planned)
    return {
        "strategy": real["strategy"],
        "model": real["model"],
        "context_tokens": cell.context_tokens,
        "purpose": cell.purpose,
        "flags": {k: v for k, v in options.items() if k not in HIDDEN},
        "engine_version": real.get("engine_version"),
        "real_trial": cell.trial_id,
        "emulated_trial": emulated["trial_id"] if emulated else None,
        "status": status,
        "failing": failing,
        "where": _where(start),
        "items": items,
        "agree": ended_alike and all(i["agree"] for i in items),
    }


def _where(start: Row) -> str | None:
    """The engine's own source line that failed."""
    failed = start.get("failed")
    return str(failed["where"]) if isinstance(failed, dict) else None


def _alike(found: dict[str, Any]) -> bool:
    """Whether all that answered said the same; the emulation may not have been run."""
    said = {found["real"], found["planned"]}
    if found["emulated"] is not None:
        said.add(found["emulated"])
    return len(said) == 1


def _items(
    real: Row, start: Row, emulated: Row | None, held: list[Row], planned: Prediction
) -> list[dict[str, Any]]:
    """Every figure of a start that there is, each real, emulated and planned."""
    own: dict[str, int] = {str(i["name"]): int(i["bytes"]) for i in start.get("items") or []}
    rounding = {
        str(i["name"]): int(i["count"]) * GRANULARITY_BYTES for i in start.get("items") or []
    }
    by_formula = {i.allocation: i.nbytes for i in planned.items if not i.failed}
    allocated = _sums(held)
    failing = real.get("oom_allocation")
    names = [n for n in ITEMS if n in own] + [n for n in own if n not in ITEMS]
    out = [
        _figure(name, "bytes", own[name], allocated.get(name), by_formula.get(name), rounding[name])
        for name in names
        if name != failing
    ]
    ready = start.get("ready")
    if isinstance(ready, dict):
        pool = _tokens(real, allocated)
        out.append(_figure(TOKENS, "tokens", ready["pool_tokens"], pool, planned.pool_tokens))
        used, whole = ready["device_used_bytes"], planned.held_bytes
        out.append(_figure(WHOLE, "bytes", used, _at_ready(held), whole, GRANULARITY_BYTES))
    elif _asked_at_once(real):
        asked = emulated.get("oom_requested_bytes") if emulated else None
        free = emulated.get("oom_free_bytes") if emulated else None
        out.append(
            _figure(ASKED, "bytes", real["oom_requested_bytes"], asked, planned.requested_bytes)
        )
        out.append(_figure(FREE, "bytes", real["oom_free_bytes"], free, planned.free_bytes))
    return out


def _asked_at_once(real: Row) -> bool:
    """Whether a start failed by one thing that it asked for; graphs take thousands of pieces."""
    whole = not str(real.get("oom_allocation")).endswith("_graphs")
    refused = real["status"] in ("oom", "refused") and real.get("oom_requested_bytes") is not None
    return whole and refused


def _sums(events: list[Row]) -> dict[str, int]:
    """Bytes that an emulation allocated under each name, whatever it gave back later."""
    out: dict[str, int] = {}
    for event in events:
        nbytes = int(event.get("event_bytes") or 0)
        if nbytes > 0:
            name = str(event["allocation"])
            out[name] = out.get(name, 0) + nbytes
    return out


def _at_ready(events: list[Row]) -> int | None:
    """Bytes in use on the device once an emulation is ready."""
    found = [e for e in events if e["allocation"] == "ready"]
    return int(found[-1]["device_used_bytes"]) if found else None


def _tokens(real: Row, allocated: dict[str, int]) -> int | None:
    """Tokens of the emulated pool; SGLang's has a page more than it serves."""
    pool, token = allocated.get("kv_pool"), int(real["kv_bytes_per_token"])
    if pool is None:
        return None
    return pool // token - (1 if real["strategy"] == "sglang" else 0)


def _figure(
    name: str, unit: str, real: int, emulated: int | None, planned: int | None, rounding: int = 0
) -> dict[str, Any]:
    """One figure, and whether the others lie within 1 % of the engine's, or ``rounding``."""
    others = [o for o in (emulated, planned) if o is not None]
    off = {"emulated": _off(real, emulated), "planned": _off(real, planned)}
    return {
        "item": name,
        "unit": unit,
        "real": real,
        "emulated": emulated,
        "planned": planned,
        "emulated_off": off["emulated"],
        "planned_off": off["planned"],
        "agree": bool(others)
        and all(abs(o - real) <= max(AGREES * real, rounding) for o in others),
    }


def _off(real: int, other: int | None) -> float | None:
    """How far a figure lies from the engine's, as a share of it."""
    if other is None or real <= 0:
        return None
    return round(other / real - 1, 5)


def brackets_of(rows: Sequence[Row], settings: Sequence[Settings]) -> list[dict[str, Any]]:
    """Start-up brackets of the engines, beside the emulation's ends and the planner's point."""
    found = []
    for arm in settings:
        if not arm.engine or not arm.brackets:
            continue
        by_id = {str(r["trial_id"]): r for r in rows}
        real: list[tuple[int, str]] = []
        emulated: list[tuple[int, str]] = []
        for cell in _cells(arm, rows):
            for one, answers in ((cell, real), (replace(cell, real=False), emulated)):
                row = by_id.get(one.trial_id)
                if row is not None:
                    answers.append((int(row["context_tokens"]), started(row)))
        if not real:
            continue
        closed, guess = bracket(real), forecast.startup_guess(arm)
        versions = [r["engine_version"] for r in rows if r.get("engine_version")]
        found.append(
            {
                "strategy": arm.strategy,
                "model": arm.model.name,
                "flags": {k: v for k, v in arm.options.items() if v and k not in HIDDEN},
                "engine_version": arm.options["version"] if versions else None,
                "real": closed,
                "emulated": bracket(emulated),
                "planned": guess,
                "planned_off": _middle_off(closed, guess),
                "starts": len(real),
                "agree": _bracket_agrees(closed, bracket(emulated), guess),
            }
        )
    return found


def _middle_off(closed: dict[str, Any], guess: int) -> float | None:
    if closed["ok"] is None or closed["not_ok"] is None:
        return None
    middle = (int(closed["ok"]) + int(closed["not_ok"])) / 2
    return round(guess / middle - 1, 5)


def _bracket_agrees(real: dict[str, Any], emulated: dict[str, Any], guess: int) -> bool:
    off = _middle_off(real, guess)
    alike = emulated["ok"] is None and emulated["not_ok"] is None
    alike = alike or all(emulated[k] == real[k] for k in ("ok", "not_ok", "limited_by"))
    return off is not None and abs(off) <= BRACKET_AGREES and alike
