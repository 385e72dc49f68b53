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


# Three sequences in a fixed pool and in pages; a model with local layers, filled beyond its window.
TIMED_ARMS = [
    ["strategy=static", "workload.sequences=3", "context=4K"],
    ["strategy=eager_pages", "workload.sequences=3", "context=4K"],
    ["model=llama4_scout", "model.hybrid=true", "context=20K"],
    ["model=llama4_scout", "model.hybrid=true", "context=20K", "model.kv_dtype=bf16"],
]


@pytest.fixture(scope="session")
def timed(tmp_path_factory):
    """Trials that are timed behind the gate, each of another kind."""
    arms = ",".join("[" + ",".join(f"'{word}'" for word in arm) + "]" for arm in TIMED_ARMS)
    return run(
        tmp_path_factory.mktemp("timed") / "runs",
        f"experiment.arms=[{arms}]",
        "hardware=scale_model",
        "hardware.capacity=20GiB",
        "sweep.points=[1.0]",
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
        "trial.timeout_seconds=3",
    )
