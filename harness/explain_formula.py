"""What can be said of SGLang without a config.json: its request table needs no geometry."""

from __future__ import annotations

from dataclasses import dataclass

from harness.explain_launch import Launch
from harness.explain_log import LogFacts
from harness.explain_spec import CONTEXT_BYTES, engine_flag, known_version
from harness.gpus import Gpu
from harness.sizes import GIB, gib
from strategies.engine_model import EngineModel
from strategies.sglang_flags import SGLangFlags, resolve
from strategies.sglang_tables import piecewise_graphs, request_table

SMALLEST_DEFAULT_LIMIT = 2048
ACTIVATION_BYTES = 2 * GIB  # kept free for a prefill chunk of a model that is not known


@dataclass(frozen=True)
class FormulaAnswer:
    """What ate the memory, and the change that gives it back."""

    ate: str
    change: str


def request_table_answer(launch: Launch, gpu: Gpu, facts: LogFacts | None) -> FormulaAnswer | None:
    """Name ``req_to_token`` when it alone exceeds what SGLang leaves beside weights and pool.

    Its rows are the request limit, which is 2048 or more unless set; its columns the context.
    """
    if launch.engine != "sglang" or not launch.context_tokens:
        return None
    version, _ = known_version("sglang", launch.version)
    names = SGLangFlags.__dataclass_fields__
    flags = SGLangFlags(
        **{k: v for k, v in launch.flags.items() if k in names} | {"version": version}
    )
    shape = EngineModel(1, 1, 1, 128, tensor_parallel=launch.tensor_parallel)
    settings = resolve(shape, flags, gpu.total_bytes, gpu.hopper)
    free_before = facts.free_before_bytes if facts is not None else 0
    free_before = free_before or gpu.total_bytes - CONTEXT_BYTES["sglang"]
    headroom = round(free_before * (1 - settings.mem_fraction_static))
    limit = flags.max_running_requests or SMALLEST_DEFAULT_LIMIT
    table = request_table(version, launch.context_tokens, limit)
    if table.nbytes <= headroom:
        return None
    at_least = "" if flags.max_running_requests else "at least "
    ate = (
        f"req_to_token: {at_least}{gib(table.nbytes)}  {table.shape}  {table.source}; "
        f"{gib(headroom)} are left beside weights and pool (mem_fraction_static "
        f"{settings.mem_fraction_static:.3f})"
    )
    graphs = piecewise_graphs(shape, settings.piecewise_sizes, settings.chunked_prefill_size)
    graphs_bytes = graphs.nbytes + graphs.transient_bytes if settings.piecewise_sizes else 0
    left = headroom - graphs_bytes - ACTIVATION_BYTES
    return FormulaAnswer(ate, _change(launch, flags, version, left))


def _change(launch: Launch, flags: SGLangFlags, version: str, left_bytes: int) -> str:
    """The largest power of two of running requests whose tables fit into what is left."""
    context = launch.context_tokens or 0
    rows = SMALLEST_DEFAULT_LIMIT
    while rows > 1:
        rows //= 2
        needed = request_table(version, context, rows).nbytes
        if not flags.disable_cuda_graph:
            needed += min(rows, flags.cuda_graph_max_bs or 512) * context * 4 // flags.page_size
        if needed <= left_bytes:
            flag = engine_flag("sglang", "max_running_requests", str(rows))
            return f"{flag}  to start (at most {rows} requests at once; the pool stays the same)"
    return "no number of requests leaves room for the table; --config gives the longest context"
