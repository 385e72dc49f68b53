"""What vLLM (V1) allocates at start-up, and when it refuses: formulas of four releases.

Sources are written ``file:line@version`` under ``vllm/``. Everything here is arithmetic on a
model, flags and a GPU; :mod:`strategies.vllm` really allocates it.

The order is: weights (with the rotary table), a profile pass, block tables, the whole KV pool,
CUDA graphs, a warm-up. The pool is allocated and zeroed at once; only the assignment of blocks is
on demand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from strategies.engine_model import (
    GIB,
    EngineModel,
    EnginePlan,
    Item,
    Refusal,
    tensor,
)
from strategies.vllm_flags import AUTO, VLLMFlags, VLLMSettings, resolve
from strategies.vllm_tables import (
    at_least,
    backend_tables,
    block_tables,
    graph_bytes,
)

# What libraries take beside torch during the profile pass: 1.59 GiB were kept beyond weights and
# rotary table in three eager starts of 0.23.0 on an H200, of which 1.28 GiB are activations.
NON_TORCH_BYTES = round(0.31 * GIB)
# Not eager, the profile pass of 0.23.0 peaked at the rotary table once more and 82 MB whatever the
# requests (the engine's own figure, in two starts with one K/V head), or 106 MB (with two heads;
# follows from what it then had for K/V).
COMPILED_PEAK_BYTES = 94_000_000
# Driver memory that maps pinned host memory: 134 MB for 41 GB, 2 MB for 0.6 GB.
MAPPED_SHARE = 1 / 305
# Offsets into all_token_ids are products of two int32 in Triton kernels (penalties.py:244,
# buffer_utils.py:232 under v1/worker/gpu@0.23.0), which the warm-up runs for every request slot
# (v1/worker/gpu/warmup.py:100).
INT32_ELEMENTS = 1 << 31

SEE_DOCS = " See https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."


@dataclass(frozen=True)
class Groups:
    """KV cache groups (``_get_kv_cache_groups_uniform_page_size``, ``kv_cache_utils.py@0.23.0``).

    ``layers`` layers of each group share as many tensors; ``full`` and ``window`` count groups.
    """

    layers: int
    full: int
    window: int

    @property
    def count(self) -> int:
        """Block tables that are kept."""
        return self.full + self.window


def kv_groups(model: EngineModel, settings: VLLMSettings) -> Groups:
    """How layers are grouped: all in one without the hybrid manager."""
    if not settings.hybrid:
        return Groups(model.layers, 1, 0)
    if not model.full_layers:
        return Groups(model.window_layers, 0, 1)
    small, large = sorted((model.full_layers, model.window_layers))
    size = large if large < small * 1.5 else small
    return Groups(size, -(-model.full_layers // size), -(-model.window_layers // size))


def needed_blocks(
    model: EngineModel, flags: VLLMFlags, settings: VLLMSettings, groups: Groups, tokens: int
) -> int:
    """Blocks that one request of ``tokens`` tokens holds at most, over all groups.

    ``max_memory_usage_bytes`` in ``v1/kv_cache_interface.py:226-234,426-447,488-519@0.23.0``.
    """
    local = -(-tokens // flags.decode_context_parallel_size)
    full = -(-local // flags.block_size)
    most, extra = _window_blocks(model, flags, settings)
    window = min(-(-tokens // flags.block_size), most) + extra
    return groups.full * full + groups.window * window


def _window_blocks(model: EngineModel, flags: VLLMFlags, settings: VLLMSettings) -> tuple[int, int]:
    """Blocks behind a window at most, and one more where a window may begin inside a block."""
    if model.window_kind == "chunked":
        held, extra = model.window_tokens + settings.max_num_batched_tokens, 0
    else:
        held, extra = model.window_tokens - 1 + settings.max_num_batched_tokens, 1
    return -(-held // flags.block_size), extra


def block_bytes(model: EngineModel, flags: VLLMFlags, groups: Groups) -> int:
    """Bytes of one block over the layers of a group: ``page_size * group_size``."""
    return flags.block_size * model.layer_token_bytes * groups.layers


def largest_fit(
    model: EngineModel,
    flags: VLLMFlags,
    settings: VLLMSettings,
    groups: Groups,
    blocks: int,
    upper_tokens: int,
) -> int:
    """Find the longest request that ``blocks`` hold, as ``kv_cache_utils.py:1815@0.23.0`` does."""

    def fits(tokens: int) -> bool:
        return needed_blocks(model, flags, settings, groups, tokens) <= blocks

    if upper_tokens < 1 or not fits(1):
        return 0
    low, high = 1, upper_tokens
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def available_kv_bytes(
    model: EngineModel,
    flags: VLLMFlags,
    settings: VLLMSettings,
    total_bytes: int,
    rope_bytes: int,
    pinned_bytes: int,
) -> int:
    """``ceil(total x utilization) - weights - profile peak - other libraries - graph estimate``.

    ``v1/worker/gpu_worker.py:279@0.11.0``, ``:417@0.19.1``, ``:372-465@0.23.0``, ``:753@0.33.0``;
    the estimate of graphs is subtracted from 0.21.0 on, but the V2 runner's is 0
    (``v1/worker/gpu/model_runner.py:660@0.23.0``).
    """
    if flags.kv_cache_memory_bytes is not None:
        return flags.kv_cache_memory_bytes
    requested = math.ceil(total_bytes * settings.gpu_memory_utilization)
    peak = settings.max_num_batched_tokens * model.activation_bytes_per_token
    if flags.version == "0.23.0" and not flags.enforce_eager:
        peak = max(peak, rope_bytes + COMPILED_PEAK_BYTES)
    kept = model.weights_bytes + rope_bytes + peak + NON_TORCH_BYTES
    kept += round(pinned_bytes * MAPPED_SHARE)
    estimates = at_least(flags.version, "0.23.0") and not flags.enforce_eager
    if estimates and not (settings.v2_runner and flags.version == "0.23.0"):
        kept += graph_bytes(model, settings.max_num_seqs)
    return requested - kept


def vllm_plan(
    model: EngineModel,
    flags: VLLMFlags,
    context_tokens: int,
    total_bytes: int,
    free_before_bytes: int,
    hopper: bool = True,
) -> EnginePlan:
    """Every allocation of a start, in order, or the refusal.

    Parameters
    ----------
    total_bytes : int
        Of the GPU, as CUDA shows it: utilization is a fraction of this.
    free_before_bytes : int
        Free once CUDA is up, before the weights.
    """
    length = flags.max_model_len
    asked = tokens = length if isinstance(length, int) else context_tokens
    settings = resolve(model, flags, tokens, total_bytes, hopper)
    rope = tensor(
        "tables",
        "rope_cos_sin",
        (max(model.max_position_embeddings, tokens), model.rotary_dim),
        "bf16",
        "model_executor/layers/rotary_embedding/base.py:59@0.23.0",
    )
    groups = kv_groups(model, settings)
    tables = block_tables(model, flags, settings, tokens, groups.count, asked)
    first = [rope, *(item for item in tables if item.location != "device")]
    pinned = sum(item.nbytes for item in first if item.location == "host_pinned")
    available = available_kv_bytes(model, flags, settings, total_bytes, rope.nbytes, pinned)
    each = block_bytes(model, flags, groups)
    blocks = max(0, available // each)
    # 0.33.0 plans without the null block (kv_cache_planning.py:1533-1543).
    usable = blocks - 1 if flags.version == "0.33.0" else blocks
    largest = largest_fit(model, flags, settings, groups, usable, tokens)
    refusal = _requested_too_much(flags, settings, total_bytes, free_before_bytes)
    if refusal is None and length == AUTO and largest:
        tokens = largest
    if refusal is None and (available <= 0 or largest < tokens):
        needed = needed_blocks(model, flags, settings, groups, tokens) * each
        refusal = _does_not_fit(flags, tokens, needed, available, largest)
    values = _settings(settings, available)
    if refusal is not None:
        made = () if refusal.phase == "context" else tuple(first)
        return EnginePlan("vllm", flags.version, made, 0, flags.block_size, 0, 0,
                          refusal=refusal, settings=values)  # fmt: skip
    # Tables on the GPU are as long as what is served, which ``auto`` may have made shorter.
    tables = block_tables(model, flags, settings, tokens, groups.count, asked)
    items = [rope, *tables]
    items.append(_pool(model, flags, groups, blocks))
    items += backend_tables(model, flags, settings, tokens, groups.count)
    values["max_model_len"] = tokens
    held = largest_fit(model, flags, settings, groups, blocks, blocks * flags.block_size)
    window, extra = _window_blocks(model, flags, settings)
    notes: tuple[str, ...] = ()
    if model.state_bytes_per_request:
        notes = ("recurrent state shares vLLM's blocks and is not counted here",)
    return EnginePlan(
        "vllm", flags.version, tuple(items), held, flags.block_size, settings.max_num_seqs,
        tokens, slots=max(0, blocks - 1), full_groups=groups.full, window_groups=groups.window,
        window_slots=window, window_extra_slots=extra, settings=values, notes=notes,
        fault=_fault(flags, settings, asked),
    )  # fmt: skip


def _fault(flags: VLLMFlags, settings: VLLMSettings, asked_tokens: int) -> str:
    """What crashes a start whose memory suffices: 0.23.0's V2 runner, by its 32-bit offsets."""
    last = (settings.max_num_seqs - 1) * asked_tokens  # where the last request's row begins
    if flags.version != "0.23.0" or not settings.v2_runner or last < INT32_ELEMENTS:
        return ""
    most = (INT32_ELEMENTS - 1) // asked_tokens + 1
    return (
        f"vLLM {flags.version}: an illegal memory access in its warm-up: offsets into "
        f"all_token_ids [{settings.max_num_seqs}, {asked_tokens}] do not fit into 32 bits; "
        f"with max_num_seqs={most} or fewer they do"
    )


def _pool(model: EngineModel, flags: VLLMFlags, groups: Groups, blocks: int) -> Item:
    """``torch.zeros`` a layer of a group; one buffer in 0.33.0 (``v1/worker/utils.py:596``)."""
    page = flags.block_size * model.layer_token_bytes
    line = {
        "0.11.0": "v1/worker/gpu_model_runner.py:3772",
        "0.19.1": "v1/worker/gpu_model_runner.py:6529",
        "0.23.0": "v1/worker/gpu/attn_utils.py:155",
        "0.33.0": "v1/worker/utils.py:596",
    }[flags.version]
    pieces = (groups.layers, page * blocks)
    if flags.version == "0.33.0":
        pieces = (1, page * blocks * groups.layers)
    shape = f"{pieces[0]} x int8 [{pieces[1]}] ({blocks} blocks of {flags.block_size})"
    return Item("pool", "kv_pool", (pieces,), f"{line}@{flags.version}", shape=shape)


def _requested_too_much(
    flags: VLLMFlags, settings: VLLMSettings, total_bytes: int, free_bytes: int
) -> Refusal | None:
    """``request_memory`` (``v1/worker/utils.py:405-425@0.23.0``)."""
    requested = math.ceil(total_bytes * settings.gpu_memory_utilization)
    if flags.kv_cache_memory_bytes is not None or free_bytes >= requested:
        return None
    message = (
        f"Free memory on device cuda:0 ({free_bytes / GIB:.2f}/{total_bytes / GIB:.2f} GiB) on "
        f"startup is less than desired GPU memory utilization "
        f"({settings.gpu_memory_utilization}, {requested / GIB:.2f} GiB). Decrease GPU memory "
        f"utilization or reduce GPU memory used by other processes."
    )
    return Refusal("context", "gpu_memory_utilization", requested, free_bytes, message)


def _does_not_fit(
    flags: VLLMFlags, tokens: int, needed: int, available: int, largest: int
) -> Refusal:
    """``_check_enough_kv_cache_memory`` (``kv_cache_utils.py:717@0.11.0``, ``:713@0.23.0``)."""
    new = at_least(flags.version, "0.23.0")
    if available <= 0:
        message = (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization` "
            "when initializing the engine"
        )
        message += (
            " (this flag also controls CPU memory reservation on the CPU backend, despite its name)"
        ) * new
        message += "." + SEE_DOCS * new
        return Refusal("pool", "kv_pool", needed, max(0, available), message)
    whose = "model's" if new else "models's"
    message = (
        f"To serve at least one request with the {whose} max seq len ({tokens}), "
        f"({needed / GIB:.2f} GiB KV cache is needed, which is larger than the available KV cache "
        f"memory ({available / GIB:.2f} GiB). "
    )
    if largest > 0:
        message += (
            f"Based on the available memory, the estimated maximum model length is {largest}. "
        )
    message += "Try increasing `gpu_memory_utilization` "
    message += "(which also controls CPU memory on the CPU backend) " * new
    message += "or decreasing `max_model_len` when initializing the engine." + SEE_DOCS * new
    return Refusal("pool", "kv_pool", needed, available, message)


def _settings(settings: VLLMSettings, available: int) -> dict[str, float | int | str | bool]:
    return {
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "attention_backend": settings.attention_backend,
        "hybrid_kv_cache_manager": settings.hybrid,
        "model_runner": "v2" if settings.v2_runner else "v1",
        "available_kv_bytes": available,
    }
