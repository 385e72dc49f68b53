"""How a model is spread over ranks, how many of them really run, and what they talk through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.ranks import launched
from harness.sizes import BadValue, parse_bytes
from harness.visible_gpus import gpu_count

if TYPE_CHECKING:
    from omegaconf import DictConfig

KINDS = ("tp", "context")
MAX_RANKS = 1024


@dataclass(frozen=True)
class Parallel:
    """Ranks that the model is shaped for, and those that really run.

    Parameters
    ----------
    kind : str
        ``tp`` or ``context``.
    ranks, context_ranks : int
        All ranks, and those over which each sequence's pages are dealt out.
    processes : int
        Ranks that run; the others are emulated.
    backend : str
        ``nccl``, ``gloo``, or ``""``: a single rank that talks to none.
    nccl_bytes : int
        What NCCL is expected to take on a rank of the (modelled) device.
    planned : bool
        There are not that many ranks here: the planner answers instead of a trial.
    """

    kind: str
    ranks: int
    context_ranks: int
    processes: int
    backend: str = ""
    nccl_bytes: int = 0
    planned: bool = False

    @property
    def tp(self) -> int:
        """Tensor-parallel ranks: heads are split over them."""
        return self.ranks // self.context_ranks


def parallel_of(conf: DictConfig, on_host: bool, index: int, planning: bool) -> Parallel:
    """Validate the ``parallel`` group.

    Parameters
    ----------
    on_host : bool
        Whether the ranks are those of the scale model.
    index : int
        ``hardware.index``: the GPU of the first rank.
    planning : bool
        Nothing will run: what is here does not matter.

    Raises
    ------
    BadValue
        For ranks that do not divide, or that cannot run here.
    """
    if conf.kind not in KINDS:
        raise BadValue("parallel.kind", conf.kind, ", ".join(KINDS))
    _range("ranks", conf.ranks, 1, MAX_RANKS)
    _range("context_ranks", conf.context_ranks, 1, conf.ranks)
    if conf.ranks % conf.context_ranks:
        raise BadValue("parallel.context_ranks", conf.context_ranks, f"a divisor of {conf.ranks}")
    if conf.kind == "tp" and conf.context_ranks > 1:
        allowed = "1 with parallel=tp; parallel=context deals pages out"
        raise BadValue("parallel.context_ranks", conf.context_ranks, allowed)
    if conf.kind == "context" and conf.context_ranks == 1 < conf.ranks:
        raise BadValue("parallel.context_ranks", 1, "2 or more with parallel=context")
    if conf.plan_beyond is not None:
        _whole("plan_beyond", conf.plan_beyond, MAX_RANKS)
    processes, planned = _processes(conf, on_host, index, planning)
    backend = "" if planned else _backend(conf, on_host, processes, planning)
    nccl = 0 if str(conf.nccl) == "0" else parse_bytes(conf.nccl, "parallel.nccl")
    return Parallel(
        str(conf.kind),
        int(conf.ranks),
        int(conf.context_ranks),
        processes,
        backend,
        nccl if processes > 1 or backend else 0,
        planned,
    )


def _range(key: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BadValue(f"parallel.{key}", value, f"{low} to {high}")


def _whole(key: str, value: object, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise BadValue(f"parallel.{key}", value, f"null, or a whole number from 1 to {high}")
    return value


def _processes(conf: DictConfig, on_host: bool, index: int, planning: bool) -> tuple[int, bool]:
    """How many ranks run, and whether that many are only planned."""
    world = None if planning else launched()
    if conf.processes is None:
        wanted = 1 if world is None else world.world_size
        if wanted > conf.ranks:
            raise BadValue(
                "parallel.ranks", conf.ranks, f"at least WORLD_SIZE, which is {wanted} here"
            )
    else:
        wanted = _whole("processes", conf.processes, int(conf.ranks))
    if planning:
        return wanted, False
    limit, why = wanted, ""
    if world is not None:
        limit, why = world.world_size, "the launcher's WORLD_SIZE"
    elif not on_host:
        limit, why = max(1, gpu_count() - index), "the GPUs that are here"
    if conf.plan_beyond is not None:
        return wanted, wanted > min(int(conf.plan_beyond), limit)
    if wanted > limit:
        raise BadValue("parallel.processes", wanted, f"1 to {limit}, {why}")
    return wanted, False


def _backend(conf: DictConfig, on_host: bool, processes: int, planning: bool) -> str:
    own = "gloo" if on_host else "nccl"
    if conf.backend not in ("auto", own):
        where = "the scale model" if on_host else "GPUs"
        raise BadValue("parallel.backend", conf.backend, f"auto, {own} on {where}")
    started = not planning and launched() is not None
    return own if processes > 1 or started or conf.backend == own else ""
