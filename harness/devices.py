"""Opening the device of a trial: phase ``context``, before anything else is allocated."""

from __future__ import annotations

import time

from harness.ledger import Ledger
from harness.settings import Settings
from strategies.device import Device


def open_device(settings: Settings, ledger: Ledger, purpose: str) -> Device:
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
    from kernels.warm import warm_up

    from strategies.device_cuda import CudaDevice

    capacity = settings.hardware.capacity_bytes
    cuda = CudaDevice(
        settings.hardware.index,
        capacity_bytes=capacity if capacity < settings.hardware.free_bytes else None,
        observer=ledger,
    )
    if purpose == "point":
        for group in settings.full_model().groups:
            warm_up(group.geometry, f"cuda:{settings.hardware.index}")
    ledger.device = cuda
    ledger.event("context", "cuda_context", cuda.used_bytes(), time.perf_counter() - began)
    return cuda
