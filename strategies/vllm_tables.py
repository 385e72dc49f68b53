"""vLLM's block tables, host buffers and graphs, by version.

Sources are written ``file:line@version`` under ``vllm/``. None of these is in the KV budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from strategies.engine_model import MIB, EngineModel, Item, tensor

if TYPE_CHECKING:
    from strategies.vllm_flags import VLLMFlags, VLLMSettings

VERSIONS = ("0.11.0", "0.19.1", "0.23.0", "0.33.0")
# config/vllm.py:69-75@0.23.0: dense, unquantised models of these run on the V2 runner.
V2_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
FLASHINFER_WORKSPACE_BYTES = 394 * MIB
# Graphs in starts of 0.23.0 on an H200, each size captured twice (piecewise and whole), read from
# the driver and from torch's private pools. The driver's share: 54 MiB of 7 sizes, 442 of 51.
GRAPH_BYTES = round(8.818 * MIB)
# Pools, fixed by three starts (56 and 124 MiB for 7 and 51 sizes of one model, 174 for another):
# a base, what the attention splits hold a query head and token of the largest size, and a share
# of that size's activations.
GRAPH_POOL_BASE_BYTES = round((51.47 - 7.73) * MIB)
GRAPH_POOL_HEAD_TOKEN_BYTES = round(0.023104 * MIB)
GRAPH_POOL_MLP_SHARE = 0.7153


def at_least(version: str, other: str) -> bool:
    """Whether one of the known versions is not older than another."""
    return VERSIONS.index(version) >= VERSIONS.index(other)


def uses_v2_runner(model: EngineModel, version: str) -> bool:
    """Which model runner is the default (``config/vllm.py:519-558@0.23.0``, ``:731@0.33.0``)."""
    if version == "0.33.0":
        return True
    dense = not model.moe and not model.quantized
    return version == "0.23.0" and dense and model.architecture in V2_ARCHITECTURES


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Batch sizes that are captured (``config/vllm.py:1627@0.23.0``): at most 51."""
    top = min(512, 2 * max_num_seqs)
    return [s for s in (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)) if s <= top]


def graph_bytes(model: EngineModel, max_num_seqs: int) -> int:
    """What captured graphs take, of the driver's memory and in torch's private pools."""
    sizes = graph_sizes(max_num_seqs)
    top = max(sizes, default=0)
    pool = GRAPH_POOL_BASE_BYTES + top * model.q_heads * GRAPH_POOL_HEAD_TOKEN_BYTES
    pool += round(top * model.mlp_bytes_per_token * GRAPH_POOL_MLP_SHARE)
    return pool + len(sizes) * GRAPH_BYTES


def table_width(version: str, context_tokens: int, block_size: int) -> int:
    """Columns of a block table, aligned to 128 tokens from 0.23.0 on (``block_table.py:262``)."""
    blocks = -(-context_tokens // block_size)
    align = max(1, 128 // block_size) if at_least(version, "0.23.0") else 1
    return -(-blocks // align) * align


def block_tables(
    model: EngineModel,
    flags: VLLMFlags,
    settings: VLLMSettings,
    context_tokens: int,
    groups: int,
    asked_tokens: int,
) -> list[Item]:
    """Block tables on the GPU and token buffers on the host.

    Token buffers are made before the pool is sized: for the length that was asked for
    (``asked_tokens``), also where ``auto`` then fits a shorter one.
    """
    version, rows = flags.version, settings.max_num_seqs
    width = table_width(version, context_tokens, flags.block_size)
    shape = (groups, rows, width)
    if settings.v2_runner:
        # Two copies: the state, and the input of the forward pass (v1/worker/gpu/block_table.py).
        line = "46" if version == "0.23.0" else "68"
        source = f"v1/worker/gpu/block_table.py:{line}@{version}"
        host = f"v1/worker/gpu/states.py:{'33' if version == '0.23.0' else '37'}@{version}"
        return [
            tensor("tables", "block_tables", shape, "int32", source),
            tensor("tables", "input_block_tables", shape, "int32", source),
            tensor("tables", "all_token_ids", (rows, asked_tokens), "int32", host, "host_pinned"),
        ]
    line = {"0.11.0": "34", "0.33.0": "80"}.get(version, "70")
    source = f"v1/worker/block_table.py:{line}@{version}"
    line = {"0.11.0": "111", "0.19.1": "115", "0.23.0": "133", "0.33.0": "131"}[version]
    host = f"v1/worker/gpu_input_batch.py:{line}@{version}"
    return [
        tensor("tables", "block_tables", shape, "int32", source),
        tensor("tables", "block_tables_cpu", shape, "int32", source, "host_pinned"),
        tensor("tables", "token_ids_cpu", (rows, asked_tokens), "int32", host, "host"),
        tensor("tables", "is_token_ids", (rows, asked_tokens), "bool", host, "host"),
    ]


def backend_tables(
    model: EngineModel, flags: VLLMFlags, settings: VLLMSettings, context_tokens: int, groups: int
) -> list[Item]:
    """List what an attention backend and the captured graphs take after the pool."""
    items = []
    if settings.attention_backend == "flashinfer":
        # v1/attention/backends/flashinfer.py:568-572,697@0.23.0, one builder a group
        source = "v1/attention/backends/flashinfer.py:697@0.23.0"
        pages = -(-context_tokens // flags.block_size)
        shape = (groups, settings.max_num_seqs * pages)
        items.append(tensor("workspace", "paged_kv_indices", shape, "int32", source))
        workspace = ((1, FLASHINFER_WORKSPACE_BYTES),)
        items.append(Item("workspace", "flashinfer_workspace", workspace, source))
    if not flags.enforce_eager:
        pieces = ((1, graph_bytes(model, settings.max_num_seqs)),)
        items.append(Item("workspace", "cuda_graphs", pieces, "measured@0.23.0"))
    return items
