"""How a chunk of prefill is cut into equal shares, in plain numpy.

The query rows of one KV head (its tokens times its group of query heads, position-major) are cut
into *row tiles*; a row tile sees a run of K/V tiles. All (row tile, K/V tile) pairs are laid out in
a line and cut into one share a program, so that a small chunk over a long history keeps every SM
busy. A piece of a row tile within one share is a *segment*; where a row tile has several, each
writes a float32 partial to a *slot* and a small kernel merges them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray

from kernels.prefill_scratch import MERGE_INTS, SEGMENT_INTS
from kernels.view import Geometry

# Columns of a segment: its row tile's first row, KV head, K/V tiles [lo, hi), of which
# [clear_lo, clear_hi) are visible to all its rows, its slot (-1: the whole row tile), and which of
# its clear tiles is the first one to be read; from the last one it goes on at clear_lo.
ROW, HEAD, LO, HI, CLEAR_LO, CLEAR_HI, SLOT, TURN = range(8)
OVERHEAD_TILES = 4  # what starting and ending a segment costs, in K/V tiles
LEAST_TILES = 6  # no segment is shorter, unless its row tile is


@dataclass(frozen=True)
class Cut:
    """A chunk's work: segments in the order of the programs that run them.

    Parameters
    ----------
    rows, tile_tokens : int
        Query rows of a row tile; tokens of a K/V tile.
    segments : numpy.ndarray
        int32 ``[n, 8]``; columns as above.
    shares : numpy.ndarray
        int32 ``[programs + 1]``: program p runs segments ``[shares[p], shares[p + 1])``.
    merges : numpy.ndarray
        int32 ``[m, 4]``: the row tiles that are in pieces.
    slots : int
        Partials to be stored.
    """

    rows: int
    tile_tokens: int
    segments: NDArray[np.int32]
    shares: NDArray[np.int32]
    merges: NDArray[np.int32]
    slots: int


@dataclass(frozen=True)
class RowTile:
    """What one row tile reads: K/V tiles [lo, hi), of which [clear_lo, clear_hi) need no mask."""

    row: int
    head: int
    lo: int
    hi: int
    clear_lo: int
    clear_hi: int


def row_tiles(
    start: int, tokens: int, window: int, geometry: Geometry, rows: int, tile_tokens: int
) -> list[RowTile]:
    """Row tiles of the chunk, KV head by KV head.

    Parameters
    ----------
    start, tokens : int
        The queries are tokens ``[start, start + tokens)``; query t sees ``[window, start + t]``.
    window : int
        First visible token.
    geometry : Geometry
    rows, tile_tokens : int
        Query rows of a row tile; tokens of a K/V tile.
    """
    tiles = []
    lo = window // tile_tokens
    for row in range(0, tokens * geometry.group, rows):
        first = row // geometry.group
        last = min((row + rows - 1) // geometry.group, tokens - 1)
        hi = (start + last) // tile_tokens + 1
        clear_lo = -(-window // tile_tokens)
        clear_hi = (start + first + 1) // tile_tokens
        if clear_hi <= clear_lo:
            clear_lo = clear_hi = lo
        tiles.append((row, lo, hi, clear_lo, clear_hi))
    return [
        RowTile(row, head, *reads) for head in range(geometry.kv_heads) for row, *reads in tiles
    ]


def _fill(lengths: list[int], programs: int, share: int) -> list[tuple[int, int, int, int]] | None:
    """Give each program up to ``share`` tiles, overheads included; None if work is left over."""
    pieces = []
    run = done = 0
    for program in range(programs):
        budget = share
        while run < len(lengths):
            rest = lengths[run] - done
            take = min(rest, budget - OVERHEAD_TILES)
            if take < rest:
                take = min(take, rest - LEAST_TILES)
                if take < LEAST_TILES:
                    break
            pieces.append((program, run, done, done + take))
            budget -= take + OVERHEAD_TILES
            done += take
            if done == lengths[run]:
                run, done = run + 1, 0
        if run == len(lengths):
            return pieces
    return None


def _pieces(lengths: list[int], programs: int) -> tuple[list[tuple[int, int, int, int]], int]:
    """Cut runs of tiles into shares with the least largest: (program, run, first, end), share."""
    share = -(-(sum(lengths) + OVERHEAD_TILES * len(lengths)) // programs)
    while True:
        pieces = _fill(lengths, programs, share)
        if pieces is not None:
            return pieces, share - OVERHEAD_TILES
        share += 1 + share // 256


def _in_step(
    pieces: list[tuple[int, int, int, int]], lengths: list[int], share: int
) -> list[tuple[int, int, int, int, int]]:
    """Order the work of each program so that all of them read the same K/V at the same time.

    Row tiles read the same history, which may be far larger than the L2 cache: programs that are in
    step read a tile from memory once, programs at places of their own once for each row tile. At
    step t a program should be at a place that is t modulo the share. One that has part of one row
    tile starts at the first multiple of the share and turns around at its end; one that has the end
    of a row tile and the beginning of the next takes the beginning first. The fifth number is the
    tile, counted from ``first``, at which a piece starts.
    """
    found = []
    for _, group in groupby(pieces, key=itemgetter(0)):
        mine = [(*piece, 0) for piece in group]
        if len(mine) == 1:
            program, run, first, end, _ = mine[0]
            turn = -(-first // share) * share - first
            mine = [(program, run, first, end, turn if first + turn < end else 0)]
        mine.sort(key=lambda piece: (piece[3] - piece[2] == lengths[piece[1]], piece[2]))
        found += mine
    return found


def cut(
    start: int,
    tokens: int,
    window: int,
    geometry: Geometry,
    rows: int,
    tile_tokens: int,
    programs: int,
) -> Cut:
    """Cut a chunk's work into equal shares; parameters as in :func:`row_tiles`."""
    tiles = row_tiles(start, tokens, window, geometry, rows, tile_tokens)
    lengths = [t.hi - t.lo for t in tiles]
    pieces, share = _pieces(lengths, programs)
    slots, merges = _slots(pieces, tiles)
    ordered = _in_step(pieces, lengths, share)
    segments = np.zeros((len(pieces), SEGMENT_INTS), np.int32)
    for segment, (_, run, first, end, turn) in zip(segments, ordered, strict=True):
        tile = tiles[run]
        slot = slots.get((run, first), -1)
        lo, hi = tile.lo + first, tile.lo + end
        clear_lo, clear_hi = max(lo, tile.clear_lo), min(hi, tile.clear_hi)
        if clear_hi <= clear_lo:
            # No clear tile: all of them are masked, from the first on.
            clear_lo = clear_hi = lo
        turn = min(max(0, lo + turn - clear_lo), max(0, clear_hi - clear_lo - 1))
        segment[:] = (tile.row, tile.head, lo, hi, clear_lo, clear_hi, slot, turn)
    programs_of = [program for program, _, _, _ in pieces]
    shares = np.searchsorted(programs_of, np.arange(programs + 1)).astype(np.int32)
    table = np.array(merges, np.int32).reshape(-1, MERGE_INTS)
    return Cut(rows, tile_tokens, segments, shares, table, len(slots))


def _slots(
    pieces: list[tuple[int, int, int, int]], tiles: list[RowTile]
) -> tuple[dict[tuple[int, int], int], list[tuple[int, int, int, int]]]:
    """Slots of the pieces (run, first) of row tiles that were cut, in order, and their merges."""
    slots: dict[tuple[int, int], int] = {}
    merges = []
    for run, group in groupby(pieces, key=itemgetter(1)):
        firsts = [first for _, _, first, _ in group]
        if len(firsts) > 1:
            merges.append((tiles[run].row, tiles[run].head, len(slots), len(firsts)))
            slots |= {(run, first): len(slots) + index for index, first in enumerate(firsts)}
    return slots, merges
