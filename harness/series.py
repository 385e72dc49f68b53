"""How rows become curves: which rows belong together, and what a curve is called."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from harness.columns import COLUMNS
from harness.rows import NOT_OF_ENGINES
from harness.runs import clean, frame, trials
from harness.sizes import MIB
from harness.tabular import tokens

# What may tell two curves of one strategy apart, in the order in which it is named.
VARIATIONS = (
    "hardware",
    "device_name",
    "basis",
    "emulated_version",
    "engine_version",
    "workload",
    "sequences",
    "kv_dtype",
    "mem_fraction",
    "slot_policy",
    "page_tokens",
    "block_tokens",
    "chunk_bytes",
    "arena",
    "layout",
    "table_order",
    "kernel_variant",
    "growth",
    "release",
    "hybrid",
    "read_weights",
    "fault",
    "parallel",
    "context_ranks",
    "world_size",
    "emulated_ranks",
)
NAMED_BY_VALUE = (
    "strategy",
    "model",
    "kv_dtype",
    "growth",
    "release",
    "slot_policy",
    "arena",
    "device_name",
    "emulated_version",
    "parallel",
)
KNOWN_LATE = ("kernel_variant", "engine_version")
OPTIONS_IN_COLUMNS = ("version", "block_size", "page_size")

CHUNK_ASKED = re.compile(r"chunk_((\d{1,6})MiB)")
ACRONYMS = ("kv", "fp8", "bf16")
ENGINES = ("sglang", "vllm")
STRATEGIES = ("static", "paged", "eager_pages", "sglang", "vllm")


def rank_of(strategy: str) -> tuple[int, str]:
    """Sorting key: the strategies in the order in which they are always named."""
    known = STRATEGIES.index(strategy) if strategy in STRATEGIES else len(STRATEGIES)
    return known, strategy


@dataclass(frozen=True)
class Series:
    """Rows of one strategy in one configuration.

    Parameters
    ----------
    strategy : str
    label : str
        The strategy, and what tells this curve from its others.
    rows : pandas.DataFrame
    turn : int
        Which of its strategy's curves this is; 0 for the first.
    arm : str
        The experiment's own name of the arm that the rows belong to; ``""`` for none.
    """

    strategy: str
    label: str
    rows: pd.DataFrame
    turn: int
    arm: str = ""

    @property
    def own_name(self) -> str:
        """The arm's own name in words and what else tells the curve apart; else the label.

        An arm that is named by the size of chunk that was asked for is named by the real one.
        """
        rest = self.label.removeprefix(f"{self.strategy}, {self.arm}")
        if not self.arm:
            return self.label
        asked, real = _chunk(self.arm, self.rows)
        return spoken(self.arm.replace(asked, f"{real}MiB", 1) if asked else self.arm) + rest

    @property
    def sized_label(self) -> str:
        """The label, with a chunk's real size behind the one that the arm is named by."""
        asked, real = _chunk(self.arm, self.rows)
        return self.label.replace(asked, f"{asked} ({real} MiB)", 1) if asked else self.label

    @property
    def spoken_label(self) -> str:
        """The label with its arm's name in words."""
        return f"{self.strategy}, {self.own_name}" if self.arm else self.label


def series(
    rows: pd.DataFrame, extra: tuple[str, ...] = (), leave: tuple[str, ...] = ()
) -> list[Series]:
    """Return every curve of the rows: each strategy and model, split by what varies within it.

    An experiment's named arm is a curve by its own name, which says what is varied; only what
    varies within the arm is added.

    Parameters
    ----------
    rows : pandas.DataFrame
    extra : tuple of str
        Further columns that split curves, ``fill`` say.
    leave : tuple of str
        Columns that do not split them (the figure's own x axis, say); with ``model``, models are
        still kept apart but not named; with ``arm``, arms neither split nor name.

    Returns
    -------
    list of Series
        Together they hold every row.
    """
    out: list[Series] = []
    for strategy in sorted(rows["strategy"].unique(), key=rank_of):
        turn = 0
        mine = rows[rows["strategy"] == strategy]
        for arm, part in _arms(mine, leave):
            # An arm's name says its model, unless it was run with several.
            several = (part if arm else rows)["model"].nunique() > 1 and "model" not in leave
            for model, own in part.groupby("model", sort=True):
                for parts, group in _split(own, extra, leave):
                    names = [str(strategy), arm, str(model) if several else "", *parts]
                    label = ", ".join(p for p in names if p)
                    out.append(Series(str(strategy), label, group, turn, arm))
                    turn += 1
    return out


def spoken(arm: str) -> str:
    """Return an arm's name in words: ``fp8_kv`` as ``FP8 KV``, ``page_2MiB`` as ``page 2 MiB``."""
    words = " ".join(w.upper() if w in ACRONYMS else w for w in arm.split("_"))
    return re.sub(r"(\d)([KMG]iB)\b", r"\1 \2", words)


def _chunk(arm: str, rows: pd.DataFrame) -> tuple[str, str]:
    """Return the size of chunk that an arm's name gives, and the real one in MiB, if it differs.

    A chunk holds whole pages of every layer, so that one of ``chunk_2MiB`` may have 6 MiB. Twice
    ``""`` where they are alike, or nothing is known.
    """
    asked = CHUNK_ASKED.search(arm)
    sizes = (rows["chunk_bytes"] * scale(rows)).dropna().unique()
    if asked is None or len(sizes) != 1 or sizes[0] == int(asked[2]) * MIB:
        return "", ""
    return asked[1], f"{sizes[0] / MIB:.4g}"


def _arms(rows: pd.DataFrame, leave: tuple[str, ...]) -> list[tuple[str, pd.DataFrame]]:
    """Return the rows of each arm, in the order in which they were run."""
    if "arm" in leave:
        return [("", rows)]
    return [(str(arm), own) for arm, own in rows.groupby("arm", sort=False)]


def _split(
    own: pd.DataFrame, extra: tuple[str, ...], leave: tuple[str, ...]
) -> Iterator[tuple[list[str], pd.DataFrame]]:
    """Return the rows of each configuration, and what tells it from the others."""
    split = _configuration(own, extra, leave)
    varied = [c for c in split if distinct(split[c], str(c)) > 1]
    groups = split.groupby(varied, sort=True, dropna=False) if varied else [((), split)]
    told = set(_told_by_basis(split, varied))
    for values, group in groups:
        pairs = zip(varied, values, strict=True)
        parts = [named(c, v) for c, v in pairs if c not in told]
        yield [p for p in parts if p], own.loc[group.index]


def _told_by_basis(split: pd.DataFrame, varied: list[str]) -> list[str]:
    """Return the columns that differ only as a scale model differs from the device."""
    if "basis" not in varied:
        return []
    groups = split.groupby("basis")
    others = [c for c in varied if c != "basis"]
    return [c for c in others if (groups[c].agg(distinct, column=c) <= 1).all()]


def distinct(values: pd.Series, column: str) -> int:
    """Count a column's values; a trial that failed early does not know its kernel's variant."""
    return int((values[values != ""] if column in KNOWN_LATE else values).nunique(dropna=False))


def _configuration(
    own: pd.DataFrame, extra: tuple[str, ...], leave: tuple[str, ...]
) -> pd.DataFrame:
    """Return what may split a strategy's rows: columns, and its options that no column holds."""
    if own["strategy"].isin(ENGINES).all():
        leave = (*leave, *NOT_OF_ENGINES)
    columns = [c for c in dict.fromkeys((*VARIATIONS, *extra)) if c not in leave]
    own = own.assign(chunk_bytes=own["chunk_bytes"] * scale(own))  # the modelled device's
    options = pd.DataFrame([options_of(v) for v in own["strategy_options"]], index=own.index)
    other = [c for c in options if c not in OPTIONS_IN_COLUMNS and c not in (*COLUMNS, *leave)]
    return pd.concat([own[columns], options[other].astype("string").fillna("")], axis=1)


def options_of(text: object) -> dict[str, str]:
    """Return a strategy's options as the row's JSON gives them; none where it is not JSON."""
    try:
        value = json.loads(str(text) or "{}")
    except (ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {clean(k): "" if v is None else clean(v) for k, v in value.items()}


def named(column: str, value: object) -> str:
    """Return a configuration value as a curve's name gives it; ``""`` for a default."""
    if pd.isna(value) or value in ("", "False"):
        return ""
    if isinstance(value, float):
        value = f"{value / MIB:.4g} MiB" if column == "chunk_bytes" else f"{value:g}"
    if column == "context_tokens":
        return f"context {tokens(float(str(value)))}"
    if column == "fill":
        return f"filled to {100 * float(str(value)):g} %"
    if column in ("engine_version", "emulated_version"):
        return f"{value} {'itself' if column == 'engine_version' else 'emulated'}"
    if value == "True":
        return column
    if column == "basis":
        return str(value).replace("_", " ")
    if column in NAMED_BY_VALUE:
        return str(value)
    if column not in COLUMNS:
        return f"{column}={value}"
    return f"{column.removesuffix('_tokens').removesuffix('_bytes').replace('_', ' ')} {value}"


def points(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a trial, without those that close a bracket where a strategy has others."""
    rows = trials(rows)
    auxiliary = rows["purpose"].isin(["bracket", "resident"])
    have = rows[~auxiliary].groupby(["strategy", "model"]).size().index
    keyed = pd.MultiIndex.from_frame(rows[["strategy", "model"]])
    return rows[~auxiliary | ~keyed.isin(have)].reset_index(drop=True)


def by_model(rows: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Return the rows of each model."""
    for model, own in frame(rows).groupby("model", sort=True, dropna=False):
        yield str(model), own


def needed_bytes(rows: pd.DataFrame) -> pd.Series:
    """Return what a refused trial needed, own bytes: in use before it asked, plus the asked."""
    return rows["capacity_bytes"] - rows["oom_free_bytes"] + rows["oom_requested_bytes"]


def scale(rows: pd.DataFrame) -> pd.Series:
    """Bytes of the modelled device for a byte of the row; 1 where the row is no scale model's."""
    return rows["scale"].fillna(1).replace(0, 1)


def is_scale_model(rows: pd.DataFrame) -> bool:
    """Whether any of the rows comes from the scale model."""
    return bool((rows["basis"].eq("scale_model") | scale(rows).ne(1)).any())
