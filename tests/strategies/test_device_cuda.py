"""A CUDA device on a driver that counts: what makes it smaller is really held."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from strategies import device_cuda
from strategies.device_cuda import CudaDevice
from strategies.errors import OutOfMemory
from strategies.nvml import NvmlMemory
from tests.strategies.fake_driver import FakeDriver

MIB, GIB = 1 << 20, 1 << 30
TOTAL_BYTES, OTHERS_BYTES, CONTEXT_BYTES = 16 * GIB, 1 * GIB, 512 * MIB
FREE_BYTES = TOTAL_BYTES - OTHERS_BYTES
CHUNK_BYTES = 64 * MIB


@pytest.fixture(params=["nvml", "mem_get_info"])
def driver(request, monkeypatch):
    """A GPU of 16 GiB of which another process has one, and torch's names for it."""
    made = FakeDriver(TOTAL_BYTES, granularity_bytes=2 * MIB)
    made.cuMemCreate(OTHERS_BYTES, None, 0)

    def read():
        free = made.cuMemGetInfo()[1]
        return NvmlMemory(TOTAL_BYTES, free, TOTAL_BYTES - free, 0)

    def first_tensor(*size, device):
        made.cuMemCreate(CONTEXT_BYTES, None, 0)

    for name, does in {
        "set_device": lambda index: None,
        "init": lambda: None,
        "get_device_name": lambda index: "a GPU",
        "mem_get_info": lambda index: made.cuMemGetInfo()[1:],
        "synchronize": lambda index: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, does)
    monkeypatch.setattr(torch, "zeros", first_tensor)
    monkeypatch.setattr(device_cuda, "load_driver", lambda: made)
    meter = SimpleNamespace(read=read, uuid="GPU-1") if request.param == "nvml" else None
    monkeypatch.setattr(device_cuda, "_nvml_meter", lambda driver, index: meter)
    made.seen_before = FREE_BYTES if meter else FREE_BYTES - CONTEXT_BYTES
    return made


def committed(device, nbytes):
    """How many bytes of an arena the device backs before the driver refuses."""
    arena = device.reserve(nbytes, CHUNK_BYTES)
    held = 0
    try:
        while held < nbytes:
            arena.commit(held, held + CHUNK_BYTES, "pool", "kv_pool")
            held += CHUNK_BYTES
    except OutOfMemory as refused:
        assert refused.source == "driver"
    finally:
        arena.close()
    return held


def test_the_driver_refuses_what_is_beyond_a_smaller_capacity(driver):
    device = CudaDevice(capacity_bytes=4 * GIB)
    taken = OTHERS_BYTES + CONTEXT_BYTES
    assert device.ballast_bytes == driver.physical_bytes - taken == driver.seen_before - 4 * GIB
    assert device.capacity_bytes == 4 * GIB
    counted = CONTEXT_BYTES if device.meter == "nvml" else 0  # the other sees none of the context
    assert device.used_bytes() == counted
    assert device.free_bytes() == 4 * GIB - counted
    assert committed(device, 8 * GIB) == 4 * GIB - counted
    device.close()
    assert driver.physical_bytes == taken


def test_without_a_capacity_nothing_is_held(driver):
    device = CudaDevice()
    assert (device.ballast_bytes, device.capacity_bytes) == (0, driver.seen_before)
    assert committed(device, 8 * GIB) == 8 * GIB


@pytest.mark.parametrize("nbytes", [0, -1, TOTAL_BYTES])
def test_a_capacity_that_is_not_there_is_refused(driver, nbytes):
    with pytest.raises(ValueError, match=r"capacity_bytes=.*bytes free on a GPU"):
        CudaDevice(capacity_bytes=nbytes)
    assert driver.physical_bytes == OTHERS_BYTES + CONTEXT_BYTES
