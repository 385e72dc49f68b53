"""The arms of ``experiment=remedies``: what each differs by, its OOM points, and its price."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd

from harness.runs import frame, lookup, trials
from harness.series import options_of, spoken
from harness.sources import Sources, first_of
from harness.tables import count, strategies
from harness.tabular import EMPTY, Table, figure_of, known, tokens

POINTS = {"startup": "start-up", "admit": "admit", "resident": "resident"}
# A bracket whose ends lie further apart than this was not closed.
CLOSED_RATIO = 1.05
ENGINES = ("sglang", "vllm")
EMULATED = "emulated, not timed"
EMULATED_NOTE = (
    "An emulated engine allocates what the engine does and runs no kernels: it has no step to "
    "time. Fewer running requests cost what they say: no more of them run at once."
)
EXCHANGE = "the exchange between ranks"
EXCHANGE_NOTE = (
    "Context parallel: a step also merges the ranks' partial results through a collective, which "
    "the rate leaves out; what it took is told where several ranks ran."
)
SPOKEN = {
    "strategy": "strategy",
    "kv_dtype": "KV",
    "hybrid": "hybrid KV",
    "read_weights": "weights read in each step",
    "parallel": "parallel",
}


@dataclass(frozen=True)
class Point:
    """One OOM point of an arm, tokens: the largest ok, the smallest not ok, what ended it."""

    ok: float
    not_ok: float | None
    limited_by: str

    @property
    def unbounded(self) -> bool:
        """Whether nothing failed up to the end of the sweep."""
        return self.limited_by == "sweep_end"

    @property
    def wide(self) -> bool:
        """Whether the bracket was left open: the point may lie well above ``ok``."""
        return self.not_ok is not None and self.not_ok > CLOSED_RATIO * self.ok


@dataclass(frozen=True)
class Remedy:
    """One arm.

    Parameters
    ----------
    name : str
        The arm's own name in words, else the summary's.
    strategy, model : str
    points : dict of str to Point
        By the keys of :data:`POINTS`; one that nobody looked for is absent.
    tokens_per_second, at_tokens : float or None
        Attention decode at the longest resident length that was timed; where the base was timed at
        other lengths too, at the longest that both have.
    untimed : str
        Why there is no rate; ``""`` where there is one.
    base, difference : str
        The earlier arm that differs from this one by one thing, and that thing; ``""`` for none.
    base_rate : float or None
        The base's rate at that length, where it was timed there.
    token_bytes : float or None
        K/V bytes of a token, of the modelled device.
    left_out : str
        What a step takes besides, and the rate leaves out; ``""`` for nothing.
    trials : tuple of str
        Those that were timed at that length.
    """

    name: str
    strategy: str
    model: str
    points: dict[str, Point]
    tokens_per_second: float | None
    at_tokens: float | None
    untimed: str
    base: str
    difference: str
    base_rate: float | None
    token_bytes: float | None
    left_out: str
    trials: tuple[str, ...]


def remedies(rows: pd.DataFrame, summary: dict[str, Any]) -> list[Remedy]:
    """Return every arm of the summary, in its order; with rows, those that the rows belong to.

    Parameters
    ----------
    rows : pandas.DataFrame
        The run's rows; without them names, points and prices still come from the summary.
    summary : dict
        summary.json.
    """
    out: list[Remedy] = []
    sources = Sources(rows)
    settings: list[dict[str, str]] = []
    timed: dict[str, dict[float, float]] = {}
    for name, one in strategies(summary):
        own, arm = _rows_of(name, rows)
        if own.empty and not rows.empty:  # of another experiment whose rows the run holds too
            continue
        setting = _setting(own)
        rates = _rates(one)
        base, difference = "", ""
        for earlier, other in zip(reversed(out), reversed(settings), strict=True):
            what = _differences(other, setting) if _comparable(other, setting) else []
            if len(what) == 1:
                base, difference = earlier.name, what[0]
                break
        beside = timed.get(base, {})
        at = max(rates.keys() & beside.keys() or rates, default=None)
        rate = None if at is None else rates[at]
        out.append(
            Remedy(
                _own_name(name, arm, [n for n, _ in strategies(summary)]),
                str(own["strategy"].iloc[0]) if len(own) else name.partition(",")[0],
                str(own["model"].iloc[0]) if len(own) else "",
                dict(_points(one)),
                rate,
                at,
                "" if rate else _why_untimed(own),
                base,
                difference,
                None if at is None else beside.get(at),
                _token_bytes(own),
                _left_out(own, at) if rate else "",
                tuple(sources.decode(name, at)) if rate else (),
            )
        )
        timed[out[-1].name] = rates
        settings.append(setting)
    return out


def remedies_table(rows: pd.DataFrame, summary: dict[str, Any]) -> Table:
    """Return a line an arm: what it differs by, its three OOM points, and its price.

    Without rows of ``experiment=remedies`` the table is empty.
    """
    lines = []
    mine = rows[rows["experiment"] == "remedies"]
    arms = remedies(mine, summary) if len(mine) else []
    for one in arms:
        price = figure_of(one.tokens_per_second, 3) if one.tokens_per_second else one.untimed
        at = tokens(one.at_tokens) if one.at_tokens is not None else EMPTY
        points = (_point_text(one.points.get(key)) for key in POINTS)
        lines.append(
            (
                one.name,
                one.strategy,
                one.model,
                *points,
                price,
                at,
                _ratio_text(one),
                one.left_out or EMPTY,
                f"{one.base}: {one.difference}" if one.base else EMPTY,
                first_of(list(one.trials)) or EMPTY,
            )
        )
    columns = (
        "arm",
        "strategy",
        "model",
        *(f">{name}" for name in POINTS.values()),
        ">decode tok/s",
        ">at resident",
        ">of the other's",
        "not in it",
        "differs by one thing from",
        "timed in",
    )
    notes = (
        "Points are the largest ok, in tokens; ≥: nothing failed up to the end of the sweep; "
        "a to b: not looked for more closely. Decode is attention only, all layers' kernels of one "
        "rank (and reading the weights, where the arm says so); "
        '"of the other\'s" divides it by that of the arm that this one differs from.',
        *([EMULATED_NOTE] if any(one.untimed == EMULATED for one in arms) else []),
        *([EXCHANGE_NOTE] if any(one.left_out for one in arms) else []),
    )
    return Table("What each remedy buys, and its price", columns, tuple(lines), notes)


def _ratio_text(one: Remedy) -> str:
    if not one.tokens_per_second or not one.base_rate:
        return EMPTY
    return f"{one.tokens_per_second / one.base_rate:.3g}"


def _point_text(point: Point | None) -> str:
    if point is None:
        return EMPTY
    if point.wide:
        return f"{count(point.ok)} to {count(point.not_ok)}"
    return ("≥ " if point.unbounded else "") + count(point.ok)


def _rows_of(name: str, rows: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Return an arm's rows and its own name, by the name that the summary gives it."""
    best, found, own_arm = -1, frame([]), ""
    for (strategy, arm), own in rows.groupby(["strategy", "arm"], sort=False):
        start = f"{strategy}, {arm}" if arm else str(strategy)
        if (name == start or name.startswith(f"{start}, ")) and len(start) > best:
            best, found, own_arm = len(start), trials(own), str(arm)
    return found, own_arm


def _own_name(name: str, arm: str, every: list[str]) -> str:
    """Return the arm's name in words, unless another entry of the summary has it too."""
    rivals = [n for n in every if n.split(", ")[1:2] == [arm]]
    return spoken(arm) if arm and len(rivals) == 1 else name


def _points(one: dict[str, Any]) -> Iterator[tuple[str, Point]]:
    for key in POINTS:
        ok, not_ok = lookup(one, key, "ok"), lookup(one, key, "not_ok")
        if known(ok) and ok > 0:
            upper = float(not_ok) if known(not_ok) else None
            yield key, Point(float(ok), upper, str(lookup(one, key, "limited_by", default="")))


def _rates(one: dict[str, Any]) -> dict[float, float]:
    """Return the decode rate at each resident length that was timed."""
    timed = lookup(one, "decode", default=[])
    found: dict[float, float] = {}
    for item in timed if isinstance(timed, list) else []:
        at = lookup(item, "resident_tokens")
        rate = lookup(item, "attention_decode_tokens_per_second")
        if known(at) and known(rate) and rate > 0:
            found.setdefault(float(at), float(rate))
    return found


def _why_untimed(own: pd.DataFrame) -> str:
    failed = own[(own["purpose"] == "point") & (own["status"] != "ok")]
    if failed.empty:
        return EMULATED if len(own) and own["strategy"].isin(ENGINES).all() else "not timed"
    row = failed.sort_values("context_tokens", kind="stable").iloc[0]
    word = {"oom": "OOM"}.get(row["status"], row["status"])
    return f"{word} at {tokens(row['context_tokens'])}"


def _left_out(own: pd.DataFrame, at_tokens: float | None) -> str:
    """Name the collective of context parallelism, and its time where ranks ran it."""
    shared = own[own["parallel"].eq("context") & own["context_ranks"].gt(1)]
    if shared.empty:
        return ""
    took = shared.loc[shared["resident_tokens_all_ranks"].eq(at_tokens), "collective_ms"].median()
    return f"{EXCHANGE}: {took:.3g} ms a step" if known(took) else EXCHANGE


def _setting(own: pd.DataFrame) -> dict[str, str]:
    """Return what may be the one thing that an arm differs by."""
    if own.empty:
        return {}
    row = own.iloc[0]
    points = own[own["purpose"] == "point"]
    asked = (points if len(points) else own)["context_tokens"]
    out = {c: _word(row[c]) for c in ("model", *SPOKEN)}
    out |= {f"option {k}": v or "default" for k, v in options_of(row["strategy_options"]).items()}
    return out | {"asked": str(asked.min()), "most": tokens(own["context_tokens"].max())}


def _word(value: object) -> str:
    if isinstance(value, (int, float)):
        return "" if pd.isna(value) else "on" if value else "off"
    return str(value or "")


def _comparable(old: dict[str, str], new: dict[str, str]) -> bool:
    """Whether one thing can be what differs: another model, or an engine for a pool, is many."""
    if not old or not new or old["model"] != new["model"]:
        return False
    names = {old["strategy"], new["strategy"]}
    return len(names) == 1 or not names & set(ENGINES)


def _differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Return in words what differs."""
    out = [f"{SPOKEN[c]} {old[c]} → {new[c]}" for c in SPOKEN if old[c] != new[c]]
    if old["asked"] != new["asked"]:
        out.append(f"context at most {new['most']}")
    # Options are a strategy's own: they are part of what another strategy is.
    other = old["strategy"] != new["strategy"]
    options = [] if other else [k for k in (*old, *new) if k.startswith("option ")]
    for key in dict.fromkeys(options):
        a, b = old.get(key, "default"), new.get(key, "default")
        if a != b:
            out.append(f"{key.removeprefix('option ')} {a} → {b}")
    return out


def _token_bytes(own: pd.DataFrame) -> float | None:
    sizes = (own["kv_bytes_per_token"] * own["scale"].fillna(1).replace(0, 1)).dropna()
    return float(sizes.iloc[0]) if len(sizes) else None
