"""Which prefill kernel runs for which shape: written down, not tuned at run time.

No torch and no Triton here, so that planners can size buffers from shapes alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from kernels.config import check_geometry
from kernels.view import PAGE_TOKENS, Geometry


@dataclass(frozen=True)
class HopperConfig:
    """How the kernel is compiled and launched.

    Parameters
    ----------
    variant : str
        Name for the rows of a report.
    stages : int
        K/V tiles in flight.
    """

    variant: str
    stages: int = 4
    rows: int = 192
    block_tokens: int = PAGE_TOKENS
    programs_per_sm: int = 1


HOPPER = HopperConfig("gluon_3wg")


@dataclass(frozen=True)
class PortableConfig:
    """How the kernel is compiled and launched.

    Parameters
    ----------
    variant : str
        Name for the rows of a report.
    rows, block_tokens : int
        Query rows of a row tile, tokens of a K/V tile.
    num_warps, num_stages, programs_per_sm : int
        Launch options.
    """

    variant: str
    rows: int
    block_tokens: int
    num_warps: int
    num_stages: int
    programs_per_sm: int


# (head_dim, kv_dtype) -> rows, block_tokens, num_warps, num_stages, programs_per_sm
_TMA = {
    (64, "fp8_e4m3"): (64, 128, 4, 5, 2),
    (128, "fp8_e4m3"): (64, 128, 4, 5, 2),
    (256, "fp8_e4m3"): (64, 64, 8, 5, 1),
    (64, "bf16"): (64, 128, 4, 4, 2),
    (128, "bf16"): (128, 64, 8, 5, 1),
    (256, "bf16"): (64, 32, 8, 5, 1),
}
# Two stages: with more, page numbers are fetched asynchronously too, and under Triton 3.6 a block
# of 64 tokens of FP8 then gave wrong results on an H200.
_POINTER = {
    (64, "fp8_e4m3"): (64, 128, 4, 2, 2),
    (128, "fp8_e4m3"): (64, 64, 4, 2, 2),
    (256, "fp8_e4m3"): (64, 64, 8, 2, 1),
    (64, "bf16"): (64, 128, 4, 2, 2),
    (128, "bf16"): (128, 64, 8, 2, 1),
    (256, "bf16"): (64, 32, 8, 2, 1),
}


def portable_config(geometry: Geometry) -> PortableConfig:
    """The kernel's configuration for a shape; the shape has been checked."""
    tma = geometry.page_tokens == PAGE_TOKENS
    table = _TMA if tma else _POINTER
    rows, block, *launch = table[geometry.head_dim, geometry.kv_dtype]
    kind = "tma" if tma else "pointer"
    return PortableConfig(f"triton_{rows}x{block}_{kind}", rows, block, *launch)


PrefillConfig = HopperConfig | PortableConfig


def gluon_fits(geometry: Geometry, window: int) -> bool:
    """Whether the Hopper kernel is written for this shape.

    A window that starts inside a page needs a mask at its front, which it does not have.
    """
    return (
        geometry.kv_dtype == "fp8_e4m3"
        and geometry.head_dim == 128
        and geometry.page_tokens == PAGE_TOKENS
        and window % PAGE_TOKENS == 0
    )


def choose(
    geometry: Geometry, window: int, hopper: bool, variant: str | None = None
) -> PrefillConfig:
    """The configuration for a shape.

    Parameters
    ----------
    geometry : Geometry
    window : int
        First visible token.
    hopper : bool
        Whether the device is of compute capability 9.0.
    variant : str, optional
        ``gluon_3wg`` or ``triton``, instead of the choice.

    Raises
    ------
    ValueError
        For a shape or a variant that no kernel is written for.
    """
    check_geometry(geometry)
    if variant not in (None, HOPPER.variant, "triton"):
        raise ValueError(f"variant={variant}: allowed are {HOPPER.variant}, triton")
    fits = gluon_fits(geometry, window)
    if variant == HOPPER.variant and not fits:
        raise ValueError(
            f"variant={variant}: needs fp8_e4m3, D 128, pages of {PAGE_TOKENS} tokens and a window "
            f"that starts on a page, not {geometry.kv_dtype}, D {geometry.head_dim}, pages of "
            f"{geometry.page_tokens} and token {window}"
        )
    if variant == HOPPER.variant or (variant is None and fits and hopper):
        return HOPPER
    return portable_config(geometry)


def all_prefill_configs() -> list[tuple[Geometry, PrefillConfig]]:
    """Every configuration that the chooser can pick, each with a geometry that leads to it."""
    found: list[tuple[Geometry, PrefillConfig]] = []
    for head_dim in (64, 128, 256):
        for kv_dtype in ("fp8_e4m3", "bf16"):
            for page in (16, PAGE_TOKENS):  # 32 and 64 run the kernel of 16
                geometry = Geometry(2, 2, 10, head_dim, kv_dtype, page)
                configs = [choose(geometry, 0, hopper) for hopper in (False, True)]
                found += [(geometry, config) for config in dict.fromkeys(configs)]
    return found
