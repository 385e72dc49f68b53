"""What append could reach at best: the same bytes, read and written in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 4096


# A kernel's arguments carry no Python types.
@triton.jit
def cast_kernel(source, target, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201
    """bf16 to E4M3, ``BLOCK`` neighbours a program."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + at, tl.load(source + at).to(tl.float32).to(tl.float8e4nv))


def cast(source: torch.Tensor, target: torch.Tensor) -> None:
    """Quantise a whole number of ``BLOCK`` values, on the host by torch."""
    if source.device.type == "cpu":
        target.copy_(source)
        return
    cast_kernel[(source.numel() // BLOCK,)](source, target, BLOCK, num_warps=8)
