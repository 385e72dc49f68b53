"""Synthetic K/V: seeded, never zero, known to the correctness gate without reading the arena.

Each layer's tokens come from a bank of ``BANK_TOKENS`` rows of normal values, block by block. A
block starts at a row of its own and takes its K and its V from columns of their own, so that no
block need be stored and about a million different tokens come of it. Their values have no mean:
what attention over many tokens leaves of them is changed by a page that is read twice, or for
another, by as much as its share. The order of tokens attention does not see; needles pin it: single
tokens with a loud key, whose value a query that points at one must return exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from harness.workspace import BANK_SPARE_COLUMNS, BANK_TOKENS, Workspace
from strategies.model import LayerGroup

if TYPE_CHECKING:
    import torch

NEEDLE_AMPLITUDE = 4.0
SHIFT = 8  # columns: 16 bytes of bf16, so that loads stay aligned
SHIFTS = BANK_SPARE_COLUMNS // SHIFT + 1


@dataclass
class Needle:
    """A planted token: its sign pattern and its value, the same for every KV head."""

    position: int
    signs: torch.Tensor  # [D] of +-1
    value: torch.Tensor  # [D], exactly representable in the K/V dtype


class Piece(NamedTuple):
    """Tokens from ``start`` on that are rows [lo, hi) of the banks, K and V shifted by columns."""

    start: int
    lo: int
    hi: int
    k_shift: int
    v_shift: int


@dataclass
class Content:
    """What the K/V of one layer group hold.

    ``k_bank`` and ``v_bank`` are ``[BANK_TOKENS, kv_heads * D + BANK_SPARE_COLUMNS]``: bf16, or on
    the host FP8 codes; these were rounded from ``unrounded``, the same two in bf16.
    """

    group: LayerGroup
    seed: int
    k_bank: torch.Tensor
    v_bank: torch.Tensor
    needles: dict[tuple[int, int], dict[int, Needle]] = field(default_factory=dict)
    unrounded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def values(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V banks in bf16, as they are before the K/V dtype rounds them."""
        return self.unrounded or (self.k_bank, self.v_bank)

    def pieces(self, sequence: int, layer: int, lo: int, hi: int) -> Iterator[Piece]:
        """Tokens [lo, hi) as runs that are contiguous in the banks."""
        at = lo
        while at < hi:
            block = at // BANK_TOKENS
            end = min(hi, (block + 1) * BANK_TOKENS)
            row, k_shift, v_shift = self._place(sequence, layer, block)
            first = (at + row) % BANK_TOKENS
            length = min(end - at, BANK_TOKENS - first)
            yield Piece(at, first, first + length, k_shift, v_shift)
            at += length

    def _place(self, sequence: int, layer: int, block: int) -> tuple[int, int, int]:
        """A block's first row (whole pages, so that full tiles stay full), and its two shifts."""
        key = f"{self.seed}/{self.group.name}/{sequence}/{layer}/{block}".encode()
        number = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
        page = self.group.geometry.page_tokens
        number, row = divmod(number, BANK_TOKENS // page)
        number, k = divmod(number, SHIFTS)
        return row * page, k * SHIFT, number % SHIFTS * SHIFT

    def stored(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a piece, ``[T, kv_heads, D]``, views of the banks."""
        k = self._view(self.k_bank, piece, piece.k_shift)
        return k, self._view(self.v_bank, piece, piece.v_shift)

    def _view(self, bank: torch.Tensor, piece: Piece, shift: int) -> torch.Tensor:
        heads, dim = self.group.geometry.kv_heads, self.group.geometry.head_dim
        rows = bank[piece.lo : piece.hi, shift : shift + heads * dim]
        return rows.unflatten(1, (heads, dim))

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
    shape = (BANK_TOKENS, g.kv_heads * g.head_dim + BANK_SPARE_COLUMNS)
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(shape, generator=generator).to(torch.bfloat16)
    v = torch.randn(shape, generator=generator).to(torch.bfloat16)
    if on_host:
        if g.kv_dtype == "fp8_e4m3":
            codes = [x.to(torch.float8_e4m3fn).view(torch.uint8) for x in (k, v)]
            return Content(group, seed, codes[0], codes[1], unrounded=(k, v))
        return Content(group, seed, k, v)
    both = workspace.tensor("synthetic_kv", (2, *shape), torch.bfloat16)
    both[0].copy_(k)
    both[1].copy_(v)
    return Content(group, seed, both[0], both[1])
