"""Prefill jobs: a chunk of queries over its history, short (after a rest) and sustained."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch

from bench import gate
from bench.data import make_view, peer_layout, queries
from bench.peers import Peers
from bench.rows import Rows
from bench.timing import by_events, rest
from kernels import ops
from kernels.view import Geometry, View

Job = tuple[float, str, Callable[[], None]]
TIMINGS = (("short", 35.0), ("sustained", 300.0))


def flops_of(view: View, tokens: int) -> float:
    """Useful operations: 4 D per query head and visible token."""
    g, total = view.geometry, max(view.lengths_host)
    return 4.0 * g.q_heads * g.head_dim * ((total - tokens) * tokens + tokens * (tokens + 1) / 2)


def fields(view: View, work: str, tokens: int) -> dict[str, object]:
    """What identifies a prefill row."""
    g = view.geometry
    return {
        "work": work,
        "sequences": 1,
        "context_tokens": max(view.lengths_host),
        "query_tokens": tokens,
        "q_heads": g.q_heads,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "kv_dtype": g.kv_dtype,
        "page_tokens": g.page_tokens,
        "table_order": "shuffled",
        "layers": g.layers,
    }


def time_both(rows: Rows, call: Callable[[], object], flops: float, verdict: gate.Verdict | None,
              timings: tuple[tuple[str, float], ...], targets: dict[str, object],
              **row: object) -> None:  # fmt: skip
    """A short timing from rest, and a sustained one."""
    for name, ms in timings:
        rest()
        sample = by_events(call, ms)
        rows.add(sample, verdict, flops=flops, timing=name, target=targets.get(name, ""), **row)


def ours(rows: Rows, work: str, view: View, tokens: int, targets: dict[str, object],
         timings: tuple[tuple[str, float], ...] = TIMINGS) -> torch.Tensor:  # fmt: skip
    """Check, then time; returns the queries."""
    g = view.geometry
    layer, start = g.layers - 1, max(view.lengths_host) - tokens
    q = queries(g, tokens)
    plan = ops.plan_prefill(view, 0, start, tokens)
    out = torch.full(q.shape, math.nan, dtype=torch.bfloat16, device=q.device)
    lse = torch.full(q.shape[:2], math.nan, device=q.device)
    call = partial(ops.prefill, view, layer, q, plan, out, lse)
    call()
    verdict = gate.prefill(view, layer, q, 0, start, out, lse)
    time_both(rows, call, flops_of(view, tokens), verdict, timings, targets, kernel="ours",
              variant=plan.variant, **fields(view, work, tokens))  # fmt: skip
    return q


def beside(rows: Rows, work: str, view: View, q: torch.Tensor, peers: Peers, ceiling: bool) -> None:
    """FA3 on the same K/V, and cuDNN without a mask on contiguous K/V."""
    g, tokens, total = view.geometry, len(q), max(view.lengths_host)
    row = fields(view, work, tokens)
    if peers.has("FA3"):
        k, v = peer_layout(view, g.layers - 1)
        call = peers.fa3(q, k, v, view.page_table, view.lengths, True, 1)
        out = call()[0]
        verdict = gate.prefill(view, g.layers - 1, q, 0, total - tokens, out, None)
        time_both(rows, call, flops_of(view, tokens), verdict, TIMINGS, {}, kernel="FA3",
                  variant="splits 1", **row)  # fmt: skip
    if ceiling and peers.has("cuDNN"):
        call = peers.cudnn(tokens, total, g.q_heads, g.kv_heads, g.head_dim)
        row |= {"table_order": "contiguous", "gate": "not checked", "note": "no mask, FP8 output"}
        flops = 4.0 * g.q_heads * g.head_dim * tokens * total
        time_both(rows, call, flops, None, TIMINGS, {}, kernel="cuDNN", variant="sdpa_fp8", **row)


def needle(rows: Rows, context: int, tokens: int) -> None:
    """One key in ten million answers one query of a chunk."""
    view = make_view([context], Geometry(1, 1, 8, 128))
    q = queries(view.geometry, tokens)
    planted = gate.Needle(view, 0, q[tokens // 2, 5], context // 3)
    out, _ = ops.prefill(view, 0, q, ops.plan_prefill(view, 0, context - tokens, tokens))
    result = "ok" if planted.found(out[tokens // 2, 5]) else "failed: the needle was not found"
    row = fields(view, f"prefill needle {context}", tokens)
    rows.add(None, None, kernel="ours", gate=result, **row)


def jobs(rows: Rows, peers: Peers, dry: bool) -> list[Job]:
    """Prefill jobs, ranked."""
    history = 400 if dry else 1 << 17
    shapes = [
        (8192, 8, 1040, 980),
        (2048, 5, 1000, 950),
        (8192, 5, 1020, 970),
        (2048, 8, 1000, 950),
    ]
    found: list[Job] = []
    for index, (tokens, heads, short, sustained) in enumerate(shapes):
        work = f"prefill {tokens} x {heads} over 128Ki"

        def call(
            work: str = work,
            tokens: int = tokens,
            heads: int = heads,
            targets: tuple[int, int] = (short, sustained),
            first: bool = not index,
        ) -> None:
            view = make_view([history], Geometry(2, 1, heads, 128))
            count = min(tokens, 20) if dry else tokens
            names = dict(zip(("short", "sustained"), targets, strict=True))
            q = ours(rows, work, view, count, names)
            beside(rows, work, view, q, peers, ceiling=first)

        found.append((2 + index / 10, work, call))

    def long() -> None:
        view = make_view([2000 if dry else 10_000_000], Geometry(1, 1, 8, 128))
        sustained = (("sustained", 600.0),)
        ours(rows, "prefill 2048 x 8 over 10M", view, 20 if dry else 2048, {"sustained": 950},
             sustained)  # fmt: skip

    found.append((3.0, "prefill 2048 x 8 over 10M", long))
    context, tokens = (3000, 10) if dry else (10_000_000, 64)
    found.append((3.1, "prefill needle", lambda: needle(rows, context, tokens)))
    for index, (depth, dtype, page) in enumerate(
        [(64, "fp8_e4m3", 128), (256, "fp8_e4m3", 128), (128, "bf16", 128)]
        + [(128, "fp8_e4m3", page) for page in (16, 32, 64)]
    ):
        work = f"prefill 2048 x 8 over 128Ki D{depth} {dtype} page {page}"

        def other(work: str = work, shape: tuple[int, str, int] = (depth, dtype, page)) -> None:
            view = make_view([history], Geometry(1, 1, 8, *shape))
            ours(rows, work, view, 20 if dry else 2048, {}, TIMINGS[:1])

        found.append((6 + index / 10, work, other))
    return found
