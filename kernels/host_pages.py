"""Pages in host memory: write codes into them and read them back as float32 blocks.

FP8 codes become float32 by bits instead of by a table: an E4M3 byte, sign-extended to 16 bits,
shifted left by 7 and cleared of the copied sign, is a float16 of 2**-8 times the value, exactly,
for every finite code, subnormal ones too. ``CODE_SCALE`` makes up for it. A NaN code reads as
+-480, so poison in the unwritten tail of a page cannot spread as NaN.
"""

from __future__ import annotations

import torch

from kernels.view import Geometry, View

CODE_SCALE = {"fp8_e4m3": 256.0, "bf16": 1.0}
BLOCK_TOKENS = 1 << 14  # keeps a block's float32 K and V within a last-level cache
_ELEMENT = {"fp8_e4m3": torch.int8, "bf16": torch.int16}


def tiles(view: View, layer: int, kv: int, head: int) -> torch.Tensor:
    """Every page's tile of one layer, K (0) or V (1), and KV head: ``[pages, elements]``.

    A strided view of the arena as int8 (FP8 codes) or int16 (BF16 bits); pages that are not
    backed must not be touched.
    """
    g = view.geometry
    pages = view.arena[: view.arena.numel() // g.page_bytes * g.page_bytes]
    offset = g.tile_offset(0, layer, kv, head)
    tile = pages.view(-1, g.page_bytes)[:, offset : offset + g.tile_bytes]
    return tile.view(_ELEMENT[g.kv_dtype])


def consecutive(pages: torch.Tensor) -> bool:
    """Whether a stretch of a page table names pages that follow each other in the arena."""
    return bool((pages[1:] - pages[:-1] == 1).all())


class BlockReader:
    """Reads blocks of pages as float32, into buffers that are allocated once."""

    def __init__(self, geometry: Geometry, block_tokens: int = BLOCK_TOKENS) -> None:
        self.block_pages = max(1, block_tokens // geometry.page_tokens)
        elements = geometry.page_tokens * geometry.head_dim
        shape = (self.block_pages, elements)
        self._geometry = geometry
        self._gathered = torch.empty(shape, dtype=_ELEMENT[geometry.kv_dtype])
        self._halves = torch.empty(shape, dtype=torch.int16)
        self._values = (torch.empty(shape), torch.empty(shape))

    def read(
        self, view: View, layer: int, head: int, row: int, first: int, last: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the pages at table positions [first, last) of one sequence.

        Returns
        -------
        k : torch.Tensor
            float32 ``[tokens, head_dim]``: values divided by ``CODE_SCALE`` and the head's scale.
        v : torch.Tensor
            float32 ``[pages, head_dim, page_tokens]``, likewise. Both live until the next call.
        """
        g = self._geometry
        pages = view.page_table[row, first:last]
        k = self._convert(tiles(view, layer, 0, head), pages, self._values[0])
        v = self._convert(tiles(view, layer, 1, head), pages, self._values[1])
        return k.view(-1, g.head_dim), v.view(-1, g.head_dim, g.page_tokens)

    def _convert(
        self, tile: torch.Tensor, pages: torch.Tensor, values: torch.Tensor
    ) -> torch.Tensor:
        count, start = len(pages), int(pages[0])
        if consecutive(pages):
            codes = tile[start : start + count]
        else:
            codes = torch.index_select(tile, 0, pages, out=self._gathered[:count])
        if self._geometry.kv_dtype == "bf16":
            return values[:count].copy_(codes.view(torch.bfloat16))
        halves = self._halves[:count].copy_(codes)
        halves.bitwise_left_shift_(7).bitwise_and_(~0x4000)
        return values[:count].copy_(halves.view(torch.float16))


def _elements(codes: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    return codes.view(_ELEMENT[geometry.kv_dtype])


def write_run(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, start: int
) -> None:
    """Store the codes of consecutive tokens of one sequence.

    Parameters
    ----------
    k, v : torch.Tensor
        Codes ``[T, kv_heads, D]`` of one byte (FP8) or two (BF16) an element, any strides but in
        the last dimension of ``k`` and either of the others of ``v``. V is stored transposed, so
        a ``v`` whose tokens are contiguous in memory is ten times as fast to store.
    row, start : int
        Row of the batch and position of the first token.
    """
    g = view.geometry
    size = g.page_tokens
    k, v = _elements(k, g), _elements(v, g)
    end = start + len(k)
    whole_lo, whole_hi = -(-start // size), end // size
    if whole_lo > whole_hi:  # within one page
        _write_part(view, layer, k, v, row, start)
        return
    if start % size:
        _write_part(view, layer, k, v, row, start, whole_lo * size)
    if whole_hi > whole_lo:
        cut = slice(whole_lo * size - start, whole_hi * size - start)
        _write_pages(view, layer, k[cut], v[cut], row, whole_lo)
    if end % size:
        cut = slice(whole_hi * size - start, None)
        _write_part(view, layer, k[cut], v[cut], row, whole_hi * size)


def _write_part(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    row: int,
    start: int,
    end: int | None = None,
) -> None:
    """Store tokens that lie within one page, up to position ``end`` or the last of ``k``."""
    g = view.geometry
    page = int(view.page_table[row, start // g.page_tokens])
    tokens = len(k) if end is None else end - start
    at = slice(start % g.page_tokens, start % g.page_tokens + tokens)
    for head in range(g.kv_heads):
        k_tile = tiles(view, layer, 0, head)[page].view(g.page_tokens, g.head_dim)
        v_tile = tiles(view, layer, 1, head)[page].view(g.head_dim, g.page_tokens)
        k_tile[at] = k[:tokens, head]
        v_tile[:, at] = v[:tokens, head].T


def _write_pages(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, first: int
) -> None:
    """Store whole pages from table position ``first`` on, a block of them at a time."""
    g = view.geometry
    size = g.page_tokens
    step = max(1, BLOCK_TOKENS // size)
    for lo in range(0, len(k) // size, step):
        count = min(step, len(k) // size - lo)
        pages = view.page_table[row, first + lo : first + lo + count]
        cut = slice(lo * size, (lo + count) * size)
        for head in range(g.kv_heads):
            by_page = k[cut, head].unflatten(0, (count, size))
            _put(tiles(view, layer, 0, head), pages, by_page)
            by_page = v[cut, head].unflatten(0, (count, size)).transpose(1, 2)
            _put(tiles(view, layer, 1, head), pages, by_page)


def _put(tile: torch.Tensor, pages: torch.Tensor, codes: torch.Tensor) -> None:
    """Store tiles ``codes [pages, ., .]``; scattered ones go through words of eight bytes."""
    if consecutive(pages):
        start = int(pages[0])
        tile[start : start + len(pages)].view(codes.shape).copy_(codes)
    else:
        words = codes.reshape(len(pages), -1).view(torch.int64)
        tile.view(torch.int64)[pages.long()] = words


def write_tokens(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Store the codes of single tokens, each at its own row and position of the batch."""
    g = view.geometry
    size = g.page_tokens
    k, v = _elements(k, g), _elements(v, g)
    pages = view.page_table[rows.long(), positions // size].long()
    at = positions.long() % size
    for head in range(g.kv_heads):
        k_tile = tiles(view, layer, 0, head).unflatten(1, (size, g.head_dim))
        v_tile = tiles(view, layer, 1, head).unflatten(1, (g.head_dim, size))
        k_tile[pages, at] = k[:, head]
        v_tile[pages, :, at] = v[:, head]
