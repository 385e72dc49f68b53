"""What every configuration of the chooser compiles to on sm_90: the speed, held without a GPU.

FP8 must run on QGMMA and BF16 on HGMMA (a fall-back to HMMA costs a third of the bandwidth), tiles
must come by TMA where the variant says so, and nothing may spill.
"""

from __future__ import annotations

import pytest

from tests.kernels.machine_code import APPENDS, DECODES

SM_REGISTERS = 65536
SM_SHARED_BYTES = 228 * 1024
PROGRAM_SHARED_BYTES = 1024  # what the driver keeps of a program's shared memory


@pytest.mark.parametrize("name", DECODES)
def test_decode(name, machine_code):
    geometry, config = DECODES[name]
    (kernel,) = machine_code[name]
    assert kernel.name == "decode_kernel"
    assert kernel.stack_bytes == 0
    assert kernel.warnings == []
    assert kernel.count("HMMA") == 0
    fp8 = geometry.kv_dtype == "fp8_e4m3"
    assert (kernel.count("QGMMA") > 0) == fp8
    assert (kernel.count("HGMMA") > 0) == (not fp8)
    tma = config.variant == "swap_ab_tma"
    assert (kernel.count("UTMALDG") > 0) == tma
    (starts_next,) = kernel.places("PREEXIT")
    waits = kernel.places("ACQBULK")  # for the kernel in front, which let it start early
    first_product = kernel.places("QGMMA" if fp8 else "HGMMA")[0]
    assert starts_next < waits[0] <= waits[-1] < first_product
    assert len(waits) == 1 + (config.early_blocks > 0)
    if config.early_blocks:  # K and V of two blocks are on their way before it waits
        assert sum(waits[0] < load < waits[1] for load in kernel.places("UTMALDG")) >= 4
    if not tma:  # 16 bytes at a time, into shared memory
        assert kernel.opcodes["LDGSTS.E.BYPASS.128"] >= 8


@pytest.mark.parametrize("name", DECODES)
def test_decode_programs_fit_an_sm(name, machine_code):
    _, config = DECODES[name]
    (kernel,) = machine_code[name]
    threads = 32 * kernel.num_warps
    registers = -(-kernel.registers // 8) * 8  # allocated by eight
    assert config.programs_per_sm * threads * registers <= SM_REGISTERS
    shared = kernel.shared_bytes + PROGRAM_SHARED_BYTES
    assert config.programs_per_sm * shared <= SM_SHARED_BYTES


@pytest.mark.parametrize("name", APPENDS)
def test_append(name, machine_code):
    tiles, *tokens = machine_code[name]
    assert tiles.name == "append_tiles_kernel"
    assert {t.name for t in tokens} == {"append_tokens_kernel"}
    assert all(k.stack_bytes == 0 and k.warnings == [] for k in (tiles, *tokens))
    stores = {op: n for op, n in tiles.opcodes.items() if op.startswith("STG")}
    assert set(stores) == {"STG.E.128"}


def test_merges(machine_code):
    kernels = machine_code["merges"]
    merges = [k for k in kernels if k.name == "merge_kernel"]
    assert len(merges) == 5
    assert [k.count("ACQBULK") for k in merges] == [1, 1, 1, 1, 0]  # ranks' merge waits as usual
    assert all(k.stack_bytes == 0 and k.warnings == [] for k in merges)
