"""Starts vLLM as ``vllm serve`` configures it, in this process, and records what it allocates.

Run by vLLM's own Python as a script: ``python start_vllm.py``, the spec's path on standard input
(:mod:`harness.engines.protocol`). Knows the internals of one release; see ``VERSIONS``.
"""

from __future__ import annotations

import os

from recorder import record_start
from stacks import source_line, source_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# v1/core/kv_cache_utils.py and v1/worker/utils.py: the three ways in which it declines.
REFUSALS = (
    "To serve at least one request with the model's max seq len",
    "No available memory for the cache blocks",
    "Free memory on device",
)
PROFILE = (
    "requested_memory available_kv_cache_memory_bytes non_torch_memory peak_activation_memory "
    "cudagraph_memory_estimate"
).split()


class Start:
    """One start; keeps the worker, so that a failed start can still say what it had made."""

    def __init__(self, recorder: Any) -> None:  # noqa: ANN401
        self.recorder = recorder
        self.worker: Any = None
        self.graphs = 0

    def run(self) -> None:
        """Build the engine and record it; raises whatever the engine raises."""
        # What an earlier start has compiled makes the profile pass, and so the pool, another one.
        os.environ["VLLM_CACHE_ROOT"] = os.path.abspath("vllm_cache")
        import vllm

        self.recorder.begin(vllm.__version__)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.usage.usage_lib import UsageContext
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu_worker import Worker

        self._listen(Worker, GPUModelRunner)
        arguments = EngineArgs(
            model=self.recorder.spec["model"],
            skip_tokenizer_init=True,
            load_format="dummy",
            dtype="bfloat16",
            seed=1,
            **self.recorder.spec["flags"],
        )
        made = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
        take = self.recorder.get
        config = take(made, "vllm_config")
        self.record(complete=True)
        blocks = int(take(config, "cache_config.num_gpu_blocks"))
        block = int(take(config, "cache_config.block_size"))
        settings = {
            "gpu_memory_utilization": take(config, "cache_config.gpu_memory_utilization"),
            "max_num_seqs": int(take(config, "scheduler_config.max_num_seqs")),
            "max_num_batched_tokens": int(take(config, "scheduler_config.max_num_batched_tokens")),
            "block_size": block,
            "num_gpu_blocks": blocks,
        }
        self.recorder.ready(
            pool_tokens=blocks * block,
            request_limit=settings["max_num_seqs"],
            max_request_tokens=int(take(config, "model_config.max_model_len")),
            settings=settings | self._profile(),
        )

    def _profile(self) -> dict[str, Any]:
        if self.recorder.spec["flags"].get("kv_cache_memory_bytes"):
            return {}  # then nothing is profiled
        return {name: self.recorder.get(self.worker, name) for name in PROFILE}

    def _listen(self, worker: Any, runner: Any) -> None:  # noqa: ANN401
        """Read the meters where context, weights, profile, pool and graphs end."""
        tell, wrap = self.recorder.phase, self.recorder.wrap

        def keep(this: Any) -> None:  # noqa: ANN401
            self.worker = this
            tell("context")

        def before_graphs(this: Any) -> None:  # noqa: ANN401
            tell("workspace", "warm_up")
            self.graphs = -self.recorder.graphs_bytes()

        def after_graphs(this: Any) -> None:  # noqa: ANN401
            tell("workspace", "cuda_graphs")
            self.graphs += self.recorder.graphs_bytes()

        wrap(worker, "init_device", after=keep)
        wrap(worker, "load_model", after=lambda this: tell("weights"))
        wrap(worker, "determine_available_memory", after=lambda this: tell("weights", "profile"))
        wrap(worker, "initialize_from_config", after=lambda this: tell("pool"))
        wrap(runner, "capture_model", before=before_graphs, after=after_graphs)

    def failed(self) -> dict[str, int]:
        """Record what was made before a failure; returns how many tensors a pool consists of."""
        self.record(complete=False)
        return {"kv_pool": len(self.worker.model_runner.kv_cache_config.kv_cache_tensors)}

    def record(self, complete: bool) -> None:
        """Record every allocation that there is; all of them are when the start is complete."""
        if self.worker is None:
            return
        take = self.recorder.get
        runner = take(self.worker, "model_runner")
        if complete and not take(self.worker, "use_v2_model_runner"):
            raise self._moved(f"{type(runner).__name__} is not the V2 runner")
        if complete or getattr(runner, "model", None) is not None:
            self._weights(take(runner, "model"))
        if complete or hasattr(runner, "req_states"):
            host = take(runner, "req_states.all_token_ids._uva_buf.cpu")
            self.recorder.tensor("tables", "all_token_ids", host)
        if complete or getattr(runner, "block_tables", None) is not None:
            tables = take(runner, "block_tables.block_tables")
            self._equal("tables", "block_tables", [take(t, "gpu") for t in tables])
            copies = take(runner, "block_tables.input_block_tables")
            self._equal("tables", "input_block_tables", copies)
        if complete or getattr(runner, "kv_caches", None):
            self._equal("pool", "kv_pool", take(runner, "kv_caches"))
        if complete and not take(self.worker, "model_config.enforce_eager"):
            self.recorder.item("workspace", "cuda_graphs", self.graphs, how="graph_pools")

    def _equal(self, phase: str, name: str, tensors: list[Any]) -> None:
        """Record tensors of one shape as one item."""
        if len({tuple(t.shape) for t in tensors}) != 1:
            raise self._moved(f"{name} are {len(tensors)} tensors of different shapes")
        self.recorder.tensor(phase, name, tensors[0], len(tensors))

    def _weights(self, model: Any) -> None:  # noqa: ANN401
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        self.recorder.item("weights", "weights", parameters, how="parameters")
        caches = [b for name, b in model.named_buffers() if name.endswith("cos_sin_cache")]
        if len(caches) != 1:
            raise self._moved(f"{len(caches)} rotary tables instead of one")
        self.recorder.tensor("tables", "rope_cos_sin", caches[0])

    def _moved(self, what: str) -> Exception:
        from recorder import Moved

        moved: Exception = Moved(f"vllm {self.recorder.version}: {what}")
        return moved


def name_of(frames: list[dict[str, Any]]) -> str:
    """Name an allocation as the emulation does, by the source lines of its stack."""
    for frame in frames:
        path, function = str(frame["filename"]), str(frame["name"])
        if function == "_allocate_kv_cache":
            return "kv_pool"
        if path.endswith("gpu/block_table.py"):
            return source_name(frame) or "block_tables"
        if path.endswith("gpu/states.py"):
            return source_name(frame) or "request_state"
        if "cos_sin_cache" in function:
            return "rope_cos_sin"
        if function == "capture_model" or path.endswith("cudagraph_utils.py"):
            return "cuda_graphs"
        if function == "profile_run":
            return "profile"
        if "model_loader" in path or function == "create_weights":
            return "weights"
    line: str = source_line(frames)
    return line


if __name__ == "__main__":
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record_start("vllm", Start, REFUSALS, name_of)
