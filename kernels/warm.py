"""Loading every kernel that a geometry will use, before memory is measured."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kernels.view import Geometry, View

if TYPE_CHECKING:
    import torch

TOKENS = 1 << 19  # long enough that the work is cut into pieces, which loads the merges
CHUNK_TOKENS = 256


def warm_up(geometry: Geometry, device: str) -> None:
    """Compile and load the kernels of a geometry on a few private pages, and free those.

    One page stands for every page of a long sequence: what is computed does not matter.

    Parameters
    ----------
    geometry : Geometry
    device : str
        A CUDA device, ``cuda:0``.
    """
    import torch

    from kernels import ops
    from kernels.reference import DTYPES

    g = replace(geometry, layers=1)
    dtype = DTYPES[g.kv_dtype]
    pages = TOKENS // g.page_tokens
    one = torch.ones(g.kv_heads, device=device)
    view = View(
        arena=torch.zeros(2 * g.page_bytes, dtype=torch.uint8, device=device),
        page_table=torch.zeros((1, pages), dtype=torch.int32, device=device),
        lengths=torch.tensor([TOKENS], device=device),
        lengths_host=(TOKENS,),
        geometry=g,
        k_scale=one,
        v_scale=one,
    )
    run = g.page_tokens + 1  # a whole tile, and a token on its own
    kv = torch.ones((run, g.kv_heads, g.head_dim), dtype=torch.bfloat16, device=device)
    ops.append_run(view, 0, kv, kv, 0, 0)
    where = torch.zeros(1, dtype=torch.int32, device=device)
    ops.append(view, 0, kv[:1], kv[:1], where, where.to(torch.int64))
    q = torch.ones((CHUNK_TOKENS, g.q_heads, g.head_dim), dtype=torch.bfloat16, device=device)
    q = q.to(dtype)
    _warm_decode(view, q[:1])
    start = TOKENS - CHUNK_TOKENS
    ops.prefill(view, 0, q, ops.plan_prefill(view, 0, start, CHUNK_TOKENS))
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()


def _warm_decode(view: View, q: torch.Tensor) -> None:
    """The decode kernel, and the merges of few and of many pieces."""
    import torch

    from kernels.config import decode_config
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode
    from kernels.merge import PIECES, merge

    programs_per_sm = decode_config(view.geometry).programs_per_sm
    for pieces, _ in PIECES:
        out, lse = decode(view, 0, q, plan_decode(view, max(1, pieces // programs_per_sm)))
    merge(torch.stack([out, out]), torch.stack([lse, lse]))  # what ranks of one sequence run
