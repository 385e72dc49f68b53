"""The process group of a trial's ranks: NCCL on GPUs, gloo on the host.

Phase ``nccl`` whichever it is, for people ``communicator``: everything that NCCL takes is taken
here, by collectives of the very sizes that a decode step needs, and read off the device's meter.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from harness.ledger import Ledger
from harness.ranks_control import Team
from harness.settings import Settings
from strategies.device import Device
from strategies.errors import OutOfMemory
from strategies.model import KVModel

if TYPE_CHECKING:
    import torch

FLOAT32, BF16 = 4, 2
STORE_HOST = "KV_ALLOC_BENCH_STORE_HOST"  # where rank 0's machine is reached
MARGIN_SECONDS = 60.0  # the harness ends a hung trial itself, before torch's watchdog does


@dataclass(frozen=True)
class Sizes:
    """What the collectives of one layer of a decode step move.

    Partial outputs float32 ``[sequences, q_heads, head_dim]`` and their LSE are gathered over the
    context ranks; the attention output, projected to bf16 ``[sequences, hidden]``, is reduced over
    the tensor ranks.
    """

    sequences: int
    q_heads: int
    head_dim: int
    hidden: int
    layers: int
    tensor_ranks: int
    context_ranks: int

    @property
    def partial_bytes(self) -> int:
        """Bytes that one context rank gives to an all-gather: outputs and LSE."""
        return self.sequences * self.q_heads * (self.head_dim + 1) * FLOAT32

    @property
    def hidden_bytes(self) -> int:
        """Bytes of the all-reduce."""
        return self.sequences * self.hidden * BF16

    @property
    def step_bytes(self) -> int:
        """Payload of all layers' collectives on one rank: its partials, and what it reduces."""
        gathered = self.partial_bytes if self.context_ranks > 1 else 0
        reduced = self.hidden_bytes if self.tensor_ranks > 1 else 0
        return self.layers * (gathered + reduced)

    @property
    def buffer_bytes(self) -> int:
        """The gathered partials, the merged output and the reduced one."""
        gathered = (self.context_ranks + 1) * self.partial_bytes if self.context_ranks > 1 else 0
        return gathered + self.hidden_bytes


def collective_workspace(settings: Settings) -> list[tuple[str, int]]:
    """The workspace that collectives need on the (modelled) device; none for a rank by itself."""
    if not settings.parallel.backend:
        return []
    return [("collective_buffers", sizes_of(settings, settings.full_model()).buffer_bytes)]


def sizes_of(settings: Settings, model: KVModel | None = None) -> Sizes:
    """Sizes on a rank of this configuration, of the ranks that the model is shaped for."""
    model = model or settings.kv_model()
    return Sizes(
        sequences=settings.sequences,
        q_heads=model.q_heads,
        head_dim=max(g.geometry.head_dim for g in model.groups),
        hidden=settings.model.hidden,
        layers=sum(g.geometry.layers for g in model.groups),
        tensor_ranks=settings.parallel.tp,
        context_ranks=settings.parallel.context_ranks,
    )


class Collectives:
    """Process groups of one rank: all ranks, those of its pages and those of its heads."""

    def __init__(self, team: Team, device: Any) -> None:  # noqa: ANN401
        self.place, self.counters = team.place, team.counters
        self.device = device
        self.moved_bytes = 0  # that this rank gave to collectives so far
        self.tensor_group, self.context_group = self._groups()

    def _groups(self) -> tuple[Any, Any]:
        """The two subgroups; every rank makes every group, in one order, as torch asks.

        None for a group of this rank alone among others. The only rank of all talks to itself, so
        that one GPU shows what NCCL takes.
        """
        import torch.distributed as dist

        places = [self.place._at(r) for r in range(self.place.world_size)]
        everyone = tuple(range(self.place.world_size))
        made: dict[tuple[int, ...], Any] = {everyone: dist.group.WORLD}
        wanted = sorted({p.tensor_group for p in places} | {p.context_group for p in places})
        for ranks in wanted:
            if len(ranks) > 1 and ranks not in made:
                made[ranks] = dist.new_group(list(ranks))
        return made.get(self.place.tensor_group), made.get(self.place.context_group)

    @property
    def context_size(self) -> int:
        """Ranks whose partials are merged."""
        return len(self.place.context_group)

    @property
    def tensor_size(self) -> int:
        """Ranks whose outputs are reduced."""
        return len(self.place.tensor_group)

    def gather(self, into: torch.Tensor, own: torch.Tensor) -> None:
        """All-gather ``own [...]`` into ``[context_size, ...]``, by context index."""
        self._gather(into, own, self.context_group)

    def gather_tensor(self, into: torch.Tensor, own: torch.Tensor) -> None:
        """All-gather ``own [...]`` into ``[tensor_size, ...]``, by tensor index."""
        self._gather(into, own, self.tensor_group)

    def _gather(self, into: torch.Tensor, own: torch.Tensor, group: Any) -> None:  # noqa: ANN401
        import torch.distributed as dist

        self.counters.enter("all-gather")  # by ranks that are alone too: all count alike
        self.moved_bytes += own.nbytes
        if group is None:
            into[0].copy_(own)
        else:
            dist.all_gather_into_tensor(into.flatten(0, 1), own, group=group)
        self.counters.leave()

    def reduce(self, hidden: torch.Tensor) -> None:
        """Sum ``hidden`` over the tensor ranks, in place."""
        import torch.distributed as dist

        self.counters.enter("all-reduce")
        self.moved_bytes += hidden.nbytes
        if self.tensor_group is not None:
            dist.all_reduce(hidden, group=self.tensor_group)
        self.counters.leave()

    def close(self) -> None:
        """End the process group; every rank must call it."""
        import torch.distributed as dist

        dist.destroy_process_group()


def connect(
    settings: Settings, team: Team, device: Device, ledger: Ledger, timed: bool
) -> Collectives | None:
    """Make the trial's process group in phase ``nccl``; None where no collective will run.

    On the scale model NCCL's bytes are the configured ones, really touched, and gloo is loaded only
    for trials that are timed.

    Parameters
    ----------
    timed : bool
        Whether any cell of the trial is.

    Raises
    ------
    OutOfMemory
        NCCL found no memory.
    """
    parallel = settings.parallel
    if not parallel.backend:
        return None
    if settings.on_host:
        if parallel.nccl_bytes:
            device.allocate("nccl", "nccl", -(-parallel.nccl_bytes // device.scale))
        return _joined(settings, team, "cpu") if timed else None
    began, before = time.perf_counter(), device.used_bytes()
    index = settings.hardware.index
    try:
        made = _joined(settings, team, f"cuda:{index}")
        _rehearse(made, sizes_of(settings), f"cuda:{index}")
        device.synchronize()
    except RuntimeError as error:  # NCCL has no error of its own for it
        if "out of memory" in str(error).lower():
            raise OutOfMemory("nccl", "nccl", 0, device.free_bytes()) from error
        raise
    taken = device.used_bytes() - before
    ledger.event("nccl", "nccl", taken, time.perf_counter() - began)
    return made


def _joined(settings: Settings, team: Team, device: str) -> Collectives:
    """Start torch's process group; its store is rank 0's, at a port of its own choice."""
    import torch
    import torch.distributed as dist

    place, host = team.place, os.environ.get(STORE_HOST, "127.0.0.1")
    limit = timedelta(seconds=settings.trial.timeout_seconds + MARGIN_SECONDS)
    if place.rank == 0:
        store = dist.TCPStore(
            host, 0, place.world_size, is_master=True, timeout=limit, wait_for_workers=False
        )
        team.join("store", store.port)
    else:
        port = team.join("store")[0]
        store = dist.TCPStore(host, port, place.world_size, is_master=False, timeout=limit)
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.set_device(device)
    team.counters.enter("start of the process group")
    dist.init_process_group(
        settings.parallel.backend,
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
        device_id=torch.device(device) if on_gpu else None,
    )
    made = Collectives(team, device)
    team.counters.leave()
    return made


def _rehearse(made: Collectives, sizes: Sizes, device: str) -> None:
    """Run each collective once at its size: NCCL connects and takes its buffers at first use."""
    import torch

    hidden = torch.zeros(sizes.hidden_bytes // BF16, dtype=torch.bfloat16, device=device)
    own = torch.zeros(sizes.partial_bytes // FLOAT32, dtype=torch.float32, device=device)
    both = torch.zeros((made.context_size, own.numel()), dtype=torch.float32, device=device)
    for _ in range(2):
        made.reduce(hidden)
        made.gather(both, own)
    torch.cuda.synchronize(device)
    del hidden, own, both
    torch.cuda.empty_cache()
