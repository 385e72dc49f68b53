"""The phases of a trial, in order, and what a person reads of them."""

from __future__ import annotations

PHASES = ("context", "nccl", "weights", "tables", "pool", "workspace", "fill", "decode", "prefill")
START_PHASES = PHASES[: PHASES.index("workspace") + 1]  # a trial is ready at the end of the last
# Whose bytes a row holds in a column of their own; those of the pool and its growth are the K/V's.
SIZED_PHASES = tuple(p for p in START_PHASES if p != "pool")
# Rows and ledgers keep `nccl`, as their columns do, whatever the ranks talk through.
_NAMES = {"nccl": "communicator"}


def phase_name(phase: object) -> str:
    """A phase, or the component that it allocates, in words; ``""`` for none."""
    text = str(phase or "")
    return _NAMES.get(text, text)


def place_name(phase: object, allocation: object) -> str:
    """``pool/kv_pool``: where a trial ended, as far as it is known."""
    return "/".join(part for part in (phase_name(phase), str(allocation or "")) if part)
