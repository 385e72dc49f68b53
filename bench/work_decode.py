"""Decode jobs: one query token of each sequence, times through CUDA graphs over several layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench import gate
from bench.data import make_view, peer_layout, queries, with_table
from bench.peers import DECODE_SPLITS, Peers
from bench.rows import Rows
from bench.timing import Sample, by_graph, by_graphs
from kernels import ops
from kernels.view import Geometry, View

Job = tuple[float, str, Callable[[], None]]
REP_MS = 60
ORDERS = ("shuffled", "identity")
MIXED = [1 << 20] + [1024 + index * 7919 % 256 * 1024 + index for index in range(63)]
SPARE_BYTES = 14 << 30


def fields(view: View, work: str, **more: object) -> dict[str, object]:
    """What identifies a decode row."""
    g = view.geometry
    return {
        "work": work,
        "sequences": view.sequences,
        "context_tokens": max(view.lengths_host),
        "query_tokens": 1,
        "q_heads": g.q_heads,
        "kv_heads": g.kv_heads,
        "head_dim": g.head_dim,
        "kv_dtype": g.kv_dtype,
        "page_tokens": g.page_tokens,
        "layers": g.layers,
        "timing": "graph",
    } | more


def step_bytes(view: View) -> float:
    """K/V bytes that one layer's step must read."""
    return sum(view.lengths_host) * view.geometry.token_bytes / view.geometry.layers


def step(view: View) -> tuple[list[Callable[[], object]], gate.Verdict, str]:
    """Check the last layer; the calls of all layers, and the kernel's name."""
    g = view.geometry
    q = queries(g, view.sequences)
    plan = ops.plan_decode(view, unsettled_tokens=1)  # as in a step: one token is new
    out = torch.full(q.shape, math.nan, device=q.device)
    lse = torch.full(q.shape[:2], math.nan, device=q.device)
    ops.decode(view, g.layers - 1, q, plan, out, lse)
    verdict = gate.decode(view, g.layers - 1, q, out, lse)
    calls = [partial(ops.decode, view, layer, q, plan, out, lse) for layer in range(g.layers)]
    return calls, verdict, plan.variant


def time_ours(view: View, orders: tuple[str, ...]) -> dict[str, tuple[Sample, gate.Verdict, str]]:
    """Steps on a shuffled table, and on an identity table over the same memory, in turns."""
    steps = {o: step(view if o == "shuffled" else with_table(view, False)) for o in orders}
    samples = by_graphs([calls for calls, _, _ in steps.values()], REP_MS)
    return {
        order: (sample, verdict, variant)
        for (order, (_, verdict, variant)), sample in zip(steps.items(), samples, strict=True)
    }


def ours(rows: Rows, work: str, view: View, target: object = "", orders: int = 2) -> None:
    """Our kernel on both tables."""
    for order, (sample, verdict, variant) in time_ours(view, ORDERS[:orders]).items():
        rows.add(sample, verdict, step_bytes(view), **fields(view, work), kernel="ours",
                 variant=variant, table_order=order, target=target)  # fmt: skip


def peers_of(rows: Rows, work: str, view: View, peers: Peers) -> None:
    """FA3 with its best split, and XQA with 8 heads of bf16 queries, on the same K/V."""
    if not peers.modules:
        return
    copies = [peer_layout(view, layer) for layer in range(view.geometry.layers)]
    for name, time_peer in (("FA3", _time_fa3), ("XQA", _time_xqa)):
        row = fields(view, work) | {"kernel": name, "table_order": "shuffled"}
        if not peers.has(name):
            continue
        try:
            sample, verdict, variant, q_heads = time_peer(view, copies, peers)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            rows.add(None, None, **row | {"gate": f"failed: {reason}"})
            continue
        row |= {"variant": variant, "q_heads": q_heads}
        rows.add(sample, verdict, step_bytes(view), **row)


def _time_fa3(view: View, copies: list[tuple[torch.Tensor, torch.Tensor]],
              peers: Peers) -> tuple[Sample, gate.Verdict, str, int]:  # fmt: skip
    g = view.geometry
    q = queries(g, view.sequences)
    best: tuple[Sample, gate.Verdict, str, int] | None = None
    for splits in DECODE_SPLITS:
        calls = [peers.fa3(q, k, v, view.page_table, view.lengths, True, splits) for k, v in copies]
        verdict = gate.decode(view, g.layers - 1, q, calls[-1]()[0].view(q.shape), None)
        sample = by_graph(calls, REP_MS)
        if best is None or sample.median_us < best[0].median_us:
            best = sample, verdict, f"splits {splits}", g.q_heads
    assert best is not None
    return best


def _time_xqa(view: View, copies: list[tuple[torch.Tensor, torch.Tensor]],
              peers: Peers) -> tuple[Sample, gate.Verdict, str, int]:  # fmt: skip
    g = view.geometry
    wide = Geometry(g.layers, g.kv_heads, 8 * g.kv_heads, g.head_dim)
    q = queries(wide, view.sequences).to(torch.bfloat16)
    calls = [peers.xqa(q, k, v, view.page_table, view.lengths) for k, v in copies]
    out = calls[-1]()
    out = out[0] if isinstance(out, (tuple, list)) else out
    seen = replace(view, geometry=wide)
    verdict = gate.decode(seen, g.layers - 1, q, out.view(q.shape), None)
    return by_graph(calls, REP_MS), verdict, "bf16 queries", wide.q_heads


def whole_step(rows: Rows, context: int, layers: int) -> None:
    """Every layer of a rank that holds one long sequence: as many as fit the device."""
    g = Geometry(1, 1, 5, 128)
    if not layers:
        free = torch.cuda.mem_get_info()[0]
        layers = int((free - SPARE_BYTES) // (context * g.token_bytes))
    view = make_view([context], Geometry(layers, 1, 5, 128))
    note = f"{view.arena.numel() / 2**30:.1f} GiB of K/V"
    for order, (sample, verdict, variant) in time_ours(view, ORDERS).items():
        whole = Sample(sample.median_us * layers, sample.iqr_us * layers, sample.count)
        rows.add(whole, verdict, step_bytes(view) * layers, kernel="ours", variant=variant,
                 table_order=order, target=4.4, note=note,
                 **fields(view, f"decode all layers of {context} tokens"))  # fmt: skip


def needle(rows: Rows, context: int) -> None:
    """One key in ten million answers."""
    view = make_view([context], Geometry(1, 1, 5, 128))
    q = queries(view.geometry, 1)
    planted = gate.Needle(view, 0, q[0, 3], context // 3)
    out, _ = ops.decode(view, 0, q, ops.plan_decode(view))
    result = "ok" if planted.found(out[0, 3]) else "failed: the needle was not found"
    rows.add(None, None, kernel="ours", gate=result, **fields(view, f"decode needle {context}"))


def jobs(rows: Rows, peers: Peers, dry: bool) -> list[Job]:
    """Decode jobs, ranked."""

    def scaled(tokens: int) -> int:
        return max(200, tokens >> 12) if dry else tokens

    def job(work: str, lengths: list[int], geometry: Geometry, target: object = "",
            beside: bool = True, orders: int = 2) -> Callable[[], None]:  # fmt: skip
        def call() -> None:
            view = make_view([scaled(n) for n in lengths], geometry)
            ours(rows, work, view, target, orders)
            if beside:
                peers_of(rows, work, view, peers)

        return call

    one, two = (1, 5, 128), (2, 8, 128)
    mi = 1 << 20
    found: list[Job] = [
        (1.0, "decode 10Mi", job("decode 10Mi", [10 * mi], Geometry(2, *one), 4.45)),
        (1.1, "decode 1Mi", job("decode 1Mi", [mi], Geometry(6, *one), 4.0)),
        (1.2, "decode 128Ki", job("decode 128Ki", [mi >> 3], Geometry(12, *one), 2.7)),
        (1.3, "decode mixed", job("decode 64 mixed", MIXED, Geometry(2, *one), 4.0)),
        (1.5, "decode report 1Mi",
         job("decode report 1Mi", [mi], Geometry(4, *two), 4.0, orders=2)),
        (1.6, "decode report 5M",
         job("decode report 5M", [5_000_000], Geometry(2, *two), 4.45, beside=False)),
        (1.4, "decode whole step",
         lambda: whole_step(rows, scaled(10_000_000), 2 if dry else 0)),
        (1.45, "decode needle", lambda: needle(rows, scaled(10_000_000))),
    ]  # fmt: skip
    for index, (depth, dtype, page) in enumerate(
        [(64, "fp8_e4m3", 128), (256, "fp8_e4m3", 128), (128, "bf16", 128)]
        + [(128, "fp8_e4m3", page) for page in (16, 32, 64)]
    ):
        work = f"decode 1Mi D{depth} {dtype} page {page}"
        geometry = Geometry(4, 1, 5, depth, dtype, page)
        found.append((5 + index / 10, work, job(work, [mi], geometry, "", False, 1)))
    return found
