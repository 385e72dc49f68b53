"""Seeded mixed lengths, and the tokens that each sequence of a cell is filled to."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from harness.cell import Cell


def mixed_lengths(seed: int, count: int, min_tokens: int, max_tokens: int) -> list[int]:
    """Lengths from ``min_tokens`` to ``max_tokens``, uniform in their logarithm."""
    chance = random.Random(f"lengths/{seed}")
    low, high = math.log(min_tokens), math.log(max_tokens)
    drawn = (round(math.exp(chance.uniform(low, high))) for _ in range(count))
    return [min(max_tokens, max(min_tokens, n)) for n in drawn]


def batch_lengths(cell: Cell) -> list[int]:
    """Tokens of each sequence of a ``batch``, over all ranks; the longest one is the last.

    ``fill`` shortens all of them alike. None is longer than the context.
    """
    settings, keys = cell.settings, cell.settings.workload
    longest = min(keys["max_tokens"], cell.context_tokens)
    shortest = min(keys["min_tokens"], longest)
    found = mixed_lengths(settings.seed, settings.sequences, shortest, longest)
    found.append(found.pop(found.index(max(found))))
    return [max(1, math.floor(n * cell.fill + 1e-9)) if cell.fill else 0 for n in found]


def targets(cell: Cell) -> list[int]:
    """Tokens of each sequence that are to be resident on the cell's rank.

    A ``resident`` cell asks how far one sequence grows.
    """
    settings = cell.settings
    if cell.purpose == "resident":
        return [cell.target_tokens]
    if settings.workload["kind"] != "batch":
        return [cell.target_tokens] * settings.sequences
    return [settings.local_tokens(n, cell.context_index) for n in batch_lengths(cell)]


def filled_tokens(cell: Cell) -> int:
    """Tokens of all sequences that are to be resident over all ranks."""
    settings = cell.settings
    if cell.purpose == "resident":
        return cell.filled_tokens
    if settings.workload["kind"] != "batch":
        return cell.filled_tokens * settings.sequences
    return sum(batch_lengths(cell))
