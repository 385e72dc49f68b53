"""Is the answer right? Sampled rows and heads against float64, and a planted needle."""

from __future__ import annotations

import dataclasses
import math

import torch

from kernels import reference
from kernels.view import View

ERROR_LIMIT = 3e-2
DECODE_LSE_LIMIT = 1e-3
PREFILL_LSE_LIMIT = 5e-3
NEEDLE_LIMIT = 5e-2
SAMPLED_QUERIES = 4


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Errors of one configuration; ``failed`` is empty when it is right."""

    error: float
    lse_error: float
    failed: str = ""


def judge(error: float, lse_error: float, lse_limit: float) -> Verdict:
    """Hold errors to their limits; NaN fails."""
    failed = []
    if not error < ERROR_LIMIT:
        failed.append(f"error {error:.3g} >= {ERROR_LIMIT}")
    if not lse_error < lse_limit:
        failed.append(f"lse error {lse_error:.3g} >= {lse_limit}")
    return Verdict(error, lse_error, "; ".join(failed))


def _compare(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    wrong = sum((got.double() - want).square().sum().item() for got, want in pairs)
    size = sum(want.square().sum().item() for _, want in pairs)
    return math.sqrt(wrong / size)


def decode(view: View, layer: int, q: torch.Tensor, out: torch.Tensor,
           lse: torch.Tensor | None) -> Verdict:  # fmt: skip
    """Three sequences at most (first, middle, last), all query heads of two KV heads at most."""
    g = view.geometry
    pairs, worst = [], 0.0
    for row in sorted({0, view.sequences // 2, view.sequences - 1}):
        for head in sorted({0, g.kv_heads - 1}):
            mine = slice(head * g.group, (head + 1) * g.group)
            want, want_lse = reference.attend(
                view, layer, head, row, q[row : row + 1, mine].double(), g.head_dim**-0.5
            )
            pairs.append((out[row : row + 1, mine], want))
            if lse is not None:
                difference = (lse[row : row + 1, mine].double() - want_lse).abs()
                worst = max(worst, difference.max().item())
    return judge(_compare(pairs), worst, DECODE_LSE_LIMIT)


def prefill(view: View, layer: int, q: torch.Tensor, row: int, start: int, out: torch.Tensor,
            lse: torch.Tensor | None) -> Verdict:  # fmt: skip
    """The first, the last and two inner queries, all query heads of two KV heads at most."""
    g, tokens = view.geometry, len(q)
    pairs, worst = [], 0.0
    for t in sorted({0, tokens // 3, tokens - 1 - tokens // 5, tokens - 1}):
        lengths = list(view.lengths_host)
        lengths[row] = start + t + 1
        seen = dataclasses.replace(view, lengths_host=tuple(lengths))
        for head in sorted({0, g.kv_heads - 1}):
            mine = slice(head * g.group, (head + 1) * g.group)
            want, want_lse = reference.attend(
                seen, layer, head, row, q[t : t + 1, mine].double(), g.head_dim**-0.5
            )
            pairs.append((out[t : t + 1, mine], want))
            if lse is not None:
                difference = (lse[t : t + 1, mine].double() - want_lse).abs()
                worst = max(worst, difference.max().item())
    return judge(_compare(pairs), worst, PREFILL_LSE_LIMIT)


class Needle:
    """A key three times as long as a query, in the direction of it, planted in a layer.

    Its weight exceeds that of ten million random keys together, so that the answer is its value.
    """

    def __init__(self, view: View, layer: int, q: torch.Tensor, position: int) -> None:
        """Plant it for ``q [D]`` of KV head 0 of the first sequence."""
        g = view.geometry
        page = int(view.page_table[0, position // g.page_tokens])
        at = g.tile_offset(page, layer, 0, 0) + position % g.page_tokens * g.head_dim * g.itemsize
        self.key = view.arena[at : at + g.head_dim * g.itemsize]
        self.saved = self.key.clone()
        codes = reference.quantise(q.float() * 3, 1.0, g.kv_dtype)
        self.key.copy_(codes.view(torch.uint8))
        _, v = reference.gather(view, layer, 0, 0, position, position + 1)
        self.value = v[0]

    def found(self, out: torch.Tensor) -> bool:
        """Whether ``out [D]`` is the needle's value; takes the needle out again."""
        self.key.copy_(self.saved)
        error = (out.double() - self.value).norm() / self.value.norm()
        return bool(error < NEEDLE_LIMIT)
