"""Which of NVML's GPUs CUDA calls 0, 1, …: CUDA_VISIBLE_DEVICES, which a cluster sets for a job.

NVML shows every GPU of the machine, whatever that variable says.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any


def nvml_key(index: int, environment: Mapping[str, str] = os.environ) -> int | str | None:
    """NVML's index or UUID of the GPU that CUDA calls ``index``; None when it shows no such one."""
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return index
    keys: list[int | str] = []
    for word in (w.strip() for w in listed.split(",")):
        if word.isdecimal():
            keys.append(int(word))
        elif word.startswith(("GPU-", "MIG-")):
            keys.append(word)
        else:  # CUDA ignores everything from the first invalid word on
            break
    return keys[index] if index < len(keys) else None


def nvml_handle(nvml: Any, index: int) -> Any:  # noqa: ANN401
    """NVML's handle of the GPU that CUDA calls ``index``; None when there is none.

    ``nvml`` is the initialised ``pynvml`` module.
    """
    key = nvml_key(index)
    if isinstance(key, int):
        if key < nvml.nvmlDeviceGetCount():
            return nvml.nvmlDeviceGetHandleByIndex(key)
        return None
    for other in range(nvml.nvmlDeviceGetCount() if key else 0):
        handle = nvml.nvmlDeviceGetHandleByIndex(other)
        uuid = nvml.nvmlDeviceGetUUID(handle)
        uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
        if uuid.startswith(str(key)):  # CUDA takes a unique prefix as well
            return handle
    return None


def gpu_count() -> int:
    """GPUs that a process here may use; 0 without a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # any failure to load the driver's library means: no GPU here
        return 0
    try:
        count = 0
        while nvml_handle(pynvml, count) is not None:
            count += 1
        return count
    finally:
        pynvml.nvmlShutdown()
