"""Runs that several tests read: each takes seconds, so each is made once."""

from __future__ import annotations

import pytest

from tests.harness.command import QUICK, run


@pytest.fixture(scope="session")
def ten_million(tmp_path_factory):
    """Static beside paged at 10M on the scale model, brackets closed, one tenth filled."""
    return run(
        tmp_path_factory.mktemp("ten_million") / "runs",
        "-m",
        "strategy=static,paged",
        "hardware=scale_model",
        "context=10M",
        "sweep.contexts=[1M,10M]",
        "fill=0.1",
        "trial.timing=false",
    )


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """Three sequences, timed behind the gate, in a fixed pool and in pages of an eager one."""
    return run(
        tmp_path_factory.mktemp("timed") / "runs",
        "-m",
        "strategy=static,eager_pages",
        "hardware=scale_model",
        "hardware.capacity=20GiB",
        "context=4K",
        "sweep.contexts=[4K]",
        "workload.sequences=3",
        "sweep.brackets=false",
        "fill=1",
        "trial.max_samples=2",
    )


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory):
    """A model with local layers, filled beyond its window, in FP8 and in BF16."""
    return run(
        tmp_path_factory.mktemp("hybrid") / "runs",
        "-m",
        "model=llama4_scout",
        "model.hybrid=true",
        "model.kv_dtype=fp8_e4m3,bf16",
        "hardware=scale_model",
        "hardware.capacity=20GiB",
        "context=20K",
        "sweep.contexts=[20K]",
        "sweep.brackets=false",
        "fill=1",
        "trial.max_samples=2",
    )


@pytest.fixture(scope="session")
def died(tmp_path_factory):
    """Trials that a signal, or the host's memory, ends, and one that hides an allocation."""
    return run(
        tmp_path_factory.mktemp("died") / "runs",
        *QUICK,
        "-m",
        "fault.kind=segfault,kill,host_oom,hidden_allocation",
        "fault.phase=workspace",
        "fault.bytes=2GiB",
    )


@pytest.fixture(scope="session")
def failed(tmp_path_factory):
    """A trial with an error of its own, and one that hangs."""
    return run(
        tmp_path_factory.mktemp("failed") / "runs",
        *QUICK,
        "-m",
        "fault.kind=exception,hang",
        "fault.phase=pool",
        "trial.timeout_seconds=5",
    )
