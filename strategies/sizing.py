"""How large everything is, by formula alone: shared by the strategies and the planner.

Nothing here allocates. Tokens are per sequence, bytes are those of the model that is passed in
(a scaled model gives scaled bytes).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

from strategies.model import KVModel, LayerGroup

TABLE_ENTRY_BYTES = 4  # a page number is an int32


def page_table_bytes(model: KVModel, context_tokens: int, sequences: int) -> int:
    """Bytes of the page tables: int32 ``[sequences, ceil(context / page)]`` per layer group."""
    entries = sum(group.pages(context_tokens) for group in model.groups)
    return sequences * entries * TABLE_ENTRY_BYTES


def scaled_bytes(nbytes: int, scale: int) -> int:
    """``nbytes`` of the modelled device on a device of this scale: divided, rounded up."""
    return -(-nbytes // scale)


def pool_chunks(group: LayerGroup, tokens: int, sequences: int = 1) -> int:
    """Chunks that hold ``sequences`` slots of ``tokens`` tokens each.

    A slot is whole pages and the pool whole chunks, so
    ``ceil(sequences * ceil(tokens / page_tokens) / pages_per_chunk)``.
    """
    return -(-sequences * group.pages(tokens) // group.pages_per_chunk)


def pool_bytes(model: KVModel, tokens: int, sequences: int = 1) -> int:
    """Bytes of :func:`pool_chunks` over all layer groups."""
    return sum(pool_chunks(g, tokens, sequences) * g.chunk_bytes for g in model.groups)


def slot_tokens(context_tokens: int, mem_fraction: float = 1.0) -> int:
    """Tokens of a static slot: ``ceil(context * mem_fraction)``, the fraction read as a decimal.

    Read as a binary float, 0.55 of 10,000,000 would round up to 5,500,001.
    """
    return math.ceil(context_tokens * Fraction(str(mem_fraction)))


def static_device_budget_bytes(
    capacity_bytes: int, free_bytes: int, mem_fraction: float, workspace_reserve_bytes: int = 0
) -> int:
    """Pool budget when the fraction is one of the device: ``fraction * capacity - used``.

    SGLang documents ``mem_fraction_static`` as (weights + KV pool) / device memory; what is used
    already (weights, tables) therefore comes off. No more than what is free less the workspace's
    reserve. May be negative.
    """
    used_bytes = capacity_bytes - free_bytes
    budget = math.floor(capacity_bytes * Fraction(str(mem_fraction))) - used_bytes
    return min(budget, free_bytes - workspace_reserve_bytes)


def budget_bytes(
    free_bytes: int, mem_fraction: float = 1.0, workspace_reserve_bytes: int = 0
) -> int:
    """Pool budget by what is free: ``mem_fraction * (free - workspace reserve)``, at least 0."""
    return max(0, math.floor((free_bytes - workspace_reserve_bytes) * Fraction(str(mem_fraction))))


def most_tokens(nbytes: int, bytes_of: Callable[[int], int], limit_tokens: int) -> int:
    """Find the most tokens, up to the limit, whose (never falling) size fits into ``nbytes``."""
    if bytes_of(limit_tokens) <= nbytes:
        return limit_tokens
    fits, exceeds = 0, limit_tokens
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        if bytes_of(middle) <= nbytes:
            fits = middle
        else:
            exceeds = middle
    return fits


def budget_tokens(model: KVModel, nbytes: int, sequences: int = 1) -> int:
    """Find the most tokens a sequence whose :func:`pool_bytes` fit into ``nbytes``."""
    limit = max(0, nbytes) // (model.token_bytes * sequences) + 1
    return most_tokens(nbytes, lambda tokens: pool_bytes(model, tokens, sequences), limit)


def window_tokens(group: LayerGroup, tokens: int, step_tokens: int = 0) -> int:
    """Bound the tokens of a sequence of ``tokens`` that a group holds at once.

    Full attention holds all of them. A chunked-local group holds one window and, while a step
    crosses into the next window, the tokens of that step (``step_tokens``).
    """
    if not group.window_tokens:
        return tokens
    return min(tokens, group.window_tokens + step_tokens)


def live_bytes(model: KVModel, tokens: int, sequences: int = 1) -> int:
    """Bytes of the chunks that sequences of ``tokens`` tokens each need in ``paged``."""
    return sum(
        pool_chunks(g, window_tokens(g, tokens), sequences) * g.chunk_bytes for g in model.groups
    )


def paged_resident_tokens(model: KVModel, free_bytes: int, context_tokens: int) -> int:
    """Find the most tokens of one sequence that ``paged`` can hold in ``free_bytes``."""
    return most_tokens(free_bytes, lambda tokens: live_bytes(model, tokens), context_tokens)


def paged_reserve_chunks(
    group: LayerGroup, context_tokens: int, sequences: int, capacity_bytes: int
) -> int:
    """Chunks of address space that ``paged`` reserves for one group.

    Every sequence at full context, but no more than one chunk beyond the device's capacity: a
    page number past that could never be backed, and a shorter range keeps kernel descriptors in
    reach.
    """
    wanted = pool_chunks(group, context_tokens, sequences)
    return min(wanted, capacity_bytes // group.chunk_bytes + 1)


def eager_pool_chunks(
    model: KVModel,
    nbytes: int,
    context_tokens: int,
    sequences: int,
    step_tokens: int | None = None,
) -> tuple[int, ...]:
    """Chunks per layer group of a pool that is sized by a budget and committed at start-up.

    Groups with a window get what all sequences can hold behind it at once (a window and a step
    each; the step is a window unless given); the full groups share the rest, equally in tokens.
    Zeros when the budget does not hold that much.
    """
    chunks: dict[str, int] = {}
    left = nbytes
    for group in model.groups:
        if group.window_tokens:
            step = group.window_tokens if step_tokens is None else step_tokens
            held = window_tokens(group, context_tokens, step)
            chunks[group.name] = pool_chunks(group, held, sequences)
            left -= chunks[group.name] * group.chunk_bytes
    full = KVModel(model.name, tuple(g for g in model.groups if not g.window_tokens))
    if left < 0:
        return (0,) * len(model.groups)
    if full.groups:
        tokens = budget_tokens(full, left)
        chunks.update({g.name: pool_chunks(g, tokens) for g in full.groups})
    return tuple(chunks[g.name] for g in model.groups)
