"""The driver's own memory figures of a whole GPU, from NVML."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class NvmlMemory:
    """Bytes of a GPU, whoever holds them.

    ``used_bytes`` leaves out ``reserved_bytes`` (the driver's and firmware's own), as version 2
    of NVML's memory info does; version 1 adds them up.
    """

    total_bytes: int
    free_bytes: int
    used_bytes: int
    reserved_bytes: int


class NvmlMeter:
    """Reads one GPU, joined by UUID: NVML's index ignores ``CUDA_VISIBLE_DEVICES``.

    Parameters
    ----------
    uuid_bytes : bytes
        The 16 bytes of the CUDA device's UUID.

    Raises
    ------
    RuntimeError
        NVML is missing or does not know the device.
    """

    def __init__(self, uuid_bytes: bytes) -> None:
        import pynvml

        self._nvml: Any = pynvml
        text = str(uuid.UUID(bytes=uuid_bytes))
        try:
            pynvml.nvmlInit()
            self.uuid, self._handle = self._find(text)
        except pynvml.NVMLError as error:
            raise RuntimeError(f"NVML does not show the GPU {text}: {error}") from error

    def _find(self, text: str) -> tuple[str, Any]:
        """Find a GPU, or the MIG instance that the same UUID names."""
        try:
            return f"GPU-{text}", self._nvml.nvmlDeviceGetHandleByUUID(f"GPU-{text}")
        except self._nvml.NVMLError:
            return f"MIG-{text}", self._nvml.nvmlDeviceGetHandleByUUID(f"MIG-{text}")

    def read(self) -> NvmlMemory:
        """Read the figures now."""
        info = self._nvml.nvmlDeviceGetMemoryInfo(self._handle, version=self._nvml.nvmlMemory_v2)
        return NvmlMemory(int(info.total), int(info.free), int(info.used), int(info.reserved))
