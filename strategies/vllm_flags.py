"""vLLM's flags, and the defaults that each release fills in for a model and a GPU.

Sources are written ``file:line@version`` under ``vllm/``.
"""

from __future__ import annotations

from dataclasses import dataclass

from strategies.engine_model import COUNTS, GIB, EngineModel, check_flag, is_count, is_share
from strategies.vllm_tables import VERSIONS, at_least, uses_v2_runner

AUTO = "auto"
BACKENDS = ("flash_attn", "flashinfer", "triton_attn")
# Every backend above takes multiples of 16 only (v1/attention/backends/flash_attn.py:94,147,
# triton_attn.py:286, flashinfer.py:338 and v1/attention/backend.py:176-191@0.23.0). On top, the
# argument itself was a list: 1, 8, 16 ... 128 (config/cache.py@0.10.2), up to 256 (@0.11.1 to
# 0.16.0); from 0.23.0 on it is any number (config/cache.py:48@0.23.0).
BLOCK_UNIT_TOKENS = 16
LARGEST_BLOCK_TOKENS = 4096
LISTED_BLOCK_TOKENS = {"0.11.0": (16, 32, 64, 128), "0.19.1": (16, 32, 64, 128, 256)}


@dataclass(frozen=True)
class VLLMFlags:
    """vLLM's own flags, under their own names; ``None`` is the engine's default.

    ``hybrid_kv_cache_manager`` is the inverse of ``--disable-hybrid-kv-cache-manager``; ``usage``
    is ``server`` (vllm serve) or ``llm`` (the Python class), which differ in their defaults.
    """

    version: str = "0.23.0"
    gpu_memory_utilization: float | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 16
    enforce_eager: bool = False
    kv_cache_memory_bytes: int | None = None
    max_model_len: int | str | None = None
    hybrid_kv_cache_manager: bool | None = None
    attention_backend: str | None = None
    decode_context_parallel_size: int = 1
    usage: str = "server"

    def __post_init__(self) -> None:
        def check(key: str, allowed: str, good: bool) -> None:
            check_flag("vllm", key, getattr(self, key), allowed, good)

        check("version", ", ".join(VERSIONS), self.version in VERSIONS)
        share = is_share(self.gpu_memory_utilization)
        check("gpu_memory_utilization", "a number above 0, at most 1", share)
        for key in ("max_num_seqs", "max_num_batched_tokens"):
            check(key, COUNTS, is_count(getattr(self, key)))
        most, held = 2**63 - 1, self.kv_cache_memory_bytes
        check(
            "kv_cache_memory_bytes", f"a whole number from 1 to {most}", is_count(held, most=most)
        )
        check("block_size", *self._block_rule())
        length = self.max_model_len
        check("max_model_len", "a number of tokens, or auto", length == AUTO or is_count(length))
        backend = self.attention_backend
        check("attention_backend", ", ".join(BACKENDS), backend is None or backend in BACKENDS)
        check("usage", "server, llm", self.usage in ("server", "llm"))
        ranks = self.decode_context_parallel_size
        check("decode_context_parallel_size", COUNTS, is_count(ranks))

    def _block_rule(self) -> tuple[str, bool]:
        """What the version allows as a block, and whether ours is."""
        block, listed = self.block_size, LISTED_BLOCK_TOKENS.get(self.version)
        whole = type(block) is int
        if listed:
            return f"{', '.join(map(str, listed))} in {self.version}", whole and block in listed
        allowed = f"a multiple of {BLOCK_UNIT_TOKENS} up to {LARGEST_BLOCK_TOKENS}"
        good = whole and block % BLOCK_UNIT_TOKENS == 0 and 1 <= block <= LARGEST_BLOCK_TOKENS
        return allowed, good


@dataclass(frozen=True)
class VLLMSettings:
    """Flags after the engine has filled in its defaults for this GPU."""

    gpu_memory_utilization: float
    max_num_seqs: int
    max_num_batched_tokens: int
    attention_backend: str
    hybrid: bool
    v2_runner: bool


def resolve(
    model: EngineModel, flags: VLLMFlags, context_tokens: int, total_bytes: int, hopper: bool = True
) -> VLLMSettings:
    """Fill in defaults.

    ``engine/arg_utils.py:1600-1680@0.11.0``, ``:2287-2335,2480-2563@0.23.0``: large GPUs other
    than an A100 get 1024 sequences. ``config/cache.py``: utilization 0.9, 0.92 from 0.23.0 on.
    ``config/__init__.py:499-529@0.11.0``: chunked-local layers turn the hybrid manager off.
    """
    large = total_bytes >= 70 * GIB and hopper
    tokens = flags.max_num_batched_tokens
    seqs = flags.max_num_seqs
    default_seqs = 1024 if large else 256
    if tokens is None:
        tokens = (16384 if flags.usage == "llm" else 8192) if large else 8192
        tokens = 2048 if not large and flags.usage == "server" else tokens
        tokens = min((seqs or default_seqs) * context_tokens, tokens)
    if seqs is None:
        seqs = min(default_seqs, tokens)
    utilization = flags.gpu_memory_utilization
    if utilization is None:
        utilization = 0.92 if at_least(flags.version, "0.23.0") else 0.9
    hybrid = bool(model.window_layers) and flags.hybrid_kv_cache_manager is not False
    if hybrid and flags.version == "0.11.0" and model.window_kind == "chunked":
        hybrid = flags.hybrid_kv_cache_manager is True
    backend = flags.attention_backend or ("flash_attn" if hopper else _before_hopper(model))
    return VLLMSettings(
        utilization, seqs, tokens, backend, hybrid, uses_v2_runner(model, flags.version)
    )


def _before_hopper(model: EngineModel) -> str:
    return "flashinfer" if model.kv_itemsize == 1 else "flash_attn"
