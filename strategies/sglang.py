"""SGLang's start-up, emulated: its formulas at a named version, really allocated."""

from __future__ import annotations

from strategies.device import Device
from strategies.engine_model import EngineModel, EnginePlan
from strategies.engine_strategy import EngineStrategy
from strategies.model import KVModel
from strategies.sglang_flags import SGLangFlags
from strategies.sglang_policy import sglang_plan


class SGLang(EngineStrategy):
    """``req_to_token``, then K and V of every layer, then graph tables and graphs.

    Parameters
    ----------
    device, model, context_tokens, sequences, engine_model, device_total_bytes
        As in :class:`strategies.engine_strategy.EngineStrategy`.
    version, mem_fraction_static, max_running_requests, ...
        SGLang's own flags (:class:`strategies.sglang_flags.SGLangFlags`).
    hopper : bool
        Whether FA3 is the default attention backend.

    Raises
    ------
    ValueError
        A flag that the engine would not take; one line.
    """

    name = "sglang"

    def __init__(
        self,
        device: Device,
        model: KVModel,
        context_tokens: int,
        sequences: int,
        engine_model: EngineModel,
        version: str | None = "0.5.12.post1",
        mem_fraction_static: float | None = None,
        max_running_requests: int | None = None,
        max_total_tokens: int | None = None,
        chunked_prefill_size: int | None = None,
        cuda_graph_max_bs: int | None = None,
        attention_backend: str | None = None,
        page_size: int = 1,
        disable_cuda_graph: bool = False,
        disable_piecewise_cuda_graph: bool = False,
        hybrid_kvcache_ratio: float | None = None,
        swa_full_tokens_ratio: float | None = None,
        disable_hybrid_swa_memory: bool = False,
        hopper: bool = True,
        device_total_bytes: int = 0,
    ) -> None:
        super().__init__(device, model, context_tokens, sequences, engine_model, device_total_bytes)
        self.hopper = hopper
        self.flags = SGLangFlags(
            version=version or "0.5.12.post1",
            mem_fraction_static=mem_fraction_static,
            max_running_requests=max_running_requests,
            max_total_tokens=max_total_tokens,
            chunked_prefill_size=chunked_prefill_size,
            cuda_graph_max_bs=cuda_graph_max_bs,
            attention_backend=attention_backend,
            page_size=page_size,
            disable_cuda_graph=disable_cuda_graph,
            disable_piecewise_cuda_graph=disable_piecewise_cuda_graph,
            hybrid_kvcache_ratio=hybrid_kvcache_ratio,
            swa_full_tokens_ratio=swa_full_tokens_ratio,
            disable_hybrid_swa_memory=disable_hybrid_swa_memory,
        )

    def _make_plan(self, free_before_bytes: int) -> EnginePlan:
        return sglang_plan(
            self.engine_model,
            self.flags,
            self.context_tokens,
            self.total_bytes,
            free_before_bytes,
            self.hopper,
        )
