"""SGLang's index tables, graph batch sizes and graph buffers, by version.

Sources are written ``file:line@version`` under ``sglang/srt/``. L is the context length, R the
request limit, every table is on the GPU of every rank and outside the KV pool's budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from strategies.engine_model import MIB, EngineModel, Item, tensor

if TYPE_CHECKING:
    from strategies.sglang_flags import SGLangFlags, SGLangSettings

VERSIONS = ("0.4.6.post5", "0.5.2", "0.5.3", "0.5.9", "0.5.12.post1", "0.5.23")

# Rows of req_to_token beyond R: `size=max_num_reqs + 1` in model_runner.py:904@0.4.6.post5, a
# padding row in memory_pool.py:145@0.5.12.post1; none in between (memory_pool.py:75@0.5.2).
EXTRA_ROWS = {"0.4.6.post5": 1, "0.5.12.post1": 1, "0.5.23": 1}
# model_runner_kv_cache_mixin.py:245@0.5.12.post1: room for what speculation appends.
EXTRA_COLUMNS = 4

# Where mem_cache/memory_pool.py allocates req_to_token.
REQUEST_TABLE_LINES = {
    "0.4.6.post5": 72,
    "0.5.2": 74,
    "0.5.3": 80,
    "0.5.9": 144,
    "0.5.12.post1": 149,
    "0.5.23": 406,
}

# Graphs in 15 starts of 0.5.12.post1 on an H200, two models, read from the driver and from torch's
# private pools: decode graphs of 6 batch sizes 36 MiB, of 36 sizes 150 and 152 MiB.
GRAPHS_BASE_BYTES = round(13.2 * MIB)
GRAPH_BYTES = round(3.8 * MIB)
# 58 piecewise graphs: 374 to 380 MiB of the driver's, and pools of 628 and 684 MiB, which are gate,
# up and their product of the largest chunk, and 60 to 64 MiB for what is as wide as the model.
PIECEWISE_GRAPH_BYTES = round(6.48 * MIB)
PIECEWISE_POOL_BASE_BYTES = 64 * MIB
# What they can use of what torch has cached by then (217 to 225 MiB with 36 decode graphs, not in
# one piece): with it, 806,764 tokens start and 822,740 do not.
PIECEWISE_CACHED_BYTES = 160 * MIB
FLASHINFER_WORKSPACE_BYTES = 384 * MIB  # environ.py:370@0.5.12.post1


# Starts of 0.5.12.post1 on an H200. Once loaded, a process holds more than its weights and rotary
# table: kernels, and what torch's allocator rounds up (105 and 134 MB for two models, which follow
# from pools at four values of mem_fraction_static). cuBLAS and its workspace come with the backend.
LOADED_MEASURED_BYTES = {"0.5.12.post1": 120_000_000}
# More was free when the memory before the weights was read than beside the whole CUDA context:
# modules are loaded as they are first used.
FREE_EARLY_MEASURED_BYTES = {"0.5.12.post1": 100_000_000}
CUBLAS_MEASURED_BYTES = {"0.5.12.post1": 75_000_000}
# cos and sin of every position, and the angles: each half of the float32 table that is kept
# (layers/rotary_embedding/base.py:138-149@0.5.12.post1).
ROPE_TEMPORARIES = 3
# model_executor's reserve_rope_cache_for_long_sequences (utils/common.py:3982-4019@0.5.12.post1):
# positions beyond the context, rounded up to SGLANG_ROPE_CACHE_ALIGN.
ROPE_MARGIN_TOKENS = 256
ROPE_ALIGN_TOKENS = 128
# torch's caching allocator: segments are whole pages of 2 MiB, what is left of one is split off
# when it is larger than 1 MiB, and only tensors larger than that are put there.
SEGMENT_BYTES = 2 * MIB
SPLIT_BYTES = MIB


def segments(nbytes: int) -> int:
    """Bytes of the segments of torch's allocator that a large tensor takes."""
    return -(-nbytes // SEGMENT_BYTES) * SEGMENT_BYTES


def loaded(version: str) -> list[Item]:
    """What comes with the weights and is none."""
    return _measured("tables", "loaded", LOADED_MEASURED_BYTES, version)


def cublas(version: str) -> list[Item]:
    """What cuBLAS holds once the attention backend is there."""
    return _measured("workspace", "cublas", CUBLAS_MEASURED_BYTES, version)


def _measured(phase: str, name: str, by_version: dict[str, int], version: str) -> list[Item]:
    nbytes = by_version.get(version, 0)
    return [Item(phase, name, ((1, nbytes),), f"measured@{version}")] if nbytes else []


def _rope_rows(model: EngineModel, context_tokens: int) -> tuple[int, int]:
    """Rows of the rotary table that the first layer makes, and of the one that stays."""
    first = max(model.max_position_embeddings, context_tokens)
    needed = context_tokens + ROPE_MARGIN_TOKENS
    return first, max(first, -(-needed // ROPE_ALIGN_TOKENS) * ROPE_ALIGN_TOKENS)


def rope_table(model: EngineModel, version: str, context_tokens: int) -> Item:
    """Cosines and sines of every position: those of the config, then those of the context.

    Where the context needs more rows, a longer table replaces the first. Making one takes its
    angles, cosines and sines beside it, and the positions in float32.
    """
    first, rows = _rope_rows(model, context_tokens)
    transient = first * (ROPE_TEMPORARIES * model.rotary_dim // 2 + 1) * 4
    if version not in LOADED_MEASURED_BYTES:
        rows, transient = first, 0
    source = "layers/rotary_embedding/base.py:70@0.5.12.post1"
    made = tensor("tables", "rope_cos_sin", (rows, model.rotary_dim), "fp32", source)
    return replace(made, transient_bytes=transient, before_weights=True)


def rope_leftover_bytes(model: EngineModel, version: str, context_tokens: int) -> int:
    """What weights leave of the memory in which the rotary table was made.

    The first layer makes the table. torch keeps its freed temporaries and puts the weights of the
    later layers into them; a segment with one weight in it is not given back, and what it has left
    counts as used when the pool is sized. With tables for 10M positions that was 1.3 GB of an H200.

    A first table that a longer one replaces is kept likewise when a weight lies behind its end: one
    of 1.5 MiB kept 51 GiB at 107,139,364 tokens, and the engine refused to start, while it had
    started at 103,626,596, where 1.1 MiB were left behind the table.
    """
    if version not in LOADED_MEASURED_BYTES:
        return 0
    first, rows = _rope_rows(model, context_tokens)
    table = first * model.rotary_dim * 4
    segment, weights = table // 2, model.weights_bytes
    if not segment:
        return 0
    used = min(-(-weights // segment), ROPE_TEMPORARIES)
    left = max(0, used * segment - weights)
    behind = segments(table) - table
    fits = any(SPLIT_BYTES < nbytes <= behind for nbytes in model.weight_tensors_bytes)
    return left + (table if rows > first and fits else 0)


def rope_leftover(version: str, left_bytes: int, later: list[Item]) -> list[Item]:
    """What remains of it once every later allocation that fits into it lies in it."""
    for item in later:
        for count, nbytes in item.pieces:
            left_bytes -= min(count, left_bytes // nbytes if nbytes else 0) * nbytes
    if left_bytes <= 0:
        return []
    source = f"layers/rotary_embedding/base.py:149@{version}"
    return [Item("tables", "rope_leftover", ((1, left_bytes),), source)]


def at_least(version: str, other: str) -> bool:
    """Whether one of the known versions is not older than another."""
    return VERSIONS.index(version) >= VERSIONS.index(other)


def decode_graph_batches(
    version: str, nvml_mib: int, max_bs: int | None, request_limit: int
) -> list[int]:
    """List the batch sizes that are captured; tables have as many rows as the largest.

    ``cuda_graph_runner.py:127-169@0.4.6.post5``, ``:165-221@0.5.2``, ``:515-549@0.5.12.post1``:
    whatever is wished for, it is clamped to the request pool.
    """
    limit = request_limit + (1 if version == "0.4.6.post5" else 0)
    if at_least(version, "0.5.3"):
        top = min(max_bs or 0, limit + 512)  # what lies beyond the limit is cut off below
        sizes = [1, 2, 4, 8, 12, *range(16, 257, 8), *range(272, 512, 16), *range(512, top + 1, 32)]
        sizes = [*(s for s in sizes if s <= top), top]
    else:
        sizes = [1, 2, 4, 8, *range(16, 161, 8)]
        if nvml_mib > (96 if version == "0.4.6.post5" else 90) * 1024:
            sizes += range(160, 257, 8)
        if version == "0.5.2" and nvml_mib > 160_000:
            sizes += range(256, 513, 16)
    if max(sizes) > limit:
        sizes.append(limit)
    if max_bs and not at_least(version, "0.5.3"):
        sizes = [s for s in sizes if s <= max_bs] or [max_bs]
        if max(sizes) < max_bs:
            sizes += range(max(sizes), max_bs + 1, 16)
    return sorted({s for s in sizes if 0 < s <= limit})


def longest_piece(flags: SGLangFlags, chunk: int) -> int:
    """Tokens of the longest piece that is captured: a prefill chunk, or all a pool may hold."""
    return min(chunk, flags.max_total_tokens or chunk)


def piecewise_sizes(max_tokens: int) -> int:
    """How many prefill token counts get a piecewise graph (``server_args.py:1657-1675@0.5.12``)."""
    sizes = [*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64)]
    sizes += range(1280, 4097, 256)
    return sum(1 for size in sizes if size <= max_tokens) + len(range(4608, max_tokens + 1, 512))


def request_table(version: str, context_tokens: int, request_limit: int) -> Item:
    """``req_to_token``: a row of token slots a request; the table that grows with the context."""
    rows = request_limit + EXTRA_ROWS.get(version, 0)
    source = f"mem_cache/memory_pool.py:{REQUEST_TABLE_LINES[version]}@{version}"
    shape = (rows, context_tokens + EXTRA_COLUMNS)
    return tensor("tables", "req_to_token", shape, "int32", source)


def backend_tables(
    model: EngineModel,
    flags: SGLangFlags,
    settings: SGLangSettings,
    context_tokens: int,
    graph_batch: int,
) -> list[Item]:
    """Buffers of the attention backend's decode graphs; none with CUDA graphs off."""
    backend = settings.attention_backend
    items: list[Item] = []
    if backend == "flashinfer":
        source = "environ.py:370@0.5.12.post1"
        items.append(
            Item("workspace", "flashinfer_workspace", ((1, FLASHINFER_WORKSPACE_BYTES),), source)
        )
    if not graph_batch:
        return items
    if backend == "fa3":
        items += _fa3_tables(model, flags, settings, context_tokens, graph_batch)
    elif backend in ("flashinfer", "triton"):
        dtype = "int32" if backend == "flashinfer" else "int64"
        wrappers = 2 if backend == "flashinfer" and model.window_layers else 1
        line = "flashinfer_backend.py:518" if backend == "flashinfer" else "triton_backend.py:468"
        source = f"layers/attention/{line}@0.5.9"
        shape = (wrappers, graph_batch * context_tokens)
        items.append(tensor("workspace", "cuda_graph_kv_indices", shape, dtype, source))
        mask = (graph_batch * context_tokens,)
        items.append(tensor("workspace", "cuda_graph_custom_mask", mask, "uint8", source))
    return items


def _fa3_tables(
    model: EngineModel,
    flags: SGLangFlags,
    settings: SGLangSettings,
    context_tokens: int,
    graph_batch: int,
) -> list[Item]:
    pages = -(-context_tokens // flags.page_size)
    source = "layers/attention/flashattention_backend.py:1349@0.5.12.post1"
    items = [tensor("workspace", "page_table", (graph_batch, pages), "int32", source)]
    if flags.version == "0.4.6.post5":
        old = "layers/attention/flashattention_backend.py:1150@0.4.6.post5"
        items.append(
            tensor("workspace", "page_table_draft_decode", (graph_batch, pages), "int32", old)
        )
    items.append(tensor("workspace", "strided_indices", (pages,), "int64", source))
    if model.window_layers and model.window_kind == "chunked":
        batches = graph_batch * -(-context_tokens // model.window_tokens)
        local = (batches, -(-model.window_tokens // flags.page_size))
        line = "layers/attention/flashattention_backend.py:1388@0.5.12.post1"
        items.append(tensor("workspace", "local_block_table", local, "int32", line))
    if settings.hybrid and at_least(flags.version, "0.5.9"):
        line = "layers/attention/flashattention_backend.py:1397@0.5.12.post1"
        items.append(tensor("workspace", "swa_page_table", (graph_batch, pages), "int32", line))
    return items


def piecewise_graphs(model: EngineModel, sizes: int, chunk_tokens: int) -> Item:
    """Prefill graphs of so many sizes up to ``chunk_tokens``.

    Before the second is captured, its activations lie beside the pool of the first, as far as they
    do not fit into what torch has cached.
    """
    driver = sizes * PIECEWISE_GRAPH_BYTES
    pool = chunk_tokens * model.mlp_bytes_per_token + PIECEWISE_POOL_BASE_BYTES
    pieces = ((1, driver + pool),)
    source = "measured@0.5.12.post1"
    made = Item("workspace", "piecewise_cuda_graphs", pieces, source)
    return replace(made, transient_bytes=max(0, pool - driver - PIECEWISE_CACHED_BYTES))


def graph_buffers(
    model: EngineModel, flags: SGLangFlags, settings: SGLangSettings, batches: list[int]
) -> list[Item]:
    """Memory of the captured graphs themselves, after the pool."""
    items = []
    if batches:
        pieces = ((1, GRAPHS_BASE_BYTES), (len(batches), GRAPH_BYTES))
        source = "measured@0.5.12.post1"
        items.append(Item("workspace", "decode_cuda_graphs", pieces, source))
    if settings.piecewise_sizes:
        longest = longest_piece(flags, settings.chunked_prefill_size)
        items.append(piecewise_graphs(model, settings.piecewise_sizes, longest))
    return items
