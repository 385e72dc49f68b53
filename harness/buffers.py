"""The tensors of one decode step and one prefill chunk: slices of the workspace, no fresh memory.

On the host they are plain tensors, since the scale model's workspace holds modelled bytes only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.settings import Settings
from harness.workspace import Workspace, prefill_scratch_sizes

if TYPE_CHECKING:
    import torch

    from kernels.view import View

Step = tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]


def query_dtype(kv_dtype: str) -> torch.dtype:
    """Queries have the K/V's dtype: both operands of a product must."""
    import torch

    return torch.float8_e4m3fn if kv_dtype == "fp8_e4m3" else torch.bfloat16


@dataclass(frozen=True)
class StepBuffers:
    """Queries, outputs and scratch of a trial's steps."""

    settings: Settings
    workspace: Workspace

    @property
    def on_cuda(self) -> bool:
        """Whether the workspace holds real buffers."""
        return not self.settings.on_host

    def decode_scratch(self) -> torch.Tensor | None:
        """Partials of a decode step of any group; None lets the plan allocate them (host)."""
        return self.workspace.buffers["decode_partials"].u8 if self.on_cuda else None

    def prefill_scratch(self, group: int) -> torch.Tensor | None:
        """Partials and tables of a group's prefill chunk: a plan's tables stay while it is used."""
        if not self.on_cuda:
            return None
        sizes = prefill_scratch_sizes(self.settings)
        at = sum(sizes[:group])
        return self.workspace.buffers["prefill_partials"].u8[at : at + sizes[group]]

    def random_queries(self, view: View, tokens: int, seed: int) -> torch.Tensor:
        """Normal queries ``[tokens, q_heads, D]`` on the host, in the queries' dtype."""
        import torch

        g = view.geometry
        generator = torch.Generator().manual_seed(seed)
        shape = (tokens, g.q_heads, g.head_dim)
        return torch.randn(shape, generator=generator).to(query_dtype(g.kv_dtype))

    def decode(self, view: View, queries: torch.Tensor) -> Step:
        """Queries on the device, output float32 ``[S, q_heads, D]``, LSE ``[S, q_heads]``."""
        import torch

        if not self.on_cuda:
            return queries, torch.empty(queries.shape), torch.empty(queries.shape[:2])
        g = view.geometry
        flat = self.workspace.buffers["decode_outputs"].u8
        n = len(queries) * g.q_heads
        out = flat[: n * g.head_dim * 4].view(torch.float32).view(queries.shape)
        rest = flat[n * g.head_dim * 4 :]
        lse = rest[: n * 4].view(torch.float32).view(queries.shape[:2])
        q = rest[n * 4 :][: n * g.head_dim * g.itemsize].view(queries.dtype).view(queries.shape)
        q.copy_(queries)
        return q, out, lse

    def prefill(self, view: View, queries: torch.Tensor) -> Step:
        """``queries`` on the device, output bf16 ``[T, q_heads, D]`` and LSE ``[T, q_heads]``."""
        import torch

        shape = queries.shape
        if not self.on_cuda:
            return queries, torch.empty(shape, dtype=torch.bfloat16), torch.empty(shape[:2])
        g = view.geometry
        q = self.workspace.tensor("prefill_queries", tuple(shape), queries.dtype)
        q.copy_(queries)
        flat = self.workspace.buffers["prefill_outputs"].u8
        n = len(queries) * g.q_heads
        out = flat[: n * g.head_dim * 2].view(torch.bfloat16).view(shape)
        lse = flat[n * g.head_dim * 2 :][: n * 4].view(torch.float32).view(shape[:2])
        return q, out, lse
