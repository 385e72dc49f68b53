"""SGLang's index tables, graph batch sizes and graph buffers, by version.

Sources are written ``file:line@version`` under ``sglang/srt/``. L is the context length, R the
request limit, every table is on the GPU of every rank and outside the KV pool's budget.
"""

from __future__ import annotations

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

# Taken by the 58 piecewise graphs of starts of 0.5.12.post1 on an H200 (chunks of 8192 tokens):
# 1.09 and 1.15 GB for two models, 1.14 in an earlier start.
PIECEWISE_MEASURED_BYTES = 1_125_000_000
PIECEWISE_MEASURED_SIZES = 58
# Likewise decode graphs, of 36 batch sizes 229 MB. Of 6 sizes 75 MB, where two starts agree once
# the tables beside them are taken to lie in torch's cache; 36 sizes read 192 MB in another start.
GRAPHS_BASE_BYTES = 44_400_000
GRAPH_BYTES = 5_130_000
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


def loaded(version: str) -> list[Item]:
    """What comes with the weights and is none."""
    return _measured("tables", "loaded", LOADED_MEASURED_BYTES, version)


def cublas(version: str) -> list[Item]:
    """What cuBLAS holds once the attention backend is there."""
    return _measured("workspace", "cublas", CUBLAS_MEASURED_BYTES, version)


def _measured(phase: str, name: str, by_version: dict[str, int], version: str) -> list[Item]:
    nbytes = by_version.get(version, 0)
    return [Item(phase, name, ((1, nbytes),), f"measured@{version}")] if nbytes else []


def rope_leftover_bytes(version: str, rope_bytes: int, weights_bytes: int) -> int:
    """What weights leave of the memory in which the rotary table was made.

    The first layer makes the table. torch keeps its freed temporaries and puts the weights of the
    later layers into them; a segment with one weight in it is not given back, and what it has left
    counts as used when the pool is sized. With tables for 10M positions that was 1.3 GB of an H200.
    """
    if version not in LOADED_MEASURED_BYTES:
        return 0
    segment = rope_bytes // 2
    if not segment:
        return 0
    used = min(-(-weights_bytes // segment), ROPE_TEMPORARIES)
    return max(0, used * segment - weights_bytes)


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


def graph_buffers(flags: SGLangFlags, settings: SGLangSettings, batches: list[int]) -> list[Item]:
    """Memory of the captured graphs themselves, after the pool."""
    items = []
    if batches:
        pieces = ((1, GRAPHS_BASE_BYTES), (len(batches), GRAPH_BYTES))
        source = "measured@0.5.12.post1"
        items.append(Item("workspace", "decode_cuda_graphs", pieces, source))
    if settings.piecewise_sizes:
        share = settings.piecewise_sizes / PIECEWISE_MEASURED_SIZES
        nbytes = int(PIECEWISE_MEASURED_BYTES * share)
        source = "measured@0.5.12.post1"
        items.append(Item("workspace", "piecewise_cuda_graphs", ((1, nbytes),), source))
    return items
