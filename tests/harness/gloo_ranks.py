"""Decode of several gloo ranks against one rank's float64: run by test_parallel, once for all.

Torch is imported once; the ranks are forked, so that eight of them start in a moment.
"""

from __future__ import annotations

import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist

from harness.model_spec import ModelSpec
from harness.ranks import Place, share_tokens
from harness.ranks_buffers import make_buffers
from harness.ranks_exchange import Exchange, project
from harness.ranks_gate import check_step
from harness.ranks_group import Collectives, Sizes
from harness.ranks_pulse import Counters
from kernels import ops
from kernels.reference import attention, dequantise, quantise
from strategies.device_host import HostDevice
from strategies.paged import Paged

Q_HEADS, KV_HEADS, DIM = 8, 2, 64
PAGE_TOKENS = 128
MODEL = ModelSpec("test", 1, Q_HEADS, KV_HEADS, DIM, "fp8_e4m3", Q_HEADS * DIM, DIM, 0)
LENGTHS = (1500, 1157)  # eight ranks have a page each, some a part of one
LAYOUTS = ((2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (2, 4), (1, 8))


def content(sequence: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V ``[tokens, KV_HEADS, DIM]`` of one sequence, over all ranks."""
    generator = torch.Generator().manual_seed(sequence)
    shape = (LENGTHS[sequence], KV_HEADS, DIM)
    return tuple(torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))


def queries() -> torch.Tensor:
    q = torch.randn((len(LENGTHS), Q_HEADS, DIM), generator=torch.Generator().manual_seed(7))
    return q.to(torch.float8_e4m3fn)


def one_rank(stored: bool) -> torch.Tensor:
    """Float64 attention over every token and head, of the stored codes or of the values."""
    outs = []
    for sequence, q in enumerate(queries()):
        k, v = content(sequence)
        if stored:
            k, v = (dequantise(quantise(x, 1.0, "fp8_e4m3"), 1.0) for x in (k, v))
        out, _ = attention(q[None].double(), k.double(), v.double(), DIM**-0.5)
        outs.append(out[0].flatten())
    return torch.stack(outs)


def filled(place: Place) -> Paged:
    """The rank's own strategy, its heads and its share of both sequences as the harness has them.

    What it stores is picked token by token: page p is of context rank p mod their number.
    """
    model = MODEL.kv_model(place.tensor_ranks, PAGE_TOKENS, 1)
    heads = list(place.kv_heads(KV_HEADS))
    strategy = Paged(HostDevice(1 << 26), model, 4096, len(LENGTHS))
    strategy.start()
    for sequence, length in enumerate(LENGTHS):
        ranks, own = place.context_ranks, place.context_index
        at = [token for token in range(length) if token // PAGE_TOKENS % ranks == own]
        strategy.open(sequence, 4096)
        strategy.extend(sequence, share_tokens(length, PAGE_TOKENS, ranks, own))
        k, v = (x[at][:, heads] for x in content(sequence))
        ops.append_run(strategy.batch([sequence])[0], 0, k, v, 0, 0)
    return strategy


def step(place: Place, counters: Counters) -> tuple[torch.Tensor, bool, bool]:
    """One decode step: attention, merge over pages, sum over heads; ``[S, hidden]``.

    With it, whether its gate passes the exchange as it is timed, and one that did not happen.
    """
    strategy = filled(place)
    view = strategy.batch(range(len(LENGTHS)))[0]
    width = MODEL.q_heads(place.tensor_ranks)
    q = queries()[:, place.tensor_index * width :][:, :width].contiguous()
    out, lse = ops.decode(view, 0, q, ops.plan_decode(view))
    hidden = Q_HEADS * DIM
    sizes = Sizes(len(LENGTHS), width, DIM, hidden, 1, place.tensor_ranks, place.context_ranks)
    group = Collectives(SimpleNamespace(place=place, counters=counters), "cpu")
    exchange = Exchange(group, sizes, make_buffers(view, sizes, group.context_size, None))
    merged, _ = exchange.merge(out, lse)
    project(merged, place.tensor_index, exchange.buffers.hidden)
    reduced = exchange.reduce().clone()
    exchange.forget()
    hollow = check_step(exchange, out, lse, sizes.step_bytes)
    before = group.moved_bytes
    exchange(out, lse)
    whole = check_step(exchange, out, lse, group.moved_bytes - before)
    return reduced, whole.passed, hollow.passed


def rank_process(place: Place, store: Path, result: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=60),
    )
    counters = Counters()
    reduced, *passed = step(place, counters)
    torch.save((reduced, counters.entered, counters.left, *passed), result)
    dist.barrier()
    dist.destroy_process_group()


def run_layout(
    tensor: int, context: int, folder: Path
) -> list[tuple[torch.Tensor, int, int, bool, bool]]:
    """Every rank's reduced output, the collectives that it entered and left, what its gate said."""
    world = tensor * context
    results = [folder / f"out{rank}.pt" for rank in range(world)]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                place = Place(rank, world, tensor, context)
                rank_process(place, folder / "store", results[rank])
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise SystemExit(f"{tensor} x {context}: a rank failed: {statuses}")
    return [torch.load(path) for path in results]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    stored, values = one_rank(stored=True), one_rank(stored=False)
    for tensor, context in LAYOUTS:
        own = folder / f"{tensor}x{context}"
        own.mkdir()
        for out, *seen in run_layout(tensor, context, own):
            print(tensor, context, relative(out, stored), relative(out, values), *map(int, seen))


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
