"""What follows one layer's attention when several ranks share a model.

The context ranks' partial outputs are gathered and merged by their LSE
(:func:`kernels.merge.merge`, the same as for splits), and the tensor ranks' outputs, projected to
``[sequences, hidden]``, are summed. No weights are multiplied here: a fixed selection stands in for
the output projection where values are checked, and nothing where time is taken.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.ranks_buffers import Buffers
from harness.ranks_group import Collectives, Sizes

if TYPE_CHECKING:
    import torch


class Exchange:
    """The collectives that follow one layer's attention."""

    def __init__(self, group: Collectives, sizes: Sizes, buffers: Buffers) -> None:
        self.group, self.sizes, self.buffers = group, sizes, buffers

    def merge(self, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The whole sequence's output and LSE, from every context rank's partial ones."""
        from kernels import ops

        if self.sizes.context_ranks == 1:
            return out, lse
        b = self.buffers
        self.group.gather(b.gathered, out)
        self.group.gather(b.gathered_lse, lse)
        return ops.merge(b.gathered, b.gathered_lse, b.merged, b.merged_lse)

    def reduce(self) -> torch.Tensor:
        """Sum ``buffers.hidden`` over the tensor ranks."""
        self.group.reduce(self.buffers.hidden)
        return self.buffers.hidden

    def forget(self) -> None:
        """Leave nothing of an earlier step: no partials, and in the sum this rank's own number."""
        b = self.buffers
        for landed in (b.gathered, b.gathered_lse, b.merged, b.merged_lse):
            landed.fill_(math.nan)
        b.hidden.fill_(self.group.place.tensor_index + 1)

    def __call__(self, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Everything, as a timed step does it."""
        self.merge(out, lse)
        if self.sizes.tensor_ranks > 1:
            self.reduce()


def project(out: torch.Tensor, tensor_index: int, hidden: torch.Tensor) -> None:
    """Put a rank's heads ``[S, q_heads, D]`` where they belong in ``hidden [S, H]``, zeros around.

    Stands in for the row-parallel output projection: feature j of all ranks' concatenated heads is
    added to hidden feature ``j mod H``.
    """
    flat = out.flatten(1)
    width, at = hidden.shape[1], tensor_index * flat.shape[1]
    hidden.zero_()
    done = 0
    while done < flat.shape[1]:
        lo = (at + done) % width
        count = min(flat.shape[1] - done, width - lo)
        hidden[:, lo : lo + count] += flat[:, done : done + count].to(hidden.dtype)
        done += count
