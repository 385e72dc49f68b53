"""SGLang and vLLM as far as the adapters look into them, over a made-up GPU: no engine's code.

Names and places of internals are those of the versions that the adapters know; sizes follow from
flags, so that one start fits and another does not.
"""

from __future__ import annotations

import sys
import types
from types import SimpleNamespace as Made
from typing import Any

GIB = 1 << 30


class Tensor:
    """A shape on a device."""

    def __init__(self, shape: tuple[int, ...], itemsize: int, device: str = "cuda") -> None:
        self.shape, self.dtype = shape, f"torch.int{8 * itemsize}"
        self.device, self.is_cuda = Made(type=device), device == "cuda"
        self._itemsize = itemsize

    def numel(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    def element_size(self) -> int:
        return self._itemsize

    def is_pinned(self) -> bool:
        return not self.is_cuda


def module(name: str, **content: Any) -> None:
    """Put a module, and the packages above it, where an import finds them."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        made = sys.modules.setdefault(path, types.ModuleType(path))
        made.__path__ = []
    sys.modules[name].__dict__.update(content)


def taken(memory: Any, tensor: Tensor, line: int, function: str) -> Tensor:
    memory.take(tensor.numel() * tensor.element_size(), line, function)
    return tensor


def sglang(memory: Any, version: str, moved: bool = False) -> None:
    """A scheduler whose runner loads weights, makes its pools, its backend and its graphs."""

    class Arguments:
        def __init__(self, **given: Any) -> None:
            names = (
                "mem_fraction_static chunked_prefill_size cuda_graph_max_bs page_size "
                "max_running_requests attention_backend decode_attention_backend "
                "disable_cuda_graph disable_piecewise_cuda_graph"
            )
            self.__dict__.update(dict.fromkeys(names.split()))
            self.__dict__.update(given)

        def check_server_args(self) -> None:
            assert self.__dict__["load_format"] == "dummy"

    class Runner:
        num_effective_layers = 2

        def __init__(self, arguments: Any) -> None:
            self.server_args = arguments
            self.max_running_requests = arguments.max_running_requests or 2048
            self.load_model()
            self.init_memory_pool(0)
            self.init_attention_backend()
            self.init_device_graphs()
            self.init_piecewise_cuda_graphs()

        def load_model(self) -> None:
            weights = taken(memory, Tensor((4 * GIB,), 1), 10, "create_weights")
            rotary = Made(cos_sin_cache=taken(memory, Tensor((GIB // 512, 128), 4), 11, "rope"))
            layer = Made(self_attn=Made(rotary_emb=rotary))
            self.model = Made(parameters=lambda: [weights], model=Made(layers=[layer]))

        def init_memory_pool(self, before: int) -> None:
            shape = (self.max_running_requests + 1, self.server_args.context_length + 4)
            table = taken(memory, Tensor(shape, 4), 149, "__init__")
            self.req_to_token_pool = Made(**{"moved" if moved else "req_to_token": table})
            self.max_total_num_tokens = 8_000_000
            keys, values = (
                [taken(memory, Tensor((20 * GIB,), 1), 907, "_create_buffers") for _ in range(2)]
                for _ in range(2)
            )
            self.token_to_kv_pool = Made(k_buffer=keys, v_buffer=values)
            self.token_to_kv_pool_allocator = Made(free_pages=Tensor((8_000_000,), 8))

        def init_attention_backend(self) -> None:
            self.attn_backend = Made(
                req_to_token=getattr(self.req_to_token_pool, "req_to_token", 0)
            )

        def init_device_graphs(self) -> None:
            table = taken(memory, Tensor((16, self.server_args.context_length), 4), 1349, "graphs")
            self.attn_backend.decode_cuda_graph_metadata = {"page_table": table}
            memory.take(GIB, 1, "capture")

        def init_piecewise_cuda_graphs(self) -> None:
            memory.take(2 * GIB, 1, "capture")

    module("sglang", __version__=version)
    module("sglang.srt.entrypoints.engine", _set_envs_and_config=lambda arguments: None)
    module("sglang.srt.model_executor.model_runner", ModelRunner=Runner)
    module("sglang.srt.plugins", load_plugins=lambda: None)
    ports = Made(init_new=lambda arguments: None)
    module("sglang.srt.server_args", PortArgs=ports, ServerArgs=Arguments)
    module(
        "sglang.srt.managers.scheduler",
        configure_scheduler_process=lambda *given: None,
        Scheduler=lambda arguments, *given: Made(
            runner=Runner(arguments), max_req_len=arguments.context_length - 1
        ),
    )


def vllm(memory: Any, version: str, moved: bool = False) -> None:
    """An engine whose worker loads weights, profiles, makes its pool and captures graphs."""

    class Runner:
        def __init__(self, length: int, rows: int) -> None:
            host = Made(cpu=Tensor((rows, length), 4, "cpu"))
            self.req_states = Made(all_token_ids=Made(_uva_buf=host))
            self.rows, self.length = rows, length

        def capture_model(self) -> None:
            memory.take(GIB, 1, "capture_model")

    class Worker:
        use_v2_model_runner = not moved
        requested_memory = available_kv_cache_memory_bytes = non_torch_memory = GIB
        peak_activation_memory = cudagraph_memory_estimate = 0

        def __init__(self, arguments: Any) -> None:
            self.arguments = arguments
            self.model_config = Made(enforce_eager=getattr(arguments, "enforce_eager", False))

        def init_device(self) -> None:
            rows = getattr(self.arguments, "max_num_seqs", 1024)
            self.model_runner = Runner(self.arguments.max_model_len, rows)

        def load_model(self) -> None:
            weights = taken(memory, Tensor((4 * GIB,), 1), 10, "create_weights")
            rope = taken(memory, Tensor((GIB // 256, 128), 2), 11, "rope")
            self.model_runner.model = Made(
                parameters=lambda: [weights], named_buffers=lambda: [("a.cos_sin_cache", rope)]
            )

        def determine_available_memory(self) -> None:
            if self.arguments.max_model_len > 20_000_000:
                raise ValueError(
                    "To serve at least one request with the model's max seq len (30000000), "
                    "(343.32 GiB KV cache is needed, which is larger than the available KV cache "
                    "memory (118.10 GiB). Try decreasing `max_model_len`."
                )

        def initialize_from_config(self) -> None:
            runner = self.model_runner
            shape = (runner.rows, runner.length // 16)
            tables = [taken(memory, Tensor(shape, 4), 46, "__init__") for _ in range(2)]
            runner.block_tables = Made(
                block_tables=[Made(gpu=tables[0])], input_block_tables=[tables[1]]
            )
            runner.kv_caches = [
                taken(memory, Tensor((40 * GIB,), 1), 155, "_allocate_kv_cache") for _ in range(3)
            ]

    class Engine:
        @staticmethod
        def from_engine_args(arguments: Any, usage_context: str) -> Any:
            assert usage_context == "server"
            worker = Worker(arguments)
            worker.init_device()
            worker.load_model()
            worker.determine_available_memory()
            worker.initialize_from_config()
            if not worker.model_config.enforce_eager:
                worker.model_runner.capture_model()
            cache = Made(num_gpu_blocks=655_360, block_size=16, gpu_memory_utilization=0.92)
            scheduler = Made(max_num_seqs=worker.model_runner.rows, max_num_batched_tokens=8192)
            model = Made(max_model_len=arguments.max_model_len)
            return Made(
                vllm_config=Made(cache_config=cache, scheduler_config=scheduler, model_config=model)
            )

    module("vllm", __version__=version)
    module("vllm.engine.arg_utils", EngineArgs=lambda **given: Made(**given))
    module("vllm.usage.usage_lib", UsageContext=Made(OPENAI_API_SERVER="server"))
    module("vllm.v1.engine.llm_engine", LLMEngine=Engine)
    module("vllm.v1.worker.gpu.model_runner", GPUModelRunner=Runner)
    module("vllm.v1.worker.gpu_worker", Worker=Worker)
