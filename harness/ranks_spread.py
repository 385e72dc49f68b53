"""What the ranks of an arm's trials come to: largest peak, smallest OOM, slowest rank, spread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from harness.columns import OF_ALL_RANKS
from harness.phases import START_PHASES
from harness.ranks_summary import ORDERLY, by_trial, failed_of
from harness.rows import Row

SLOWEST = ("attention_decode_step_ms", *OF_ALL_RANKS, "startup_seconds")
SPREAD = ("peak_device_bytes", "nccl_bytes", "resident_tokens", *SLOWEST)
Found = dict[str, Any]


def rank_spread(rows: Iterable[Row]) -> Found:
    """The extremes over every rank of every trial, and how far ranks of one trial lie apart.

    Returns
    -------
    dict
        Empty for single ranks; else ``world_size``, ``failed_ranks`` (who ended trials), and

        * ``largest_peak``: bytes of the device, as ``peak_device_bytes``;
        * ``smallest_oom``: of ``startup`` the shortest context (tokens) with which a rank did not
          start, of ``resident`` the fewest tokens that a rank held when it was refused more;
        * ``slowest``: each time's longest, in milliseconds or seconds as its name says;
        * ``spread``: each figure's ``smallest`` and ``largest`` in the trial whose ranks lie
          farthest apart. Only of trials that are ok: elsewhere ranks differ by how far they had
          come when one ended the others.

        Each names its ``trial_id``, the extremes their ``rank`` as well; what no trial has is left
        out.
    """
    trials = [own for own in by_trial(rows).values() if len(own) > 1]
    if not trials:
        return {}
    every = [r for own in trials for r in own]
    ended = [failed for own in trials if (failed := failed_of(own)) is not None]
    refused = [r for r in ended if r["status"] in ORDERLY]
    starting = [r for r in refused if r.get("oom_phase") in START_PHASES]
    filling = [r for r in refused if r.get("oom_phase") == "fill"]
    alike = [own for own in trials if all(r["status"] == "ok" for r in own)]
    return {
        "world_size": max(len(own) for own in trials),
        "failed_ranks": sorted({int(r["rank"]) for r in ended}),
        "largest_peak": _extreme(max, every, "peak_device_bytes"),
        "smallest_oom": _known(
            startup=_extreme(min, starting, "context_tokens"),
            resident=_extreme(min, filling, "resident_tokens", "resident_tokens_all_ranks"),
        ),
        "slowest": _known(**{c: _extreme(max, every, c) for c in SLOWEST}),
        "spread": _known(**{c: _widest(alike, c) for c in SPREAD}),
    }


def _known(**found: Found) -> Found:
    return {name: one for name, one in found.items() if one}


def _extreme(choose: Callable[..., Any], rows: list[Row], column: str, *more: str) -> Found:
    """The row in which a figure is largest or smallest: the figure, its rank, its trial."""
    row = choose(
        (r for r in rows if r.get(column) is not None), key=lambda r: r[column], default=None
    )
    if row is None:
        return {}
    told = {c: row[c] for c in (column, *more) if row.get(c) is not None}
    return told | {"rank": int(row["rank"]), "trial_id": row["trial_id"]}


def _widest(trials: list[list[Row]], column: str) -> Found:
    values = [[r[column] for r in own if r.get(column) is not None] for own in trials]
    pairs = [(v, own) for v, own in zip(values, trials, strict=True) if len(v) > 1]
    if not pairs:
        return {}
    widest, own = max(pairs, key=lambda pair: max(pair[0]) - min(pair[0]))
    return {"smallest": min(widest), "largest": max(widest), "trial_id": own[0]["trial_id"]}
