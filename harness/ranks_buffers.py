"""Where the collectives of a decode step of several ranks land."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.ranks_group import Sizes

if TYPE_CHECKING:
    import torch

    from kernels.view import View


@dataclass(frozen=True)
class Buffers:
    """Where a step's collectives land; slices of the workspace on a GPU.

    Parameters
    ----------
    gathered, gathered_lse : torch.Tensor
        float32 ``[context ranks, sequences, q_heads, head_dim]`` and without ``head_dim``.
    merged, merged_lse : torch.Tensor
        float32, the same of one rank.
    hidden : torch.Tensor
        bf16 ``[sequences, hidden]``.
    """

    gathered: torch.Tensor
    gathered_lse: torch.Tensor
    merged: torch.Tensor
    merged_lse: torch.Tensor
    hidden: torch.Tensor


def make_buffers(view: View, sizes: Sizes, ranks: int, flat: torch.Tensor | None) -> Buffers:
    """Cut buffers for ``ranks`` context ranks out of ``flat`` (uint8); of their own when None."""
    import torch

    g = view.geometry
    rows = (view.sequences, g.q_heads)
    shapes = [(ranks, *rows, g.head_dim), (ranks, *rows), (*rows, g.head_dim), rows]
    device = view.arena.device
    if flat is None:
        cut = [torch.zeros(s, device=device) for s in shapes]
        hidden = torch.zeros((view.sequences, sizes.hidden), dtype=torch.bfloat16, device=device)
        return _buffers(cut, hidden)
    cut, at = [], 0
    if sizes.context_ranks > 1:
        for shape in shapes:
            nbytes = 4 * math.prod(shape)
            cut.append(flat[at : at + nbytes].view(torch.float32).view(shape))
            at += nbytes
    else:
        cut = [torch.empty(0, device=device)] * len(shapes)
    hidden = flat[at:][: sizes.hidden_bytes].view(torch.bfloat16).view(-1, sizes.hidden)
    return _buffers(cut, hidden)


def _buffers(cut: list[torch.Tensor], hidden: torch.Tensor) -> Buffers:
    gathered, gathered_lse, merged, merged_lse = cut
    return Buffers(gathered, gathered_lse, merged, merged_lse, hidden)
