"""Starts SGLang as its own scheduler process does, and records what it allocates.

Run by SGLang's own Python as a script: ``python start_sglang.py``, the spec's path on standard
input (:mod:`harness.engines.protocol`). Knows the internals of one release; see ``VERSIONS``.
"""

from __future__ import annotations

import os

from recorder import record_start
from stacks import MIB, source_line, source_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# model_executor/pool_configurator.py: nothing is left for the pool.
REFUSALS = ("Not enough memory. Please try to increase --mem-fraction-static",)
LEAST_TABLE_BYTES = MIB
SETTINGS = (
    "mem_fraction_static chunked_prefill_size cuda_graph_max_bs max_running_requests page_size "
    "attention_backend decode_attention_backend disable_cuda_graph disable_piecewise_cuda_graph"
).split()


class Start:
    """One start; keeps the model runner, so that a failed start can still say what it had made."""

    def __init__(self, recorder: Any) -> None:  # noqa: ANN401
        self.recorder = recorder
        self.runner: Any = None
        self.graphs: dict[str, int] = {}

    def run(self) -> None:
        """Build the scheduler and record it; raises whatever the engine raises."""
        import sglang

        self.recorder.begin(sglang.__version__)
        from sglang.srt.entrypoints.engine import _set_envs_and_config
        from sglang.srt.managers import scheduler as schedulers
        from sglang.srt.model_executor.model_runner import ModelRunner
        from sglang.srt.plugins import load_plugins
        from sglang.srt.server_args import PortArgs, ServerArgs

        self._listen(ModelRunner)
        arguments = ServerArgs(
            model_path=self.recorder.spec["model"],
            skip_tokenizer_init=True,
            load_format="dummy",
            sampling_backend="pytorch",
            grammar_backend="none",
            random_seed=1,
            **self.recorder.spec["flags"],
        )
        _set_envs_and_config(arguments)
        load_plugins()
        arguments.check_server_args()
        ports = PortArgs.init_new(arguments)
        ranks = (
            0,
            0,
            0,
            0,
            0,
            0,
        )  # gpu, tensor, attention context, MoE, pipeline: the first of one
        schedulers.configure_scheduler_process(arguments, *ranks, None)
        made = schedulers.Scheduler(arguments, ports, *ranks, None)
        self.record(complete=True)
        take = self.recorder.get
        self.recorder.ready(
            pool_tokens=int(take(self.runner, "max_total_num_tokens")),
            request_limit=int(take(self.runner, "max_running_requests")),
            max_request_tokens=int(take(made, "max_req_len")),
            settings={name: take(arguments, name) for name in SETTINGS},
        )

    def _listen(self, runner: Any) -> None:  # noqa: ANN401
        """Read the meters where weights, pool, attention backend and graphs begin and end."""
        tell = self.recorder.phase

        def keep(this: Any) -> None:  # noqa: ANN401
            self.runner = this
            tell("context")

        def graphs(step: str) -> None:
            def before(this: Any) -> None:  # noqa: ANN401
                tell("workspace", f"before {step}")
                self.graphs[step] = -self.recorder.graphs_bytes()

            def after(this: Any) -> None:  # noqa: ANN401
                tell("workspace", step)
                self.graphs[step] += self.recorder.graphs_bytes()

            self.recorder.wrap(runner, f"init_{step}", before, after)

        wrap = self.recorder.wrap
        wrap(runner, "load_model", before=keep, after=lambda this: tell("weights"))
        wrap(runner, "init_memory_pool", after=lambda this: tell("pool"))
        wrap(runner, "init_attention_backend", after=lambda this: tell("workspace", "attention"))
        graphs("device_graphs")
        graphs("piecewise_cuda_graphs")

    def failed(self) -> dict[str, int]:
        """Record what was made before a failure; returns how many buffers a pool consists of."""
        self.record(complete=False)
        return {"kv_pool": 2 * int(self.runner.num_effective_layers)}

    def record(self, complete: bool) -> None:
        """Record every allocation that there is; all of them are when the start is complete."""
        runner, take = self.runner, self.recorder.get
        if runner is None:
            return
        if complete or getattr(runner, "model", None) is not None:
            self._weights(take(runner, "model"))
        if complete or getattr(runner, "req_to_token_pool", None) is not None:
            table = take(runner, "req_to_token_pool.req_to_token")
            self.recorder.tensor("tables", "req_to_token", table)
        if complete or getattr(runner, "token_to_kv_pool", None) is not None:
            pool = take(runner, "token_to_kv_pool")
            keys, values = take(pool, "k_buffer"), take(pool, "v_buffer")
            self.recorder.tensor("pool", "kv_pool", keys[0], len(keys) + len(values))
            slots = take(runner, "token_to_kv_pool_allocator.free_pages")
            self.recorder.tensor("pool", "free_slots", slots)
        if complete:
            self._backend(take(runner, "attn_backend"))

    def _weights(self, model: Any) -> None:  # noqa: ANN401
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        self.recorder.item("weights", "weights", parameters, how="parameters")
        rotary = self.recorder.get(model, "model.layers")[0]
        cache = self.recorder.get(rotary, "self_attn.rotary_emb.cos_sin_cache")
        self.recorder.tensor("tables", "rope_cos_sin", cache)

    def _backend(self, backend: Any) -> None:  # noqa: ANN401
        """Tables of the attention backend, and what graphs hold beside them."""
        import torch

        for owner, value in vars(backend).items():
            named = value.items() if isinstance(value, dict) else [(owner, value)]
            for name, one in named:
                if str(name) in self.recorder.items:  # the request table, which it refers to
                    continue
                if torch.is_tensor(one) and one.is_cuda:
                    nbytes = one.numel() * one.element_size()
                    if nbytes >= LEAST_TABLE_BYTES:
                        self.recorder.tensor("workspace", str(name), one)
        decode = self.graphs.get("device_graphs", 0)
        if not self.recorder.spec["flags"].get("disable_cuda_graph"):
            self.recorder.item("workspace", "decode_cuda_graphs", decode, how="graph_pools")
        piecewise = self.graphs.get("piecewise_cuda_graphs", 0)
        if not self.recorder.get(self.runner, "server_args.disable_piecewise_cuda_graph"):
            self.recorder.item("workspace", "piecewise_cuda_graphs", piecewise, how="graph_pools")


def name_of(frames: list[dict[str, Any]]) -> str:
    """Name an allocation as the emulation does, by the source lines of its stack."""
    for frame in frames:
        path, function = str(frame["filename"]), str(frame["name"])
        if path.endswith("mem_cache/memory_pool.py"):
            if function == "_create_buffers" or "comp>" in function:
                return "kv_pool"
            if function == "__init__":
                return source_name(frame) or "memory_pool"
        if path.endswith("flashattention_backend.py") and function == "init_cuda_graph_state":
            return source_name(frame) or "attention_backend"
        if path.endswith("mem_cache/allocator.py"):
            return "free_slots"
        if "cos_sin_cache" in function:
            return "rope_cos_sin"
        if "piecewise_cuda_graph" in path or "/compilation/" in path:
            return "piecewise_cuda_graphs"
        if path.endswith("cuda_graph_runner.py"):
            return "decode_cuda_graphs"
        if "model_loader" in path or function == "create_weights":
            return "weights"
    line: str = source_line(frames)
    return line


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    record_start("sglang", Start, REFUSALS, name_of)
