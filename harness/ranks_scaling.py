"""What ranks bring: capacity, decode step and collectives by number of ranks and how they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from harness.ranks_summary import held_tokens, per_trial
from harness.rows import Row
from harness.summary import started

if TYPE_CHECKING:
    from harness.tabular import Table

Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Scaled:
    """One model on one number of ranks.

    Parameters
    ----------
    context_ranks : int
        1: heads are split alone; ``ranks``: pages are dealt out alone; else the product.
    basis : str
        ``planned`` where that many ranks were not there.
    capacity_tokens : int or None
        Tokens of one sequence that all ranks hold together when it is refused more.
    step_ms, attention_ms, collective_ms : float or None
        A decode step with its collectives, and either alone, of the slowest rank.
    step_iqr_ms, attention_iqr_ms, collective_iqr_ms : float or None
        Interquartile ranges of their samples.
    """

    strategy: str
    model: str
    ranks: int
    context_ranks: int
    basis: str
    capacity_tokens: int | None
    timed_tokens: int | None
    step_ms: float | None
    attention_ms: float | None
    collective_ms: float | None
    step_iqr_ms: float | None
    attention_iqr_ms: float | None
    collective_iqr_ms: float | None
    trials: tuple[str, ...]

    @property
    def split(self) -> str:
        """How the ranks share, in words."""
        tensor = self.ranks // self.context_ranks
        if self.context_ranks == 1:
            return "heads"
        return "pages" if tensor == 1 else f"pages x {self.context_ranks}, heads x {tensor}"


def scaling(rows: Iterable[Row]) -> list[Scaled]:
    """Every model and number of ranks of which all ranks ran, or were planned."""
    groups: dict[Key, list[Row]] = {}
    for row in per_trial(rows):
        if int(row["world_size"]) != int(row["emulated_ranks"]) or row.get("engine_version"):
            continue
        key = (
            str(row["strategy"]),
            str(row["model"]),
            int(row["emulated_ranks"]),
            int(row.get("context_ranks") or 1),
        )
        groups.setdefault(key, []).append(row)
    return [_scaled(key, own) for key, own in sorted(groups.items())]


def _scaled(key: Key, own: list[Row]) -> Scaled:
    full = [
        r for r in own if r["purpose"] == "resident" and r["status"] != "ok" and started(r) == "ok"
    ]
    timed = [r for r in own if r["status"] == "ok" and r.get("attention_decode_step_ms")]
    longest = max((held_tokens(r) for r in timed), default=None)
    timed = [r for r in timed if held_tokens(r) == longest]

    def middle(column: str) -> float | None:
        values = [float(r[column]) for r in timed if r.get(column) is not None]
        return median(values) if values else None

    return Scaled(
        *key,
        basis=str(own[0]["basis"]),
        capacity_tokens=max((held_tokens(r) for r in full), default=None),
        timed_tokens=longest,
        step_ms=middle("parallel_decode_step_ms"),
        attention_ms=middle("attention_decode_step_ms"),
        collective_ms=middle("collective_ms"),
        step_iqr_ms=middle("parallel_decode_step_ms_iqr"),
        attention_iqr_ms=middle("attention_decode_step_ms_iqr"),
        collective_iqr_ms=middle("collective_ms_iqr"),
        trials=tuple(str(r["trial_id"]) for r in full),
    )


@dataclass(frozen=True)
class Gain:
    """Tokens that pages dealt out to ranks hold, for each token that heads split over them do."""

    pages: Scaled
    heads: Scaled

    @property
    def ratio(self) -> float:
        """Capacity of pages ÷ capacity of heads."""
        assert self.pages.capacity_tokens is not None and self.heads.capacity_tokens
        return self.pages.capacity_tokens / self.heads.capacity_tokens

    @property
    def basis(self) -> str:
        """``planned`` when either is."""
        planned = "planned" in (self.pages.basis, self.heads.basis)
        return "planned" if planned else self.pages.basis


def gains(rows: Iterable[Row]) -> list[Gain]:
    """Pages alone against heads alone, wherever both were filled on as many ranks."""
    found = [s for s in scaling(rows) if s.capacity_tokens]
    heads = {(s.strategy, s.model, s.ranks): s for s in found if s.context_ranks == 1}
    return [
        Gain(s, heads[s.strategy, s.model, s.ranks])
        for s in found
        if s.context_ranks == s.ranks > 1 and (s.strategy, s.model, s.ranks) in heads
    ]


def scaling_table(rows: Iterable[Row]) -> Table:
    """The table of a run on several numbers of ranks; no lines for any other run."""
    from harness.tabular import EMPTY, Table

    rows = list(rows)
    found = scaling(rows)
    if len({(s.ranks, s.context_ranks) for s in found}) < 2:
        found = []
    ratios = {g.pages: g.ratio for g in gains(rows)}

    def number(value: Any, text: str) -> str:  # noqa: ANN401
        return EMPTY if value is None else format(value, text)

    def time(ms: float | None, iqr_ms: float | None) -> str:
        return number(ms, ".3f") + ("" if iqr_ms is None else f" ({iqr_ms:.3f})")

    lines = [
        (
            s.strategy,
            s.model,
            str(s.ranks),
            s.split,
            s.basis,
            number(s.capacity_tokens, ",.0f"),
            number(ratios.get(s), ".2f"),
            number(s.timed_tokens, ",.0f"),
            time(s.attention_ms, s.attention_iqr_ms),
            time(s.collective_ms, s.collective_iqr_ms),
            time(s.step_ms, s.step_iqr_ms),
        )
        for s in found
    ]
    columns = (
        "strategy",
        "model",
        ">ranks",
        "split",
        "basis",
        ">capacity, tokens",
        ">pages / heads",
        ">timed at",
        ">attention, ms",
        ">collectives, ms",
        ">decode step, ms",
    )
    notes = (
        "Capacity: tokens of one sequence over all ranks when it is refused more. Times: attention "
        "and collectives of all layers, no other work of a model, slowest rank; medians, in "
        "brackets the interquartile range.",
    )
    return Table("Scaling", columns, tuple(lines), notes)
