"""The K/V of a model on one rank, as strategies need it: layer groups, pages, chunks."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kernels.view import Geometry

MAP_GRANULARITY_BYTES = 2 << 20
CHUNK_TARGET_BYTES = 64 << 20


def chunk_pages(page_bytes: int, chunk_target_bytes: int = CHUNK_TARGET_BYTES) -> int:
    """Pages of a chunk: the smallest multiple of lcm(page, 2 MiB) that is >= the target.

    No page straddles chunks, so that each goes back to the driver whole, and a chunk is a multiple
    of the driver's mapping granularity: 66 MiB for pages of 3, 1.5 and 0.75 MiB.
    """
    unit = math.lcm(page_bytes, MAP_GRANULARITY_BYTES)
    return max(1, math.ceil(chunk_target_bytes / unit)) * unit // page_bytes


@dataclass(frozen=True)
class LayerGroup:
    """Layers whose K/V live equally long: all of a plain model, or one kind of a hybrid one.

    Parameters
    ----------
    name : str
        ``full`` or ``local``.
    geometry : Geometry
    pages_per_chunk : int
        Pages that are mapped together (:func:`chunk_pages`).
    window_tokens : int
        0 for full attention; else the chunk of chunked-local attention: a query at position p sees
        ``[p // window * window, p]``, and pages before that are given back.
    """

    name: str
    geometry: Geometry
    pages_per_chunk: int
    window_tokens: int = 0

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk of this group's arena."""
        return self.pages_per_chunk * self.geometry.page_bytes

    def window_start(self, length_tokens: int) -> int:
        """First token that the last stored token (position ``length - 1``) sees."""
        if not self.window_tokens or length_tokens == 0:
            return 0
        return (length_tokens - 1) // self.window_tokens * self.window_tokens

    def pages(self, tokens: int) -> int:
        """Pages that hold ``tokens`` tokens from position 0 on."""
        return -(-tokens // self.geometry.page_tokens)


@dataclass(frozen=True)
class KVModel:
    """What a rank stores of a model: its layer groups, on one device or in the scale model."""

    name: str
    groups: tuple[LayerGroup, ...]

    @property
    def token_bytes(self) -> int:
        """K/V bytes of one token over all groups (none given back)."""
        return sum(g.geometry.token_bytes for g in self.groups)

    @property
    def q_heads(self) -> int:
        """Local query heads."""
        return self.groups[0].geometry.q_heads
