"""Pairs of trials that asked the same question, and what their ratios say.

The ratio of a cell is the geometric mean of B / A over its pairs of processes; its 95 % interval is
Student's t of their log-ratios. That covers 95 % with as few as three pairs, of which a bootstrap
covers 75 %: in a quarter of cases all three lie on one side of the truth.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pandas as pd

from harness.columns import COLUMNS
from harness.runs import trials
from harness.series import VARIATIONS, distinct, named, scale
from harness.tabular import percent, tokens

GATE = 0.02
CONFIDENCE = 0.95
FEWEST_PAIRS = 3
METRICS = {
    "attention_decode_tokens_per_second": "decode tokens/s, attention only",
    "attention_prefill_tokens_per_second": "prefill tokens/s, attention only",
    "startup_seconds": "start-up seconds",
    "fill_seconds": "fill seconds",
    "peak_device_bytes": "peak device bytes",
    "kv_committed_bytes": "committed KV bytes",
}
# Nearly deterministic: one pair tells.
MEMORY = ("peak_device_bytes", "kv_committed_bytes")
# What is asked; trials that were asked different things are no pair.
QUESTION = ("context_tokens", "fill", "purpose")
_CELL = ("model", "strategy", *VARIATIONS)
_IGNORED = ("run_id", "trial_id", "pair_id", "repeat", "seed", "experiment")
# What ran, not what was asked for: empty in rows that ended before it was known.
RAN = ("kernel_variant",)
CONFIGURATION = tuple(
    c
    for c in (*COLUMNS[: COLUMNS.index("status")], "purpose", "strategy_options", "growth")
    if c not in _IGNORED
)


@dataclass(frozen=True)
class Pairs:
    """Trials of A beside those of B.

    Parameters
    ----------
    both : pandas.DataFrame
        A row a pair; A's columns end in ``_a``, B's in ``_b``.
    changed : dict of str to (str, str)
        Configuration columns in which the two share no value, and their values.
    only_a, only_b : int
        Trials without a partner.
    apart : dict of str to int
        What keeps those of A from the nearest of B without a partner, and how many it keeps; none
        where all of A, or all of B, have one.
    """

    both: pd.DataFrame
    changed: dict[str, tuple[str, str]]
    only_a: int
    only_b: int
    apart: dict[str, int]


@dataclass(frozen=True)
class Ratio:
    """B ÷ A of one metric in one cell: geometric mean, its interval, and what follows."""

    metric: str
    cell: str
    pairs: int
    ratio: float
    low: float
    high: float
    verdict: str
    median_a: float
    median_b: float
    trials_a: str
    trials_b: str


def pair(a: pd.DataFrame, b: pd.DataFrame) -> Pairs:
    """Pair the trials of two sets of rows.

    By ``pair_id`` where they share any, else by every configuration column in which they share a
    value, and ``repeat``. A column in which they share none is what is compared, as is what ran.
    """
    a, b = _asked(a), _asked(b)
    changed = {
        c: (_values(a[c]), _values(b[c]))
        for c in CONFIGURATION
        if c not in QUESTION and _disjoint(a[c], b[c], c)
    }
    shared = (set(a["pair_id"]) & set(b["pair_id"])) - {""}
    keys = ["pair_id", "strategy", "strategy_options"] if shared else [*CONFIGURATION, "repeat"]
    keys = [c for c in keys if c not in (*changed, *RAN)]
    for rows in (a, b):
        rows["_turn"] = rows.groupby(keys, dropna=False).cumcount() if keys else range(len(rows))
    joined = a.merge(
        b,
        left_on=[*keys, "_turn"],
        right_on=[*keys, "_turn"],
        how="outer",
        suffixes=("_a", "_b"),
        indicator="_side",
    )
    copies = {f"{name}_{side}": joined[name] for name in keys for side in ("a", "b")}
    joined = pd.concat([joined.drop(columns=keys), pd.DataFrame(copies)], axis=1)
    side = joined["_side"]
    both = joined[side == "both"].reset_index(drop=True)
    alone_a = a[~a["trial_id"].isin(both["trial_id_a"])]
    alone_b = b[~b["trial_id"].isin(both["trial_id_b"])]
    asked = [c for c in (*CONFIGURATION, "repeat") if c not in (*changed, *RAN)]
    return Pairs(
        both,
        changed,
        int((side == "left_only").sum()),
        int((side == "right_only").sum()),
        _apart(alone_a[asked].apply(_key), alone_b[asked].apply(_key)),
    )


def _asked(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the trials; a bracket's fills nothing, though an old row says ``fill`` 1."""
    rows = trials(rows)
    return rows.assign(fill=rows["fill"].mask(rows["purpose"] == "bracket", 0.0))


def _apart(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, int]:
    """Count what keeps each trial of A from the nearest of B, the same question if it is there."""
    found: Counter[str] = Counter()
    weights = [len(a.columns) if c in ("strategy", "model", *QUESTION) else 1 for c in a]
    for _, row in a.iterrows() if len(b) else ():
        differs = b.ne(row)
        nearest = differs.loc[differs.mul(weights).sum(axis=1).idxmin()]
        found[" and ".join(c for c in differs if nearest[c]) or "number"] += 1
    return dict(found.most_common())


def ratios(pairs: Pairs) -> list[Ratio]:
    """Compare every metric in every cell, and over all cells.

    Parameters
    ----------
    pairs : Pairs

    Returns
    -------
    list of Ratio
        For each metric that both measured: its cells, then, of times and speeds, ``all cells``
        (every pair counts once) when there are several.
    """
    both = pairs.both
    ok = both[(both["status_a"] == "ok") & (both["status_b"] == "ok")]
    ok = ok[~ok["purpose_a"].isin(["bracket"])].sort_values(
        ["model_a", "strategy_a", "context_tokens_a", "fill_a"], kind="stable"
    )
    for metric in MEMORY:
        for side in ("a", "b"):
            ok[f"{metric}_{side}"] *= scale(ok.rename(columns={f"scale_{side}": "scale"}))
    out = []
    for metric in METRICS:
        have = ok[ok[f"{metric}_a"].gt(0) & ok[f"{metric}_b"].gt(0)]
        if have.empty:
            continue
        cells = have.groupby(cell_names(have), sort=False)
        out += [_ratio(metric, str(name), group) for name, group in cells]
        if cells.ngroups > 1 and metric not in MEMORY:  # bytes do not scatter about a common ratio
            out.append(_ratio(metric, "all cells", have))
    return out


def cell_names(both: pd.DataFrame) -> pd.Series:
    """Name each pair's cell by the configuration that varies over the pairs.

    A trial that only fills (``resident``) is no repeat of one that is timed.
    """
    varied = [c for c in _CELL if distinct(both[f"{c}_a"], c) > 1]
    purposes = both["purpose_a"].nunique() > 1

    def name(row: pd.Series) -> str:
        parts = [named(c, row[f"{c}_a"]) for c in varied]
        fill = "" if row["fill_a"] == 1 else f"{percent(row['fill_a'])} filled"
        parts += [tokens(row["context_tokens_a"]), fill]
        if purposes and row["purpose_a"] != "point":
            parts.append(f"{row['purpose_a']} trial")
        return ", ".join(p for p in parts if p)

    return both.apply(name, axis=1)


def interval(log_ratios: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of the mean log-ratio, Student's t; of one pair the pair itself.

    Parameters
    ----------
    log_ratios : numpy.ndarray
        ``[pairs]``, ln(B / A) of each pair of processes.
    """
    count, mean = len(log_ratios), float(log_ratios.mean())
    if count < 2:
        return mean, mean
    half = student_t(count - 1) * float(log_ratios.std(ddof=1)) / math.sqrt(count)
    return mean - half, mean + half


@lru_cache
def student_t(freedom: int) -> float:
    """Return t with ``P(|T| <= t) = 0.95`` for so many degrees of freedom.

    With ``t = sqrt(freedom) tan(x)`` Student's density becomes ``cos(x) ** (freedom - 1)``.
    """
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x).clip(min=0) ** (freedom - 1)
    share = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    at = float(np.interp(CONFIDENCE, share / share[-1], x))
    return math.sqrt(freedom) * math.tan(at)


def verdict(low: float, high: float, pairs: int, fewest: int = FEWEST_PAIRS) -> str:
    """Say what an interval of B / A means at the 2 % gate."""
    if pairs < fewest:
        return f"undecided: {pairs} pair{'s' * (pairs > 1)}, {fewest} needed"
    if low > 1 + GATE:
        return "B higher"
    if high < 1 / (1 + GATE):
        return "B lower"
    if low >= 1 / (1 + GATE) and high <= 1 + GATE:
        return "same within 2 %"
    return "undecided: the interval crosses 2 %"


def _ratio(metric: str, cell: str, group: pd.DataFrame) -> Ratio:
    first, second = group[f"{metric}_a"], group[f"{metric}_b"]
    logs = np.log(second.to_numpy() / first.to_numpy())
    low, high = interval(logs)
    fewest = 1 if metric in MEMORY else FEWEST_PAIRS
    low, high = math.exp(low), math.exp(high)
    return Ratio(
        metric,
        cell,
        len(group),
        math.exp(float(logs.mean())),
        low,
        high,
        verdict(low, high, len(group), fewest),
        float(first.median()),
        float(second.median()),
        " ".join(group["trial_id_a"]),
        " ".join(group["trial_id_b"]),
    )


def _key(values: pd.Series) -> pd.Series:
    return values.map(lambda v: "" if pd.isna(v) else v)


def _disjoint(a: pd.Series, b: pd.Series, column: str) -> bool:
    first, second = set(_key(a)), set(_key(b))
    if column in RAN:
        first, second = first - {""}, second - {""}
        return bool(first and second) and not first & second
    return not first & second


def _values(column: pd.Series, most: int = 4) -> str:
    shown = [_shown(v) for v in _key(column).unique()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() else f"{value:g}"
    return str(value) or "(empty)"
