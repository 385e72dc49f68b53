"""Many sequences in one K/V memory: its uses, and how many fit, beside the PagedAttention paper.

Strategies get pools of different size from one device. Sequences are therefore counted per GiB of
K/V memory, and told as multiples of what slots of the longest request hold, as the paper's are.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from harness.runs import trials
from harness.series import scale, series
from harness.shares import NAMES, SPOKEN
from harness.sizes import GIB
from harness.tabular import EMPTY, Table, figure_of, known

# Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention",
# SOSP 2023. Figure 2: per cent of KV memory, in the order of shares.NAMES.
PAPER_SHARES = {
    "Orca (Max)": (20.4, 13.3, 57.3, 8.9),
    "Orca (Pow2)": (26.8, 17.9, 13.6, 41.6),
    "Orca (Oracle)": (38.2, 25.2, 0.0, 36.6),
    "vLLM": (96.3, None, None, None),
}
# Figure 13: mean number of batched requests, OPT-13B on an A100-40GB with 12 GB of KV memory.
PAPER_LOADS = ("ShareGPT at 2 req/s", "Alpaca at 30 req/s")
PAPER_BATCHED = {
    "Orca (Max)": (7.00, 7.00),
    "Orca (Pow2)": (9.81, 43.24),
    "Orca (Oracle)": (13.62, 72.75),
    "vLLM": (30.42, 132.44),
}


@dataclass(frozen=True)
class Shared:
    """One arm; figures are medians over its trials, None where no row has one.

    Parameters
    ----------
    label, strategy : str
    shares : list of float or None
        Of committed K/V memory, in the order of :data:`harness.shares.NAMES`.
    sequences : float or None
        That ran at once, the mean while a request waited.
    kv_gib : float or None
        Committed K/V memory of the modelled device, the mean over the same steps.
    per_gib : float or None
        Sequences at once in a GiB of it.
    of_slots : float or None
        ``per_gib`` as a multiple of static's with slots of the longest request; None without one.
    """

    label: str
    strategy: str
    shares: list[float | None]
    sequences: float | None
    kv_gib: float | None
    per_gib: float | None
    of_slots: float | None


def shared(rows: pd.DataFrame) -> list[Shared]:
    """Return every arm's uses of K/V memory and its sequences at once."""
    own = trials(rows)
    kv_gib = own["kv_committed_bytes"] * scale(own) / GIB
    per_gib = (own["sequences_admitted"] / kv_gib).where(kv_gib > 0)
    slots = own["strategy"].eq("static") & own["slot_policy"].eq("max")
    base = _median(per_gib[slots])
    out = []
    for one in series(own):
        at = one.rows.index
        each = _median(per_gib[at])
        out.append(
            Shared(
                one.spoken_label,
                one.strategy,
                [_median(one.rows[f"{name}_share"]) for name in NAMES],
                _median(one.rows["sequences_admitted"]),
                _median(kv_gib[at]),
                each,
                each / base if each is not None and base else None,
            )
        )
    return out


def paper_multiples() -> dict[str, tuple[float, ...]]:
    """Figure 13's batched requests as multiples of Orca (Max)'s, in the order of its loads."""
    base = PAPER_BATCHED["Orca (Max)"]
    return {
        name: tuple(n / b for n, b in zip(counts, base, strict=True))
        for name, counts in PAPER_BATCHED.items()
    }


def sharing_table(rows: pd.DataFrame) -> Table:
    """Return a line an arm of ``experiment=waste``, and below them the paper's; else no line."""
    mine = rows[rows["experiment"] == "waste"]
    ours = [
        (
            one.label,
            *(_percent(s) for s in one.shares),
            figure_of(one.sequences, 3),
            figure_of(one.kv_gib, 3),
            figure_of(one.per_gib, 3),
            figure_of(one.of_slots, 3),
        )
        for one in (shared(mine) if len(mine) else [])
    ]
    multiples = paper_multiples()
    paper = [
        (
            f"{name}, paper",
            *(_percent(None if s is None else s / 100) for s in PAPER_SHARES[name]),
            " / ".join(f"{n:.2f}" for n in PAPER_BATCHED[name]),
            EMPTY,
            EMPTY,
            " / ".join(figure_of(n, 3) for n in multiples[name]),
        )
        for name in PAPER_SHARES
    ]
    columns = (
        "arm",
        *(f">{SPOKEN[name]}, %" for name in NAMES),
        ">sequences at once",
        ">KV, GiB",
        ">sequences a GiB",
        ">times slots max",
    )
    notes = (
        "Means while a request waited for memory. Pools differ in size: sequences are compared in "
        "a GiB of K/V memory.",
        "Paper: PagedAttention, SOSP '23, figures 2 and 13 (OPT-13B, 12 GB of KV memory; "
        f"{' / '.join(PAPER_LOADS)}); its multiples are of Orca (Max), in equal memory.",
    )
    lines = (*ours, *paper) if ours else ()
    return Table("What K/V memory holds, and how many sequences", columns, lines, notes)


def _median(values: pd.Series) -> float | None:
    found = values.dropna().median()
    return float(found) if known(found) else None


def _percent(share: float | None) -> str:
    return EMPTY if share is None else f"{100 * share:.1f}"
