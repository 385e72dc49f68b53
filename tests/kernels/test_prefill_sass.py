"""Every prefill kernel compiled for sm_90: the right instructions, and no spills."""

from __future__ import annotations

import re

import pytest

from kernels.prefill_config import HopperConfig
from kernels.view import PAGE_TOKENS
from tests.kernels.machine_code import PREFILLS


@pytest.mark.parametrize("name", PREFILLS)
def test_machine_code(name, machine_code):
    geometry, _ = PREFILLS[name]
    kernel, merge = machine_code[name]
    fp8 = geometry.kv_dtype == "fp8_e4m3"
    assert kernel.count("QGMMA" if fp8 else "HGMMA") > 0
    assert kernel.count("HMMA") == 0
    tma = geometry.page_tokens == PAGE_TOKENS
    assert (kernel.count("UTMALDG") > 0) == tma
    assert (kernel.count("LDGSTS") > 0) or tma
    assert kernel.stack_bytes == 0 and merge.stack_bytes == 0
    assert not kernel.warnings and not merge.warnings
    assert kernel.shared_bytes <= 232448


def test_small_pages_are_copied_sixteen_bytes_at_a_time(machine_code):
    for name, (geometry, _) in PREFILLS.items():
        if geometry.page_tokens < PAGE_TOKENS:
            kernel, _ = machine_code[name]
            copies = {name for name in kernel.opcodes if name.startswith("LDGSTS")}
            assert copies == {"LDGSTS.E.BYPASS.128"}
            return
    raise AssertionError("no configuration for small pages")


def test_p_feeds_the_second_product_from_registers(machine_code):
    name = next(n for n, (_, config) in PREFILLS.items() if isinstance(config, HopperConfig))
    kernel, _ = machine_code[name]
    # An operand in registers: QGMMA ... R24, R92, gdesc[...]; three warpgroups, each with a masked
    # and a clear loop of four instructions.
    from_registers = re.findall(r"m64n128k32\.f32\.e4m3\.e4m3 \{[^}]*\}, \{", kernel.ptx)
    assert len(from_registers) == 3 * 2 * 4
    assert kernel.count("PRMT") < 16
    # One load of a descriptor for V's plain and last tiles, one for K.
    assert kernel.count("UTMALDG") >= 2
