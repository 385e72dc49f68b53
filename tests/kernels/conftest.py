"""Fixtures of the kernel tests: memory full of NaN, and a process that interprets kernels."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

NAN_CODE = 0x7F  # NaN in E4M3


def poisoned(make):
    """Wrap an allocator of uninitialised tensors so that what nobody wrote is NaN."""

    def allocate(*args, **kwargs):
        tensor = make(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor.fill_(NAN_CODE)

    return allocate


def poison_torch(patch):
    """Make ``torch.empty`` and its kin hand out NaN; ``patch(owner, name, value)`` sets them."""
    patch(torch, "empty", poisoned(torch.empty))
    patch(torch, "empty_like", poisoned(torch.empty_like))
    patch(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    poison_torch(monkeypatch.setattr)


def _start_interpreting() -> str:
    import triton

    poison_torch(setattr)
    torch.set_num_threads(1)
    assert triton.knobs.runtime.interpret, "TRITON_INTERPRET did not reach the worker"
    return triton.__version__


@pytest.fixture(scope="session")
def interpreter():
    """Call a function of a test module in a process whose kernels are interpreted.

    ``TRITON_INTERPRET`` is read when a kernel is decorated, and an interpreted kernel cannot be
    compiled, so the two need separate processes. One worker serves the whole session.
    """
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pool.submit(_start_interpreting).result()
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before

    def call(function, *args, **kwargs):
        return pool.submit(function, *args, **kwargs).result()

    yield call
    pool.shutdown(cancel_futures=True)
