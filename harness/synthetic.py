"""Synthetic K/V: seeded, never zero, known to the correctness gate without reading the arena.

Each layer's tokens come from a bank of ``BANK_TOKENS`` normal values in blocks of that length, each
block rotated by its own seeded offset, so that pages differ and no block need be stored. Needles
are single tokens with a loud key; a query that points at one must return exactly its value, which
pins every page to its place: attention itself does not see the order of ordinary tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from harness.workspace import BANK_TOKENS, Workspace
from strategies.model import LayerGroup

if TYPE_CHECKING:
    import torch

NEEDLE_AMPLITUDE = 4.0


@dataclass
class Needle:
    """A planted token: its sign pattern and its value, the same for every KV head."""

    position: int
    signs: torch.Tensor  # [D] of +-1
    value: torch.Tensor  # [D], exactly representable in the K/V dtype


@dataclass
class Content:
    """What the K/V of one layer group hold.

    ``k_bank`` and ``v_bank`` are ``[BANK_TOKENS, kv_heads, D]``: bf16, or on the host FP8 codes.
    """

    group: LayerGroup
    seed: int
    k_bank: torch.Tensor
    v_bank: torch.Tensor
    needles: dict[tuple[int, int], dict[int, Needle]] = field(default_factory=dict)

    def pieces(self, sequence: int, layer: int, lo: int, hi: int) -> Iterator[tuple[int, int, int]]:
        """Tokens [lo, hi) as runs (first token, bank lo, bank hi), contiguous in the bank."""
        at = lo
        while at < hi:
            block = at // BANK_TOKENS
            end = min(hi, (block + 1) * BANK_TOKENS)
            first = (at + self._offset(sequence, layer, block)) % BANK_TOKENS
            length = min(end - at, BANK_TOKENS - first)
            yield at, first, first + length
            at += length

    def _offset(self, sequence: int, layer: int, block: int) -> int:
        """Rotation of a block: whole pages, so that full tiles stay full."""
        key = f"{self.seed}/{self.group.name}/{sequence}/{layer}/{block}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        page = self.group.geometry.page_tokens
        return number % (BANK_TOKENS // page) * page

    def add_needle(self, sequence: int, layer: int, position: int) -> Needle:
        """Decide the needle of a position; the caller appends it."""
        import torch

        geometry = self.group.geometry
        key = f"{self.seed}/needle/{sequence}/{layer}/{position}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "little")
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (geometry.head_dim,), generator=generator) * 2.0 - 1.0
        value = torch.randint(-8, 9, (geometry.head_dim,), generator=generator) / 4.0 + 0.125
        value = value.to(torch.float8_e4m3fn).float()
        device = self.k_bank.device
        needle = Needle(position, signs.to(device), value.to(device))
        self.needles.setdefault((sequence, layer), {})[position] = needle
        return needle


def make_content(group: LayerGroup, seed: int, workspace: Workspace, on_host: bool) -> Content:
    """A bank of this seed: on CUDA in the workspace, on the host in memory of its own."""
    import torch

    g = group.geometry
    shape = (BANK_TOKENS, g.kv_heads, g.head_dim)
    generator = torch.Generator().manual_seed(seed)
    # V has a mean: with a zero mean, errors in the softmax's normalisation would cancel.
    k = torch.randn(shape, generator=generator).to(torch.bfloat16)
    v = (torch.randn(shape, generator=generator) + 0.5).to(torch.bfloat16)
    if on_host:
        if g.kv_dtype == "fp8_e4m3":
            k, v = (x.to(torch.float8_e4m3fn).view(torch.uint8) for x in (k, v))
        return Content(group, seed, k, v)
    both = workspace.tensor("synthetic_kv", (2, *shape), torch.bfloat16)
    both[0].copy_(k)
    both[1].copy_(v)
    return Content(group, seed, both[0], both[1])
