"""What a strategy would admit at this moment."""

from __future__ import annotations

from strategies.strategy import Strategy


def longest_admissible(strategy: Strategy, limit_tokens: int) -> int:
    """The most tokens, up to the limit, of a request that the strategy would accept now."""
    if strategy.can_admit(limit_tokens):
        return limit_tokens
    fits, exceeds = 0, limit_tokens
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        fits, exceeds = (middle, exceeds) if strategy.can_admit(middle) else (fits, middle)
    return fits
