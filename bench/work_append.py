"""Append jobs: whole tiles of a long run, and one token of each of many sequences."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from bench.cast import cast
from bench.data import device, make_view
from bench.peers import Peers
from bench.rows import Rows
from bench.timing import by_events, by_graph, by_graphs
from kernels import ops, reference
from kernels.view import Geometry, View

Job = tuple[float, str, Callable[[], None]]


def stored(view: View, k: torch.Tensor, v: torch.Tensor, row: int, start: int) -> str:
    """Whether layer 0 holds exactly the codes of k and v from ``start`` on, head by head."""
    for head in range(view.geometry.kv_heads):
        found = reference.gather(view, 0, head, row, start, start + len(k))
        for x, got, scale in zip((k, v), found, (view.k_scale, view.v_scale), strict=True):
            codes = reference.quantise(x[:, head], scale[head], view.geometry.kv_dtype)
            if not torch.equal(reference.dequantise(codes, scale[head]), got):
                return "failed: other codes are stored"
    return "ok"


def fields(view: View, work: str, tokens: int) -> dict[str, object]:
    """What identifies an append row."""
    g = view.geometry
    return {
        "work": work,
        "kernel": "ours",
        "sequences": view.sequences,
        "query_tokens": tokens,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "kv_dtype": g.kv_dtype,
        "page_tokens": g.page_tokens,
        "layers": g.layers,
    }


def tiles(rows: Rows, tokens: int, kv_heads: int) -> None:
    """A run of whole tiles, bf16 to FP8, beside a cast of as many bytes that lie in order.

    Bytes are those written; the note has those moved, of which the source is two thirds.
    """
    view = make_view([tokens], Geometry(2, kv_heads, kv_heads, 128))
    k, v = torch.randn((2, tokens, kv_heads, 128), device=device()).to(torch.bfloat16)
    call = partial(ops.append_run, view, 0, k, v, 0, 0)
    call()
    check = min(tokens, 4096)
    result = stored(view, k[:check], v[:check], 0, 0)
    flat = k.new_empty(2 * k.numel(), dtype=torch.float8_e4m3fn)
    both = torch.cat([k.reshape(-1), v.reshape(-1)])
    straight = partial(cast, both, flat)
    written = 2 * k.numel()
    samples = {"cold": [by_events(call, 40), by_events(straight, 40)]}
    samples["graph"] = by_graphs([[call] * 8, [straight] * 8], 40)
    row = fields(view, f"append tiles {tokens} x {kv_heads}", tokens)
    for timing, (ours, ceiling) in samples.items():
        share = ceiling.median_us / ours.median_us
        for name, sample, gate in (("ours", ours, result), ("cast", ceiling, "no answer")):
            note = f"{3 * written / sample.median_us / 1e6:.3f} TB/s read and written"
            if name == "ours":
                note += f", {share:.0%} of a cast in order"
            good = None if gate.startswith("failed") else sample
            rows.add(good, None, written, gate=gate, timing=timing, note=note,
                     **row | {"kernel": name})  # fmt: skip


def tokens_of_many(rows: Rows, sequences: int, kv_heads: int) -> None:
    """One token of each sequence in each layer, as a decode step does."""
    lengths = [300 + 7 * index for index in range(sequences)]
    view = make_view(lengths, Geometry(8, kv_heads, kv_heads, 128))
    shape = (sequences, kv_heads, 128)
    k, v = (torch.randn(shape, device=device()).to(torch.bfloat16) for _ in range(2))
    index = torch.arange(sequences, dtype=torch.int32, device=device())
    positions = view.lengths - 1
    ops.append(view, 0, k, v, index, positions)
    results = {
        stored(view, k[row : row + 1], v[row : row + 1], row, lengths[row] - 1)
        for row in range(sequences)
    }
    result = "ok" if results == {"ok"} else max(results - {"ok"})
    calls = [partial(ops.append, view, layer, k, v, index, positions) for layer in range(8)]
    sample = by_graph(calls, 40)
    rows.add(sample if result == "ok" else None, None, 2 * k.numel(), gate=result, timing="graph",
             target=8, **fields(view, f"append {sequences} tokens x {kv_heads}", 1))  # fmt: skip


def jobs(rows: Rows, peers: Peers, dry: bool) -> list[Job]:
    """Append jobs, ranked."""
    many = 256 if dry else 1 << 16
    return [
        (1.7, "append tiles", lambda: tiles(rows, many, 1)),
        (1.8, "append tiles, 2 heads", lambda: tiles(rows, 16 * many, 2)),
        (1.9, "append tokens", lambda: tokens_of_many(rows, 3 if dry else 64, 1)),
    ]
