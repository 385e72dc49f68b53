"""Every configuration of the kernels compiled for sm_90, ahead of the tests that read them.

Two processes that yield to everything else compile; the instructions of all kernels are read in
one go, since starting the disassembler takes longer than reading a kernel.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import Future, ProcessPoolExecutor
from functools import cached_property

import torch

from kernels.config import all_decode_configs
from kernels.prefill_config import HopperConfig, all_prefill_configs
from kernels.view import Geometry
from tests.kernels.cases import empty_view, random_q
from tests.kernels.sass import Compiled, capture, disassemble

DECODES = {
    f"d{g.head_dim} {g.kv_dtype} page {g.page_tokens} n {c.n} stages {c.num_stages}": (g, c)
    for g, c in all_decode_configs()
}
PREFILLS = {f"{c.variant}-{g.head_dim}-{g.kv_dtype}": (g, c) for g, c in all_prefill_configs()}
APPENDS = {
    f"d{head_dim} {kv_dtype} page {page} from {dtype}": (head_dim, kv_dtype, page, dtype)
    for head_dim, kv_dtype, page, dtype in (
        (64, "fp8_e4m3", 128, torch.bfloat16),
        (128, "fp8_e4m3", 128, torch.bfloat16),
        (128, "fp8_e4m3", 128, torch.float32),
        (256, "fp8_e4m3", 128, torch.bfloat16),
        (128, "fp8_e4m3", 16, torch.bfloat16),
        (128, "bf16", 128, torch.bfloat16),
    )
}


def compile_decode(geometry, config):
    """The decode kernel of a configuration, without the merge that follows it."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode

    view = empty_view(geometry, [1000, 300])
    plan = plan_decode(view, config=config)
    plan.cut.merges.clear()
    with capture() as launches:
        decode(view, 1, random_q(geometry, 2), plan)
    return launches


def compile_prefill(geometry, config):
    """The prefill kernel and the merge of a chunk that needs both."""
    from kernels.prefill import plan_prefill, prefill

    view = empty_view(geometry, [3300])
    variant = config.variant if isinstance(config, HopperConfig) else "triton"
    plan = plan_prefill(view, 0, 3000, 300, variant=variant)
    assert plan.variant == config.variant and len(plan.cut.merges)
    with capture() as launches:
        prefill(view, geometry.layers - 1, random_q(geometry, 300), plan)
    return launches


def compile_append(head_dim, kv_dtype, page, dtype):
    """The tile kernel, then the token kernel of a run and of scattered tokens."""
    from kernels.append import append, append_run

    view = empty_view(Geometry(2, 2, 4, head_dim, kv_dtype, page), [1000, 300])
    x = torch.zeros(300, 2, head_dim, dtype=dtype)
    where = torch.zeros(2, dtype=torch.int32)
    with capture() as launches:
        append_run(view, 1, x, x, 0, page)
        append(view, 1, x[:2], x[:2], where, where.long())
    return launches


def compile_merges():
    """The merge of pieces at every size, then the merge of ranks."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode
    from kernels.merge import PIECES, merge

    geometry = Geometry(1, 1, 5, 128)
    view = empty_view(geometry, [1 << 17])
    q = random_q(geometry, 1)
    with capture() as launches:
        for pieces, _ in PIECES:
            decode(view, 0, q, plan_decode(view, pieces // 2))
        merge(torch.zeros(4, 3, 128), torch.zeros(4, 3))
    return launches


class MachineCode:
    """Starts all compilations at once; ``[name]`` waits for them and gives those of one job."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(
            2, multiprocessing.get_context("spawn"), initializer=os.nice, initargs=(7,)
        )
        work = [
            *((name, compile_decode, case) for name, case in DECODES.items()),
            *((name, compile_prefill, case) for name, case in PREFILLS.items()),
            *((name, compile_append, case) for name, case in APPENDS.items()),
            ("merges", compile_merges, ()),
        ]
        self._jobs: dict[str, Future[list[Compiled]]] = {
            name: self._pool.submit(function, *case) for name, function, case in work
        }
        assert len(self._jobs) == len(work), "two jobs of one name"

    @cached_property
    def _kernels(self) -> dict[str, list[Compiled]]:
        made = {name: job.result() for name, job in self._jobs.items()}
        disassemble([kernel for kernels in made.values() for kernel in kernels])
        return made

    def __getitem__(self, name: str) -> list[Compiled]:
        return self._kernels[name]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
