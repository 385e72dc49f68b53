"""Every prefill kernel compiled for sm_90: the right instructions, and no spills."""

from __future__ import annotations

import functools
import re

import pytest

from kernels.prefill import plan_prefill, prefill
from kernels.prefill_config import HopperConfig, all_prefill_configs
from kernels.view import PAGE_TOKENS
from tests.kernels.cases import empty_view, random_q
from tests.kernels.sass import capture

CONFIGS = [
    pytest.param(geometry, config, id=f"{config.variant}-{geometry.head_dim}-{geometry.kv_dtype}")
    for geometry, config in all_prefill_configs()
]


@functools.cache
def compiled(geometry, config):
    """The kernel and the merge of a chunk that needs both."""
    view = empty_view(geometry, [3300])
    variant = config.variant if isinstance(config, HopperConfig) else "triton"
    plan = plan_prefill(view, 0, 3000, 300, variant=variant)
    assert plan.variant == config.variant and len(plan.cut.merges)
    with capture() as launches:
        prefill(view, geometry.layers - 1, random_q(geometry, 300), plan)
    return launches


@pytest.mark.parametrize("geometry, config", CONFIGS)
def test_machine_code(geometry, config):
    kernel, merge = compiled(geometry, config)
    fp8 = geometry.kv_dtype == "fp8_e4m3"
    assert kernel.count("QGMMA" if fp8 else "HGMMA") > 0
    assert kernel.count("HMMA") == 0
    tma = geometry.page_tokens == PAGE_TOKENS
    assert (kernel.count("UTMALDG") > 0) == tma
    assert (kernel.count("LDGSTS") > 0) or tma
    assert kernel.stack_bytes == 0 and merge.stack_bytes == 0
    assert not kernel.warnings and not merge.warnings
    assert kernel.shared_bytes <= 232448


def test_small_pages_are_copied_sixteen_bytes_at_a_time():
    for geometry, config in all_prefill_configs():
        if geometry.page_tokens < PAGE_TOKENS:
            kernel, _ = compiled(geometry, config)
            copies = {name for name in kernel.opcodes if name.startswith("LDGSTS")}
            assert copies == {"LDGSTS.E.BYPASS.128"}
            return
    raise AssertionError("no configuration for small pages")


def test_p_feeds_the_second_product_from_registers():
    geometry, config = next(
        pair for pair in all_prefill_configs() if isinstance(pair[1], HopperConfig)
    )
    kernel, _ = compiled(geometry, config)
    # An operand in registers: QGMMA ... R24, R92, gdesc[...]; three warpgroups, each with a masked
    # and a clear loop of four instructions.
    from_registers = re.findall(r"m64n128k32\.f32\.e4m3\.e4m3 \{[^}]*\}, \{", kernel.asm["ptx"])
    assert len(from_registers) == 3 * 2 * 4
    assert kernel.count("PRMT") < 16
    # One load of a descriptor for V's plain and last tiles, one for K.
    assert kernel.count("UTMALDG") >= 2
