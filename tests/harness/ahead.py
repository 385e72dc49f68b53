"""Work that takes seconds in processes of its own: done once, beside other tests.

A fixture of each name gives what the work returned.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.harness.command import QUICK, Ended, run
from tests.harness.ranks_fixture import LIMIT_SECONDS, ROOT, SMALL, start

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
    # A trial with an error of its own, and one that hangs: on a busy machine the first needs time.
    "failed": (
        *QUICK,
        "experiment.arms=[['fault.kind=exception'],['fault.kind=hang','trial.timeout_seconds=3']]",
        "fault.phase=pool",
    ),
}

# Each rank has 16 pages of one sequence.
TIMED_PAIR = (
    "parallel=context",
    "context=4096",
    "sweep.contexts=[4096]",
    "fill=1",
    "trial.max_samples=3",
)


def torchrun(*flags: str) -> list[str]:
    """The command of a run on two ranks under torchrun; the harness's words follow."""
    return ["-m", "torch.distributed.run", *flags, "-m", "harness", *SMALL, "parallel.ranks=2"]


def _command(words: tuple[str, ...], folder: Path) -> Ended:
    return run(folder / "runs", *words)


def _nodes(folder: Path) -> tuple[list[int], list[str], Path]:
    """Two nodes of one rank each: their exit statuses, their output, and the results' folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = ("--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1")
    started = [
        start(
            [
                *torchrun(*common, "--master-port", port, "--node-rank", str(node)),
                *TIMED_PAIR,
                f"results={folder / 'runs'}",
            ],
            folder,
        )
        for node in (1, 0)
    ]
    said = [process.communicate(timeout=LIMIT_SECONDS)[0] for process in started]
    return [p.returncode for p in started], said, folder


def _layouts(folder: Path) -> dict[str, list[tuple[float, ...]]]:
    """Of every layout (tensor x context ranks), what each rank came to.

    Its error against both references, the collectives that it entered and left, and whether the
    gate of a timed step passed one with its exchange and one without.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.harness.gloo_ranks", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, list[tuple[float, ...]]] = {}
    for line in done.stdout.splitlines():
        tensor, context, *figures = line.split()
        found.setdefault(f"{tensor}x{context}", []).append(tuple(map(float, figures)))
    return found


WORK: dict[str, Callable[[Path], Any]] = {
    **{name: partial(_command, words) for name, words in RUNS.items()},
    "nodes": _nodes,
    "layouts": _layouts,
}
