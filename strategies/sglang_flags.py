"""SGLang's flags, and the defaults that each release fills in for a model and a GPU.

Sources are written ``file:line@version`` under ``sglang/srt/``.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.engine_model import (
    COUNTS,
    EngineModel,
    check_flag,
    is_count,
    is_share,
    nvml_total_mib,
)
from strategies.sglang_tables import VERSIONS, at_least, longest_piece, piecewise_sizes

# Whose window layers get a pool of their own (configs/model_config.py:1660-1675@0.5.12.post1).
HYBRID_ARCHITECTURES = (
    "Llama4ForConditionalGeneration",
    "GptOssForCausalLM",
    "MiMoV2ForCausalLM",
    "MiMoV2FlashForCausalLM",
    "Step3p5ForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4ForConditionalGeneration",
    "LagunaForCausalLM",
)
BACKENDS = ("fa3", "flashinfer", "triton", "torch_native")


@dataclass(frozen=True)
class SGLangFlags:
    """SGLang's own flags, under their own names; ``None`` is the engine's default.

    ``disable_hybrid_swa_memory`` turns the automatic hybrid pools (0.5.9 on) off;
    ``hybrid_kvcache_ratio`` turns those of 0.5.2 and 0.5.3 on.
    """

    version: str = "0.5.12.post1"
    mem_fraction_static: float | None = None
    max_running_requests: int | None = None
    max_total_tokens: int | None = None
    chunked_prefill_size: int | None = None
    cuda_graph_max_bs: int | None = None
    attention_backend: str | None = None
    page_size: int = 1
    disable_cuda_graph: bool = False
    disable_piecewise_cuda_graph: bool = False
    hybrid_kvcache_ratio: float | None = None
    swa_full_tokens_ratio: float | None = None
    disable_hybrid_swa_memory: bool = False

    def __post_init__(self) -> None:
        def check(key: str, allowed: str, good: bool) -> None:
            check_flag("sglang", key, getattr(self, key), allowed, good)

        check("version", ", ".join(VERSIONS), self.version in VERSIONS)
        for key in ("mem_fraction_static", "swa_full_tokens_ratio", "hybrid_kvcache_ratio"):
            check(key, "a number above 0, at most 1", is_share(getattr(self, key)))
        for key in ("max_running_requests", "max_total_tokens", "cuda_graph_max_bs"):
            check(key, COUNTS, is_count(getattr(self, key)))
        chunk = self.chunked_prefill_size
        check("chunked_prefill_size", f"-1, or {COUNTS}", chunk == -1 or is_count(chunk))
        page = self.page_size
        check("page_size", "a whole number from 1 to 4096", is_count(page, most=4096))
        backend = self.attention_backend
        check("attention_backend", ", ".join(BACKENDS), backend is None or backend in BACKENDS)


@dataclass(frozen=True)
class SGLangSettings:
    """Flags after the engine has filled in its defaults for this GPU."""

    mem_fraction_static: float
    chunked_prefill_size: int
    cuda_graph_max_bs: int | None
    attention_backend: str
    piecewise_sizes: int
    hybrid: bool
    swa_full_tokens_ratio: float


def resolve(
    model: EngineModel, flags: SGLangFlags, total_bytes: int, hopper: bool = True
) -> SGLangSettings:
    """Fill in defaults for a GPU of ``total_bytes`` (as CUDA shows it).

    FA3 is the default on Hopper, FlashInfer before it (``server_args.py:2605-2629@0.5.12.post1``).
    """
    nvml_mib = nvml_total_mib(total_bytes)
    chunk, max_bs = _capacity_defaults(flags, nvml_mib, model.tensor_parallel)
    pieces = 0
    if at_least(flags.version, "0.5.12.post1") and not flags.disable_piecewise_cuda_graph:
        pieces = piecewise_sizes(longest_piece(flags, chunk))
    fraction = flags.mem_fraction_static
    if fraction is None:
        fraction = default_fraction(
            flags.version, nvml_mib, model.tensor_parallel, chunk, max_bs, pieces
        )
    backend = flags.attention_backend or ("fa3" if hopper else "flashinfer")
    return SGLangSettings(
        fraction, chunk, max_bs, backend, pieces, _hybrid(model, flags),
        flags.swa_full_tokens_ratio or 0.8,
    )  # fmt: skip


def _hybrid(model: EngineModel, flags: SGLangFlags) -> bool:
    if not model.window_layers or flags.version == "0.4.6.post5":
        return False
    if model.architecture not in HYBRID_ARCHITECTURES:
        return False
    if at_least(flags.version, "0.5.9"):
        return not flags.disable_hybrid_swa_memory
    return flags.hybrid_kvcache_ratio is not None


def _capacity_defaults(flags: SGLangFlags, nvml_mib: int, tp: int) -> tuple[int, int | None]:
    """Prefill chunk and largest graph batch by GPU memory.

    ``server_args.py:293-330@0.4.6.post5``, ``:509-527@0.5.2``, ``:566-629@0.5.3``,
    ``:1426-1488@0.5.12.post1``, ``arg_groups/memory_hook.py:86-163@0.5.23``.
    """
    version, gib = flags.version, nvml_mib / 1024
    if not at_least(version, "0.5.3"):
        small = nvml_mib < 25_000 if version == "0.4.6.post5" else gib < 35
        chunk = 2048 if small else 16384 if gib >= 160 and version == "0.5.2" else 8192
        graph = (8 if tp < 4 else 80) if small else None
    else:
        newest = version == "0.5.23"
        tiers = (
            (20, 2048, 8, 8),
            (35, 4096 if newest else 2048, *_tier_35(version)),
            (60, 4096, 32, 160),
            (160, 8192, 256, 512),
        )
        found = next((t for t in tiers if gib < t[0]), (0, 16384, 512, 512))
        chunk, graph = found[1], found[2] if tp < 4 else found[3]
        limit = flags.max_running_requests
        if newest and limit is not None:  # memory_hook.py:165-171@0.5.23
            graph = min(graph, limit)
    return flags.chunked_prefill_size or chunk, flags.cuda_graph_max_bs or graph


def _tier_35(version: str) -> tuple[int, int]:
    if version == "0.5.23":
        return 48, 160
    return (16 if version == "0.5.3" else 24), 80


def default_fraction(
    version: str, nvml_mib: int, tp: int, chunk: int, graph_bs: int | None, pieces: int
) -> float:
    """``mem_fraction_static`` when unset, in MiB arithmetic; no version has a context term."""
    if version == "0.4.6.post5":  # server_args.py:246-268
        fraction = 0.88
        if nvml_mib <= 81920:
            fraction = 0.79 if tp >= 16 else 0.81 if tp >= 8 else 0.85 if tp >= 4 else 0.88
            fraction = 0.87 if 2 <= tp < 4 else fraction
        if nvml_mib > 96 * 1024:
            grown = fraction + 48 * 1024 * (1 - fraction) / nvml_mib
            fraction = min(grown, (nvml_mib - 18 * 1024) / nvml_mib)
        return fraction
    if version == "0.5.2":  # server_args.py:463-496
        gib = nvml_mib / 1024
        reserved = (2.8 + tp / 10) if gib < 35 else (9.5 + tp / 2) if gib < 90 else (12 + tp / 2)
        reserved = 32.0 if gib >= 160 else reserved
        return round((nvml_mib - reserved * 1024) / nvml_mib, 3)
    # server_args.py:637-675@0.5.3, :1541-1589@0.5.12.post1, memory_hook.py:316-340@0.5.23
    tokens = max(chunk if chunk > 0 else 16384, 2048)
    total = 512 + 1.5 * tokens + 2 * (graph_bs or 0) + tp / 8 * 1024 + 8 * pieces
    if nvml_mib > 60 * 1024:
        total = max(total, 10 * 1024)
    return round((nvml_mib - total) / nvml_mib, 3)
