"""What every configuration of the chooser compiles to on sm_90: the speed, held without a GPU.

FP8 must run on QGMMA and BF16 on HGMMA (a fall-back to HMMA costs a third of the bandwidth), tiles
must come by TMA where the variant says so, and nothing may spill.
"""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from kernels.config import all_decode_configs
from kernels.view import Geometry
from tests.kernels.cases import empty_view, random_q

SM_REGISTERS = 65536
SM_SHARED_BYTES = 228 * 1024
PROGRAM_SHARED_BYTES = 1024  # what the driver keeps of a program's shared memory

DECODES = {
    f"d{g.head_dim} {g.kv_dtype} page {g.page_tokens} n {c.n} stages {c.num_stages}": (g, c)
    for g, c in all_decode_configs()
}
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
    from tests.kernels.sass import capture

    view = empty_view(geometry, [1000, 300])
    plan = plan_decode(view, config=config)
    plan.cut.merges.clear()
    with capture() as launches:
        decode(view, 1, random_q(geometry, 2), plan)
    return launches[0].summary()


def compile_append(head_dim, kv_dtype, page, dtype):
    """The tile kernel, then the token kernel of a run and of scattered tokens."""
    from kernels.append import append, append_run
    from tests.kernels.sass import capture

    view = empty_view(Geometry(2, 2, 4, head_dim, kv_dtype, page), [1000, 300])
    x = torch.zeros(300, 2, head_dim, dtype=dtype)
    where = torch.zeros(2, dtype=torch.int32)
    with capture() as launches:
        append_run(view, 1, x, x, 0, page)
        append(view, 1, x[:2], x[:2], where, where.long())
    return [launch.summary() for launch in launches]


def compile_merges():
    """The merge of ranks, and the merge of pieces at every size."""
    from kernels.decode import decode
    from kernels.decode_plan import plan_decode
    from kernels.merge import PIECES, merge
    from tests.kernels.sass import capture

    geometry = Geometry(1, 1, 5, 128)
    view = empty_view(geometry, [1 << 17])
    q = random_q(geometry, 1)
    with capture() as launches:
        for pieces, _ in PIECES:
            decode(view, 0, q, plan_decode(view, pieces // 2))
        merge(torch.zeros(4, 3, 128), torch.zeros(4, 3))
    return [launch.summary() for launch in launches]


@pytest.fixture(scope="module")
def compiled():
    """Results of the compilations above, made ahead by two processes."""
    pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))
    jobs = {name: pool.submit(compile_decode, *case) for name, case in DECODES.items()}
    jobs |= {name: pool.submit(compile_append, *case) for name, case in APPENDS.items()}
    jobs["merges"] = pool.submit(compile_merges)
    yield lambda name: jobs[name].result()
    pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", DECODES)
def test_decode(name, compiled):
    geometry, config = DECODES[name]
    kernel = compiled(name)
    assert kernel.name == "decode_kernel"
    assert kernel.stack_bytes == 0
    assert kernel.warnings == []
    assert kernel.count("HMMA") == 0
    fp8 = geometry.kv_dtype == "fp8_e4m3"
    assert (kernel.count("QGMMA") > 0) == fp8
    assert (kernel.count("HGMMA") > 0) == (not fp8)
    tma = config.variant == "swap_ab_tma"
    assert (kernel.count("UTMALDG") > 0) == tma
    if tma:  # whole tiles of the next layer's first pages are asked for before this one has ended
        assert kernel.count("UBLKPF") == 2
    else:  # 16 bytes at a time, into shared memory
        assert kernel.opcodes["LDGSTS.E.BYPASS.128"] >= 8
    assert kernel.count("ACQBULK") == 1  # waits for the kernel before, which let it start early


@pytest.mark.parametrize("name", DECODES)
def test_decode_programs_fit_an_sm(name, compiled):
    _, config = DECODES[name]
    kernel = compiled(name)
    threads = 32 * kernel.num_warps
    registers = -(-kernel.registers // 8) * 8  # allocated by eight
    assert config.programs_per_sm * threads * registers <= SM_REGISTERS
    shared = kernel.shared_bytes + PROGRAM_SHARED_BYTES
    assert config.programs_per_sm * shared <= SM_SHARED_BYTES


@pytest.mark.parametrize("name", APPENDS)
def test_append(name, compiled):
    tiles, *tokens = compiled(name)
    assert tiles.name == "append_tiles_kernel"
    assert {t.name for t in tokens} == {"append_tokens_kernel"}
    assert all(k.stack_bytes == 0 and k.warnings == [] for k in (tiles, *tokens))
    stores = {op: n for op, n in tiles.opcodes.items() if op.startswith("STG")}
    assert set(stores) == {"STG.E.128"}


def test_merges(compiled):
    kernels = compiled("merges")
    merges = [k for k in kernels if k.name == "merge_kernel"]
    assert len(merges) == 5
    assert [k.count("ACQBULK") for k in merges] == [1, 1, 1, 1, 0]  # ranks' merge waits as usual
    assert all(k.stack_bytes == 0 and k.warnings == [] for k in merges)
