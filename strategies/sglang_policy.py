"""What SGLang allocates at start-up, and how much: formulas of six releases.

Sources are written ``file:line@version`` under ``sglang/srt/``. Everything here is arithmetic on
a model, flags and a GPU; :mod:`strategies.sglang` really allocates it.

The order is: weights (with the rotary table), profile, ``req_to_token``, KV pool, attention
backend's graph tables, CUDA graphs. The context length enters the request limit and the tables,
never the pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.engine_model import (
    GIB,
    EngineModel,
    EnginePlan,
    Item,
    Refusal,
    nvml_total_mib,
    tensor,
)
from strategies.sglang_flags import SGLangFlags, SGLangSettings, resolve
from strategies.sglang_tables import (
    FREE_EARLY_MEASURED_BYTES,
    at_least,
    backend_tables,
    cublas,
    decode_graph_batches,
    graph_buffers,
    loaded,
    request_table,
    rope_leftover,
    rope_leftover_bytes,
    rope_table,
    segments,
)

# Where mem_cache/memory_pool.py allocates a layer's buffers.
POOL_LINES = {
    "0.4.6.post5": 282,
    "0.5.2": 451,
    "0.5.3": 461,
    "0.5.9": 811,
    "0.5.12.post1": 907,
    "0.5.23": 2594,
}
# Slots of recurrent state a running request (model_runner_kv_cache_mixin.py:51@0.5.12.post1) and
# that state's share of the rest beside the K/V (server_args.py:654).
STATE_SLOTS_PER_REQUEST = 3
STATE_TO_KV_RATIO = 0.9


def request_limit(flags: SGLangFlags, pool_tokens: int, context_tokens: int) -> int:
    """R: how many requests run at once, and rows of ``req_to_token``.

    ``model_runner.py:836-845@0.4.6.post5``, ``model_runner_kv_cache_mixin.py:340-352@0.5.9``,
    ``:809-822@0.5.12.post1``, ``kv_cache_configurator.py:3116-3133@0.5.23``. With default flags
    R is 4096 up to L = M / 8, falls as 512·M / L, and is 2048 from L = M / 4 on.
    """
    estimated = max(min(int(pool_tokens / context_tokens * 512), 4096), 2048)
    wished = flags.max_running_requests
    if not at_least(flags.version, "0.5.12.post1"):
        return estimated if wished is None else wished
    if wished is None:
        return min(estimated, pool_tokens // 2)
    bound = pool_tokens // 2 if flags.version == "0.5.23" else estimated
    return min(wished, bound)


@dataclass(frozen=True)
class Pools:
    """Tokens of the pools: ``full`` is what a request is admitted by."""

    full: int
    window: int
    profiled: int
    state_slots: int = 0


def state_slots(model: EngineModel, flags: SGLangFlags, rest_gib: float) -> int:
    """Slots of recurrent state, made before the KV pool.

    512 or the request limit in ``model_runner.py:312-322@0.5.2``; 0.9 of the K/V's share in
    ``handle_max_mamba_cache`` (``model_runner_kv_cache_mixin.py:77-133@0.5.12.post1``).
    """
    if not model.state_bytes_per_request:
        return 0
    if not at_least(flags.version, "0.5.9"):
        return flags.max_running_requests or 512
    share = STATE_TO_KV_RATIO / (1 + STATE_TO_KV_RATIO)
    return max(0, int(rest_gib * share * GIB // model.state_bytes_per_request))


def pool_sizes(
    model: EngineModel,
    flags: SGLangFlags,
    settings: SGLangSettings,
    context_tokens: int,
    free_before_bytes: int,
    free_after_bytes: int,
) -> Pools:
    """Tokens of the KV pools, from the memory that is left.

    ``rest = free_after_weights - free_before_weights x (1 - mem_fraction_static)``
    (``model_runner.py:785@0.4.6.post5``, ``:1092@0.5.2``, ``model_runner_kv_cache_mixin.py:60-75``
    ``@0.5.12.post1``), then divided by the bytes of a token.
    """
    before = free_before_bytes + FREE_EARLY_MEASURED_BYTES.get(flags.version, 0)
    kept = before / GIB * (1 - settings.mem_fraction_static)
    rest = free_after_bytes / GIB - kept
    slots = state_slots(model, flags, rest)
    available = int((rest - slots * model.state_bytes_per_request / GIB) * GIB)
    if settings.hybrid and at_least(flags.version, "0.5.9"):
        ratio = settings.swa_full_tokens_ratio
        cell = model.layer_token_bytes * (model.full_layers + ratio * model.window_layers)
        profiled = int(available // cell)
    else:
        profiled = available // model.token_bytes
    profiled = min(profiled, flags.max_total_tokens or profiled)
    page = flags.page_size
    profiled = profiled // page * page
    if not settings.hybrid:
        return Pools(profiled, 0, profiled, slots)
    if at_least(flags.version, "0.5.9"):
        # set_num_tokens_hybrid_swa, mixin.py:206-299@0.5.9; pool_configurator.py@0.5.12.post1
        window = int(profiled * settings.swa_full_tokens_ratio) // page * page
        return Pools(profiled, window, profiled, slots)
    return _llama4_pools(model, flags, context_tokens, profiled)


def _llama4_pools(
    model: EngineModel, flags: SGLangFlags, context_tokens: int, tokens: int
) -> Pools:
    """``set_num_token_hybrid`` (``model_runner.py:1142-1170@0.5.2``): a quarter of layers full."""
    share = flags.hybrid_kvcache_ratio or 0.0
    t = (1 - share) + share * model.window_tokens / context_tokens
    window = int(4 * tokens * t // (3 * t + 1))
    full = int(4 * tokens - 12 * tokens * t // (3 * t + 1))
    page = flags.page_size
    return Pools(full // page * page, window // page * page, tokens)


def _pool_items(
    model: EngineModel, flags: SGLangFlags, settings: SGLangSettings, pools: Pools
) -> list[Item]:
    """K of every layer, then V (``memory_pool.py:895-918@0.5.12.post1``); window layers first."""
    source = f"mem_cache/memory_pool.py:{POOL_LINES[flags.version]}"
    half = model.layer_token_bytes // 2

    def buffers(layers: int, tokens: int) -> tuple[int, int]:
        return 2 * layers, (tokens + flags.page_size) * half

    pieces = [buffers(model.full_layers if settings.hybrid else model.layers, pools.full)]
    if settings.hybrid:
        pieces.insert(0, buffers(model.window_layers, pools.window))
    shape = (
        f"{pieces[-1][0]} x [{pools.full + flags.page_size}, {model.kv_heads}, {model.head_dim}]"
    )
    items = [Item("pool", "kv_pool", tuple(pieces), f"{source}@{flags.version}", shape=shape)]
    slots = max(pools.full // flags.page_size, 1)
    allocator = "mem_cache/allocator.py:137@0.5.12.post1"
    items.append(tensor("pool", "free_slots", (slots,), "int64", allocator))
    if settings.hybrid:
        mapping = (pools.full + flags.page_size + 1,)
        items.append(tensor("pool", "full_to_swa_index_mapping", mapping, "int64", allocator))
    return items


def sglang_plan(
    model: EngineModel,
    flags: SGLangFlags,
    context_tokens: int,
    total_bytes: int,
    free_before_bytes: int,
    hopper: bool = True,
) -> EnginePlan:
    """Every allocation of a start, in order.

    Parameters
    ----------
    total_bytes : int
        Of the GPU, as CUDA shows it.
    free_before_bytes : int
        Free once CUDA and NCCL are up, before the weights.
    """
    settings = resolve(model, flags, total_bytes, hopper)
    rope = rope_table(model, flags.version, context_tokens)
    own = [rope, *loaded(flags.version)]
    left = rope_leftover_bytes(model, flags.version, context_tokens)
    taken = sum(segments(i.nbytes) for i in own)
    free_after = free_before_bytes - model.weights_bytes - taken - left
    pools = pool_sizes(model, flags, settings, context_tokens, free_before_bytes, free_after)
    values = _settings(settings)
    if pools.full <= 0:
        refusal = _too_small(flags, settings, free_before_bytes, free_after)
        return EnginePlan("sglang", flags.version, tuple(own), 0, flags.page_size, 0, 0,
                          refusal=refusal, settings=values)  # fmt: skip
    counted = pools.full if at_least(flags.version, "0.5.12.post1") else pools.profiled
    limit = request_limit(flags, counted, context_tokens)
    if pools.state_slots:
        each = STATE_SLOTS_PER_REQUEST if at_least(flags.version, "0.5.9") else 1
        limit = min(limit, pools.state_slots // each)
    batches = []
    if not flags.disable_cuda_graph:
        nvml_mib = nvml_total_mib(total_bytes)
        batches = decode_graph_batches(flags.version, nvml_mib, settings.cuda_graph_max_bs, limit)
    tables = [request_table(flags.version, context_tokens, limit)]
    if pools.state_slots:
        state = ((1, pools.state_slots * model.state_bytes_per_request),)
        tables.append(
            Item("tables", "state_pool", state, "mem_cache/memory_pool.py:195@0.5.12.post1")
        )
    tables += _pool_items(model, flags, settings, pools)
    backend = backend_tables(model, flags, settings, context_tokens, max(batches, default=0))
    items = [*own, *rope_leftover(flags.version, left, [*tables, *backend]), *tables]
    items += [*cublas(flags.version), *backend, *graph_buffers(model, flags, settings, batches)]
    notes: tuple[str, ...] = ()
    if pools.full < context_tokens:
        notes = (
            f"the pool holds {pools.full:,} tokens, fewer than the context of {context_tokens:,}: "
            f"it starts; a prompt leaves a token for the answer: {pools.full - 1:,} at most",
        )
    values["max_running_requests"] = limit
    return EnginePlan(
        "sglang", flags.version, tuple(items), pools.full, flags.page_size, limit,
        min(context_tokens, pools.full), slots=pools.full // flags.page_size,
        window_pool_tokens=pools.window, settings=values, notes=notes,
    )  # fmt: skip


def _settings(settings: SGLangSettings) -> dict[str, float | int | str | bool]:
    return {
        "mem_fraction_static": round(settings.mem_fraction_static, 4),
        "chunked_prefill_size": settings.chunked_prefill_size,
        "cuda_graph_max_bs": settings.cuda_graph_max_bs or 0,
        "attention_backend": settings.attention_backend,
        "piecewise_sizes": settings.piecewise_sizes,
        "hybrid": settings.hybrid,
    }


def _too_small(
    flags: SGLangFlags, settings: SGLangSettings, before_bytes: int, after_bytes: int
) -> Refusal:
    """Word it as ``model_runner.py:899@0.4.6.post5``, ``pool_configurator.py:53@0.5.12.post1``."""
    fraction = settings.mem_fraction_static
    if flags.version == "0.5.23":  # mem_cache/kv_cache_configurator.py:3040
        minimum = 1 - after_bytes / before_bytes
        message = (
            "Loaded weights leave no GPU memory for the KV cache under "
            f"--mem-fraction-static={fraction}. Raise --mem-fraction-static above {minimum:.3f}"
        )
    else:
        message = "Not enough memory. Please try to increase --mem-fraction-static."
        owner = "" if flags.version == "0.5.12.post1" else "self.server_args."
        if at_least(flags.version, "0.5.3"):
            message += f" Current value: {owner}mem_fraction_static={fraction}"
    kept = int(before_bytes * (1 - fraction))
    return Refusal("pool", "kv_pool", kept, max(after_bytes, 0), message)
