"""The steps by which a sequence grows: the fill takes them, and the planner foretells them."""

from __future__ import annotations

from dataclasses import dataclass

STEP_TOKENS = 2048  # a prefill chunk: what an engine grows a sequence by


@dataclass
class Steps:
    """How large a sequence's next step is.

    Parameters
    ----------
    grain_tokens : int
        The smallest step; the others end at a multiple of it, or at the target.
    tokens : int
        The largest step, until one is refused.
    """

    grain_tokens: int
    tokens: int = STEP_TOKENS

    def next(self, at: int, target: int) -> int:
        """Tokens of the step that begins at ``at``."""
        return min(self.tokens - at % self.grain_tokens, target - at)

    def halve(self) -> bool:
        """Make this and all later steps smaller; False when they are a grain already."""
        if self.tokens <= self.grain_tokens:
            return False
        self.tokens = max(self.grain_tokens, self.tokens // 2)
        return True
