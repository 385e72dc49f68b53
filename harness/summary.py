"""summary.json: the OOM brackets, peaks and decode rates of a run, from its rows alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from typing import Any

from harness.phases import START_PHASES
from harness.ranks_spread import rank_spread
from harness.ranks_summary import held_tokens, per_trial
from harness.rows import Row, own_crash
from harness.sizes import GIB, MIB, gib

SCHEMA = 1
# What tells two arms of one strategy apart.
ARM_KEYS = (
    "strategy arm engine_version model scale strategy_options emulated_ranks context_ranks "
    "sequences kv_dtype page_tokens chunk_bytes arena table_order capacity_bytes world_size "
    "parallel workload hybrid read_weights fault"
).split()
ENDED = ("ok", "oom", "refused", "invalid")

Bracket = dict[str, Any]


def started(row: Row) -> str:
    """``ok`` when the trial reached ``ready``; else ``oom``, ``refused``, or an engine's ``crash``.

    ``""`` when that is unknown, since the trial died.
    """
    if row["status"] not in ENDED and not own_crash(row):
        return ""
    if row["status"] in ("ok", "invalid") or row["oom_phase"] not in START_PHASES:
        return "ok"
    return str(row["status"])


def admitted(row: Row) -> str:
    """``ok`` when a request of the full context was accepted at ``ready``."""
    start = started(row)
    if start != "ok" or row.get("admitted") is None:
        return start if start != "ok" else ""
    return "ok" if row["admitted"] == "true" else "refused"


def arms(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by arm, named by its strategy and its own name, or what tells it from the others."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(k) for k in ARM_KEYS), []).append(row)
    named: dict[str, list[Row]] = {}
    for key, own in groups.items():
        named[_label(key, list(groups))] = own
    return named


def _label(key: tuple[Any, ...], every: list[tuple[Any, ...]]) -> str:
    strategy = key[0]
    model, itself = ARM_KEYS.index("model"), ARM_KEYS.index("engine_version")
    every = [k for k in every if k[itself] == key[itself]]
    rivals = [k for k in every if k[0] == strategy and k[model] == key[model]]
    parts, same = [str(strategy)], rivals
    for i, name in enumerate(ARM_KEYS[1:], start=1):
        if name == "arm":
            if key[i]:  # a name says it all; else only those without one are rivals
                every = rivals = [k for k in every if k[0] == strategy and k[i] == key[i]]
                parts.append(str(key[i]))
            same = rivals = [k for k in rivals if k[i] == key[i]]
            continue
        if name == "engine_version":  # an engine that was started is no rival of an emulation
            parts.append(f"itself {key[i]}" if key[i] else "")
            continue
        # A model is named as soon as the run has two, so that every arm of it reads alike.
        field = every if name == "model" else same
        values = [k[i] for k in rivals]
        words = {value: _named(name, value, values) for value in {k[i] for k in field}}
        if len(set(words.values())) > 1:
            # Rivals are those with the same words: many scales are all called a scale model.
            parts.append(words[key[i]])
            same = [k for k in same if words[k[i]] == parts[-1]]
    return ", ".join(p for p in parts if p)


def _named(name: str, value: Any, every: list[Any]) -> str:  # noqa: ANN401
    if name == "model":
        return str(value)
    if name == "scale":
        return "scale model" if (value or 1) > 1 else "device"
    if name == "strategy_options":
        return _options_that_differ(value, every)
    if name.endswith("_bytes") and value:
        size = gib(value) if value >= GIB else f"{value / MIB:.4g} MiB"
        return f"{name.removesuffix('_bytes')} {size}"
    plain = name.removesuffix("_bytes").removesuffix("_tokens")
    return f"no {plain}" if value is None else f"{plain} {value}"


def _options_that_differ(value: str, every: list[str]) -> str:
    own, others = _options(value), [_options(v) for v in every]
    differing = [k for k in own if any(o.get(k) != own[k] for o in others)]
    shown = [f"{k}={own[k]}" for k in sorted(differing) if own[k] is not None]
    return " ".join(shown) or "defaults"


def _options(text: object) -> dict[str, Any]:
    """A row's options; none where a stranger's row holds no JSON object."""
    try:
        value = json.loads(str(text or "{}"))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def bracket(answers: Iterable[tuple[int, str]]) -> Bracket:
    """[largest ok, smallest not ok above it] of (tokens, answer) pairs, and what ended it.

    Tokens that failed in one trial are not ok, whatever another trial of them said.
    ``limited_by`` is ``""`` where it is unknown: nothing above found memory too small, but not
    everything there had an answer (``""``), since a trial died.
    """
    worst: dict[int, str] = {}
    for tokens, answer in answers:
        before = worst.get(tokens, "")
        worst[tokens] = answer if before in ("", "ok") and answer else before
    every = list(worst.items())
    ok = max((t for t, a in every if a == "ok"), default=None)
    above = sorted((t, a) for t, a in every if a != "ok" and (ok is None or t > ok))
    refused = [(t, a) for t, a in above if a]
    if refused:
        return {"ok": ok, "not_ok": refused[0][0], "limited_by": refused[0][1]}
    ended = "" if above or ok is None else "sweep_end"
    return {"ok": ok, "not_ok": None, "limited_by": ended}


def resident(rows: list[Row], startup: Bracket) -> Bracket:
    """Tokens that one sequence really held, and where holding more failed.

    A refused fill gives both ends: pages (an engine's blocks) are added one by one until one more
    is refused. When start-up itself is what fails above (a static pool), its bracket is the
    answer's upper end; when a trial died on the way further, what ends it is unknown.
    """
    asked = [r for r in rows if asked_to_fill(r)]
    # A context that started in one trial and not in another is no end of what was held in it.
    never = startup["not_ok"] or float("inf")
    full = [r for r in asked if filled(r) and int(r["context_tokens"]) < never]
    if not full:
        return {"ok": None, "not_ok": None, "limited_by": ""}
    ok = max(held_tokens(r) for r in full)
    refused = [r for r in full if r["status"] in ("oom", "refused")]
    if refused:
        best = max(refused, key=held_tokens)
        return {"ok": ok, "not_ok": ok + one_more(best), "limited_by": best["status"]}
    if startup["not_ok"] is not None:
        return {"ok": ok, "not_ok": startup["not_ok"], "limited_by": startup["limited_by"]}
    died = [r for r in asked if not started(r)]
    lost = any(int(r["context_tokens"]) * float(r["fill"]) > ok for r in died)
    return {"ok": ok, "not_ok": None, "limited_by": "" if lost else "sweep_end"}


def asked_to_fill(row: Row) -> bool:
    """Whether a trial was to fill a sequence, and what it holds is an answer for one sequence."""
    return (
        row.get("workload_steps") is None
        and (row["sequences"] == 1 or row["purpose"] == "resident")
        and float(row["fill"] or 0) > 0
        and row["purpose"] != "bracket"
    )


def filled(row: Row) -> bool:
    """Whether a trial filled a sequence as far as it was asked to, or as it could."""
    known = row.get("resident_tokens") is not None
    return known and asked_to_fill(row) and started(row) == "ok"


def one_more(row: Row) -> int:
    """Tokens of what is added at once to a sequence: a page (an engine's block) on every rank."""
    grain = int(row.get("page_tokens") or row.get("block_tokens") or 0)
    return grain * int(row.get("context_ranks") or 1)


def strategy_summary(rows: list[Row]) -> dict[str, Any]:
    """One arm's entry in ``strategies``."""
    whole = per_trial(rows)
    start = bracket((int(r["context_tokens"]), started(r)) for r in whole)
    peaks = [int(r["peak_device_bytes"]) for r in whole if r.get("peak_device_bytes") is not None]
    rates: dict[int, list[float]] = {}
    for r in whole:
        if r["status"] == "ok" and r.get("attention_decode_tokens_per_second") is not None:
            rates.setdefault(held_tokens(r), []).append(
                float(r["attention_decode_tokens_per_second"])
            )
    return {
        "startup": start,
        "admit": bracket((int(r["context_tokens"]), admitted(r)) for r in whole),
        "resident": resident(whole, start),
        "peak_device_bytes": max(peaks, default=None),
        "decode": [
            {
                "resident_tokens": tokens,
                "attention_decode_tokens_per_second": statistics.median(own),
            }
            for tokens, own in sorted(rates.items())
        ],
        **({"ranks": spread} if (spread := rank_spread(rows)) else {}),
    }


def summarise(rows: list[Row], claims: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole of summary.json."""
    return {
        "schema": SCHEMA,
        "strategies": {name: strategy_summary(own) for name, own in arms(rows).items()},
        "claims": claims,
    }
