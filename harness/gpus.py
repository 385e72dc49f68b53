"""GPUs by name, for planning without one: total memory as CUDA shows it."""

from __future__ import annotations

from dataclasses import dataclass

from harness.sizes import BadValue


@dataclass(frozen=True)
class Gpu:
    """Total bytes as CUDA shows them; ``hopper`` decides the engines' default backends."""

    name: str
    total_bytes: int
    hopper: bool


GPUS = {
    "h200": Gpu("NVIDIA H200", 150_109_880_320, True),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 85_029_158_912, True),
    "a100-80": Gpu("NVIDIA A100-SXM4-80GB", 84_987_740_160, False),
    "a100-40": Gpu("NVIDIA A100-SXM4-40GB", 42_297_786_368, False),
}


def gpu_named(name: str) -> Gpu:
    """Find a GPU; raises :class:`BadValue` with the names that are known."""
    found = GPUS.get(name.lower())
    if found is None:
        raise BadValue("--gpu", name, ", ".join(GPUS))
    return found


def gpu_with_total(total_bytes: int) -> Gpu:
    """Find the GPU whose total is nearest, or make one when none is within 2 %."""
    nearest = min(GPUS.values(), key=lambda gpu: abs(gpu.total_bytes - total_bytes))
    if abs(nearest.total_bytes - total_bytes) <= 0.02 * total_bytes:
        return nearest
    return Gpu(f"a GPU of {total_bytes / (1 << 30):.2f} GiB", total_bytes, True)
