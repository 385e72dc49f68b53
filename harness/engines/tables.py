"""The tables of engines that were started, from summary.json's ``pairs`` and ``engine_brackets``.

A folder may come from a stranger: whatever is missing or odd is shown as empty.
"""

from __future__ import annotations

from typing import Any

from harness.runs import clean, dicts, lookup
from harness.sizes import GIB
from harness.tabular import EMPTY, Table, tokens

PAIR_COLUMNS = (
    "engine",
    "model",
    ">context",
    "flags",
    "itself",
    "emulated",
    "planned",
    ">pool tokens",
    ">at ready, GiB",
    "farthest item",
    "agrees",
    "trial",
)


def pairs(summary: dict[str, Any]) -> Table:
    """Return a line a start: how it, its emulation and the planner ended, and what differs most."""
    lines, anchors = [], []
    for pair in dicts(summary, "pairs"):
        lines.append(
            (
                engine_name(pair),
                text(pair, "model"),
                _context(pair),
                flags(pair),
                *(_ended(pair, who) for who in ("real", "emulated", "planned")),
                _count(item(pair, "pool tokens")),
                _gib(item(pair, "whole at ready")),
                _farthest(pair),
                yes(lookup(pair, "agree")),
                text(pair, "real_trial"),
            )
        )
        anchors.append(text(pair, "real_trial"))
    notes = (
        "Agrees: all three end alike, and every figure is within 1 % of the engine's (or within "
        "the 2 MiB that a driver rounds a tensor up to).",
    )
    title = "Engines beside their emulations"
    return Table(title, PAIR_COLUMNS, tuple(lines), notes, tuple(anchors))


def items(summary: dict[str, Any]) -> Table:
    """Return a line a figure of every start: real, emulated and planned."""
    lines, anchors = [], []
    for pair in dicts(summary, "pairs"):
        for one in dicts(pair, "items"):
            unit = text(one, "unit")
            lines.append(
                (
                    engine_name(pair),
                    text(pair, "model"),
                    _context(pair),
                    flags(pair),
                    text(one, "item"),
                    *(_amount(lookup(one, who), unit) for who in ("real", "emulated", "planned")),
                    _share(lookup(one, "emulated_off")),
                    _share(lookup(one, "planned_off")),
                    yes(lookup(one, "agree")),
                )
            )
            anchors.append(text(pair, "real_trial"))
    columns = (*PAIR_COLUMNS[:4], "item", ">itself", ">emulated", ">planned",
               ">emulated off", ">planned off", "agrees")  # fmt: skip
    notes = ("GiB, or tokens. Pinned host memory is planned, not allocated by an emulation.",)
    return Table(
        "Engines beside their emulations, item by item",
        columns,
        tuple(lines),
        notes,
        tuple(anchors),
    )


def brackets(summary: dict[str, Any]) -> Table:
    """Return a line a start-up bracket: the engine's, its emulation's, the planner's point."""

    def both(one: dict[str, Any]) -> str:
        return " to ".join(_count(lookup(one, "emulated", end)) for end in ("ok", "not_ok"))

    lines = tuple(
        (
            engine_name(one),
            text(one, "model"),
            flags(one),
            _count(lookup(one, "real", "ok")),
            _count(lookup(one, "real", "not_ok")),
            both(one),
            _count(lookup(one, "planned")),
            _share(lookup(one, "planned_off")),
            _count(lookup(one, "starts")),
            yes(lookup(one, "agree")),
        )
        for one in dicts(summary, "engine_brackets")
    )
    columns = ("engine", "model", "flags", ">starts at", ">not at", ">emulated", ">planned",
               ">planned off", ">starts made", "agrees")  # fmt: skip
    notes = (
        "Tokens of context; the planner's point against the middle of the engine's bracket (2 %).",
    )
    return Table("Start-up brackets of the engines", columns, lines, notes)


def engine_tables(summary: dict[str, Any]) -> list[Table]:
    """Return every table of engines that has a line."""
    return [t for t in (pairs(summary), brackets(summary), items(summary)) if t.rows]


def engine_name(pair: dict[str, Any]) -> str:
    """Engine and version."""
    return " ".join(p for p in (text(pair, "strategy"), text(pair, "engine_version")) if p != EMPTY)


def flags(pair: dict[str, Any]) -> str:
    """The flags that were set, as ``key=value``."""
    found = lookup(pair, "flags")
    if not isinstance(found, dict) or not found:
        return "defaults"
    return " ".join(f"{clean(k)}={clean(v)}" for k, v in found.items())


def item(pair: dict[str, Any], name: str) -> object:
    """The engine's own figure of an item; None where there is none."""
    return next((lookup(i, "real") for i in dicts(pair, "items") if i.get("item") == name), None)


def text(data: dict[str, Any], key: str) -> str:
    """A text of untrusted JSON."""
    return clean(lookup(data, key, default="") or "") or EMPTY


def yes(value: object) -> str:
    """``yes``, ``no`` or empty."""
    return {True: "yes", False: "no"}.get(value, EMPTY) if isinstance(value, bool) else EMPTY


def number(value: object) -> float | None:
    """A number of untrusted JSON; None for anything else."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _context(pair: dict[str, Any]) -> str:
    found = number(lookup(pair, "context_tokens"))
    return EMPTY if found is None else tokens(found)


def _ended(pair: dict[str, Any], who: str) -> str:
    status, failing = lookup(pair, "status", who), lookup(pair, "failing", who)
    if not status:
        return EMPTY
    return clean(status) + (f": {clean(failing)}" if failing else "")


def _amount(value: object, unit: str) -> str:
    return _count(value) if unit == "tokens" else _gib(value, 3)


def _count(value: object) -> str:
    found = number(value)
    return EMPTY if found is None else f"{found:,.0f}"


def _gib(value: object, digits: int = 2) -> str:
    found = number(value)
    return EMPTY if found is None else f"{found / GIB:.{digits}f}"


def _share(value: object) -> str:
    found = number(value)
    return EMPTY if found is None else f"{100 * found:+.2f} %"


def _farthest(pair: dict[str, Any]) -> str:
    """The item whose emulation or plan lies farthest from the engine's figure."""
    found = [
        (abs(off), text(one, "item"), off)
        for one in dicts(pair, "items")
        for off in (number(lookup(one, k)) for k in ("emulated_off", "planned_off"))
        if off is not None
    ]
    if not found:
        return EMPTY
    _, name, off = max(found)
    return f"{name} {_share(off)}"
