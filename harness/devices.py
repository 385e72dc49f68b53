"""Opening the device of a trial: phase ``context``, before anything else is allocated."""

from __future__ import annotations

import time

from harness.ledger import Ledger, lent_bytes
from harness.settings import Settings
from strategies.device import Device
from strategies.model import LayerGroup


def open_device(settings: Settings, ledger: Ledger, loads_kernels: bool) -> Device:
    """The trial's device with its context made, every kernel loaded, and the ledger told.

    On CUDA the context's bytes are what the driver holds once the kernels are loaded; on the scale
    model they are the modelled device's, really touched.
    """
    began = time.perf_counter()
    if settings.on_host:
        from strategies.device_host import HostDevice

        host = HostDevice(
            settings.device_bytes,
            settings.scale,
            observer=ledger,
            name=f"scale model of {settings.hardware.device_name}",
        )
        ledger.device = host
        host.allocate("context", "cuda_context", -(-settings.hardware.context_bytes // host.scale))
        return host
    from harness.gate import load_arithmetic
    from kernels.warm import warm_up
    from strategies.device_cuda import CudaDevice

    capacity = settings.hardware.capacity_bytes
    cuda = CudaDevice(
        settings.hardware.index,
        capacity_bytes=capacity if capacity < settings.hardware.free_bytes else None,
        observer=ledger,
    )
    where = f"cuda:{settings.hardware.index}"
    if loads_kernels:
        load_arithmetic(where)
        for group in settings.full_model().groups:
            warm_up(group.geometry, where)
            _grow_once(cuda, group)
    cuda.empty_cache()
    ledger.device = cuda
    ledger.event("context", "cuda_context", lent_bytes(cuda), time.perf_counter() - began)
    return cuda


def _grow_once(device: Device, group: LayerGroup) -> None:
    """Map, zero and give back one chunk: what the driver does once is in no stall."""
    arena = device.reserve(group.chunk_bytes, group.chunk_bytes)
    arena.commit(0, group.chunk_bytes, "context", "warm_up")
    arena.zero(0, group.chunk_bytes)
    arena.decommit(0, group.chunk_bytes)
    arena.close()
