"""What a kernel is told about the memory it reads: the arena, the page table, the geometry.

Layout of one layer group, the same for every strategy, page-major::

    arena[page, layer, {K, V}, kv_head, tile]

    K tile  [page_tokens, head_dim]   a token a row
    V tile  [head_dim, page_tokens]   stored transposed: Hopper's FP8 wgmma wants K-major operands

This module imports no torch, so that planners and host bracket trials can use the geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PAGE_TOKENS = 128
DTYPE_BYTES = {"fp8_e4m3": 1, "bf16": 2}


@dataclass(frozen=True)
class Geometry:
    """Shape of the K/V of one layer group on one rank.

    Parameters
    ----------
    layers : int
        Layers that share this arena and page table.
    kv_heads, q_heads : int
        Local heads of one rank; ``q_heads`` is a multiple of ``kv_heads``.
    head_dim : int
        64, 128 or 256.
    kv_dtype : str
        ``fp8_e4m3`` or ``bf16``.
    page_tokens : int
        Tokens of a page: 128, or 16, 32, 64 for the kernels that load by pointer.
    """

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    kv_dtype: str = "fp8_e4m3"
    page_tokens: int = PAGE_TOKENS

    def __post_init__(self) -> None:
        if self.kv_dtype not in DTYPE_BYTES:
            raise ValueError(f"kv_dtype={self.kv_dtype}: allowed are {', '.join(DTYPE_BYTES)}")
        if min(self.layers, self.kv_heads, self.q_heads, self.head_dim, self.page_tokens) < 1:
            raise ValueError(f"every number of a geometry is at least 1: {self}")
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads={self.q_heads}: must be a multiple of kv_heads={self.kv_heads}"
            )

    @property
    def itemsize(self) -> int:
        """Bytes of one K or V element."""
        return DTYPE_BYTES[self.kv_dtype]

    @property
    def group(self) -> int:
        """Query heads that share one KV head (the GQA group)."""
        return self.q_heads // self.kv_heads

    @property
    def tile_bytes(self) -> int:
        """Bytes of one tile: a page's K, or V, of one layer and one KV head."""
        return self.page_tokens * self.head_dim * self.itemsize

    @property
    def layer_bytes(self) -> int:
        """Bytes of one page of one layer: K then V of every KV head."""
        return 2 * self.kv_heads * self.tile_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: K and V of every layer and KV head of the group."""
        return self.layers * self.layer_bytes

    @property
    def token_bytes(self) -> int:
        """K/V bytes of one token over all layers of the group."""
        return self.page_bytes // self.page_tokens

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Byte strides of (page, layer, K-to-V, kv_head)."""
        return self.page_bytes, self.layer_bytes, self.kv_heads * self.tile_bytes, self.tile_bytes

    def tile_offset(self, page: int, layer: int, kv: int, head: int) -> int:
        """Byte offset of a tile in the arena; ``kv`` is 0 for K and 1 for V."""
        s = self.strides
        return page * s[0] + layer * s[1] + kv * s[2] + head * s[3]


@dataclass(frozen=True)
class View:
    """One batch of sequences of one layer group, as a kernel sees it.

    Parameters
    ----------
    arena : torch.Tensor
        uint8 ``[reserved_bytes]``: the whole reserved range; only pages in the table are backed.
    page_table : torch.Tensor
        int32 ``[sequences, max_pages]``: page of tokens ``[128 i, 128 (i + 1))``. Entries past a
        sequence's last page name a page that is backed, so that a prefetch never faults.
    lengths : torch.Tensor
        int64 ``[sequences]``: stored tokens.
    lengths_host : tuple[int, ...]
        The same numbers on the host, so that work can be planned without a synchronisation.
    geometry : Geometry
    k_scale, v_scale : torch.Tensor
        float32 ``[kv_heads]``: a stored code times its head's scale is the value.
    starts_host : tuple[int, ...]
        First visible token of each sequence (0 in full attention; the start of the current window
        in a chunked-local layer). Pages before it may have been given back.
    """

    arena: torch.Tensor
    page_table: torch.Tensor
    lengths: torch.Tensor
    lengths_host: tuple[int, ...]
    geometry: Geometry
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    starts_host: tuple[int, ...] = ()

    @property
    def sequences(self) -> int:
        """Sequences in the batch."""
        return len(self.lengths_host)

    @property
    def starts(self) -> tuple[int, ...]:
        """First visible token of each sequence."""
        return self.starts_host or (0,) * self.sequences
