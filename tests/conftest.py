"""The ``gpu`` marker, for tests that run real kernels; and kernels compiled from the start on."""

from __future__ import annotations

import os

import pytest

# Tests, what they run and what is compiled share the cores: threads of torch would wait for them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: runs kernels on a CUDA device")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: "machine_code" in item.fixturenames)  # compiled by then
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in marked:
        item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _compiled_ahead(request):
    """Compile beside the first tests, where a chosen test reads machine code."""
    if not any("machine_code" in item.fixturenames for item in request.session.items):
        yield None
        return
    from tests.kernels.machine_code import MachineCode

    made = MachineCode()
    yield made
    made.close()


@pytest.fixture(scope="session")
def machine_code(_compiled_ahead):
    """``machine_code[job]``: kernels as ptxas made them for sm_90, with their instructions."""
    return _compiled_ahead
