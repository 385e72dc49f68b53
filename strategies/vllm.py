"""vLLM's start-up, emulated: its formulas at a named version, really allocated."""

from __future__ import annotations

from strategies.device import Device
from strategies.engine_model import EngineModel, EnginePlan
from strategies.engine_strategy import EngineStrategy
from strategies.model import KVModel
from strategies.vllm_flags import VLLMFlags
from strategies.vllm_policy import vllm_plan


class VLLM(EngineStrategy):
    """Block tables, then the whole pool at once, then graphs; refuses what it cannot serve.

    Parameters
    ----------
    device, model, context_tokens, sequences, engine_model, device_total_bytes
        As in :class:`strategies.engine_strategy.EngineStrategy`.
    version, gpu_memory_utilization, max_num_seqs, ...
        vLLM's own flags (:class:`strategies.vllm_flags.VLLMFlags`).
    hopper : bool
        False for an A100, whose defaults differ.

    Raises
    ------
    ValueError
        A flag that the engine would not take; one line.
    """

    name = "vllm"
    slot_name = "kv_blocks"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int,
        engine_model: EngineModel,
        version: str | None = "0.23.0",
        gpu_memory_utilization: float | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        block_size: int = 16,
        enforce_eager: bool = False,
        kv_cache_memory_bytes: int | None = None,
        max_model_len: int | str | None = None,
        hybrid_kv_cache_manager: bool | None = None,
        attention_backend: str | None = None,
        decode_context_parallel_size: int = 1,
        usage: str = "server",
        hopper: bool = True,
        device_total_bytes: int = 0,
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, engine_model, device_total_bytes)
        self.hopper = hopper
        self.flags = VLLMFlags(
            version=version or "0.23.0",
            gpu_memory_utilization=gpu_memory_utilization,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=block_size,
            enforce_eager=enforce_eager,
            kv_cache_memory_bytes=kv_cache_memory_bytes,
            max_model_len=max_model_len,
            hybrid_kv_cache_manager=hybrid_kv_cache_manager,
            attention_backend=attention_backend,
            decode_context_parallel_size=decode_context_parallel_size,
            usage=usage,
        )

    def _make_plan(self, free_before_bytes: int) -> EnginePlan:
        return vllm_plan(
            self.engine_model,
            self.flags,
            self.context_tokens,
            self.total_bytes,
            free_before_bytes,
            self.hopper,
        )
