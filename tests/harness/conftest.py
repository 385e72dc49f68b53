"""Runs that several tests read, each made once, beside other tests; files for harness.explain."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness.command import QUICK, run
from tests.harness.explain_case import ONE_RANK

# Three sequences in a fixed pool and in pages; a model with local layers, filled beyond its window.
TIMED_ARMS = [
    ["strategy=static", "workload.sequences=3", "context=4K"],
    ["strategy=eager_pages", "workload.sequences=3", "context=4K"],
    ["model=llama4_scout", "model.hybrid=true", "context=20K"],
    ["model=llama4_scout", "model.hybrid=true", "context=20K", "model.kv_dtype=bf16"],
]
_ARMS = ",".join("[" + ",".join(f"'{word}'" for word in arm) + "]" for arm in TIMED_ARMS)

RUNS = {
    # Static beside paged at 10M on the scale model, brackets closed, one tenth filled.
    "ten_million": (
        "-m",
        "strategy=static,paged",
        "hardware=scale_model",
        "context=10M",
        "sweep.contexts=[1M,10M]",
        "fill=0.1",
        "trial.timing=false",
    ),
    # Trials that are timed behind the gate, each of another kind.
    "timed": (
        f"experiment.arms=[{_ARMS}]",
        "hardware=scale_model",
        "hardware.capacity=20GiB",
        "sweep.points=[1.0]",
        "sweep.brackets=false",
        "fill=1",
        "trial.max_samples=2",
    ),
    # One model on 1 and 2 ranks that run, and on more that are planned; nothing is timed.
    "scaled": (
        "experiment=scaling",
        "model=qwen3_30b_a3b",
        "hardware=scale_model",
        "context=1M",
        "hardware.capacity=8GiB",
        "model.weights_per_rank=1GiB",
        "parallel.plan_beyond=2",
        "fill=0",
        "trial.timing=false",
    ),
    # Trials that a signal, or the host's memory, ends, and one that hides an allocation.
    "died": (
        *QUICK,
        "-m",
        "fault.kind=segfault,kill,host_oom,hidden_allocation",
        "fault.phase=workspace",
        "fault.bytes=2GiB",
    ),
    # A trial with an error of its own, and one that hangs.
    "failed": (
        *QUICK,
        "-m",
        "fault.kind=exception,hang",
        "fault.phase=pool",
        "trial.timeout_seconds=3",
    ),
}


def pytest_collection_modifyitems(items):
    """Tests that read those runs come last: the runs are made while others are tested."""
    items.sort(key=lambda item: not RUNS.keys().isdisjoint(item.fixturenames))


@pytest.fixture(scope="session", autouse=True)
def made(request, tmp_path_factory):
    """Those of the runs that the chosen tests read, as futures."""
    wanted = {name for item in request.session.items for name in item.fixturenames}
    with ThreadPoolExecutor(1) as pool:
        yield {
            name: pool.submit(run, tmp_path_factory.mktemp(name) / "runs", *words)
            for name, words in RUNS.items()
            if name in wanted
        }


@pytest.fixture(scope="session")
def ten_million(made):
    return made["ten_million"].result()


@pytest.fixture(scope="session")
def timed(made):
    return made["timed"].result()


@pytest.fixture(scope="session")
def scaled(made):
    return made["scaled"].result()


@pytest.fixture(scope="session")
def died(made):
    return made["died"].result()


@pytest.fixture(scope="session")
def failed(made):
    return made["failed"].result()


@pytest.fixture
def config_file(tmp_path):
    """Writes a config.json of ``explain_case.ONE_RANK``, changed as told; its path."""

    def write(name="config.json", **changed):
        path = tmp_path / name
        path.write_text(json.dumps({**ONE_RANK, **changed}))
        return str(path)

    return write


@pytest.fixture
def log_file(tmp_path):
    """Writes an engine's log; its path."""

    def write(text, name="start.log"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write
