"""Rows of engines, as the claims' rules ask for them: their flags, their version, how real."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from harness.rows import Row


def flags_of(row: Row, *besides: str) -> dict[str, Any]:
    """Flags that are not at their default, but for some; pages of one token are the default."""
    options = json.loads(row.get("strategy_options") or "{}")
    return {
        k: v
        for k, v in sorted(options.items())
        if k not in ("version", *besides) and v not in (None, False) and (k, v) != ("page_size", 1)
    }


def default_flags(row: Row) -> bool:
    """Whether an engine was started without a flag."""
    return not flags_of(row)


def version_of(row: Row) -> tuple[Any, Any]:
    """What is emulated, or was started."""
    return row.get("emulated_version"), row.get("engine_version")


def best_first(rows: Iterable[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Rows of the engines themselves, of their emulations, and all: the best evidence first."""
    own = list(rows)
    real = [r for r in own if r.get("engine_version")]
    return real, [r for r in own if not r.get("engine_version")], own
