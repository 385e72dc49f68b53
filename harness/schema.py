"""The types of every key that can be configured; Hydra checks names and types against them.

Ranges and rules between keys are checked in :mod:`harness.validate`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class StrategyConf:
    """Keys that every strategy has."""

    name: str = MISSING


@dataclass
class StaticConf(StrategyConf):
    """A pool sized by context and committed at start-up; slots are never lent."""

    mem_fraction: float = 1.0
    mem_fraction_of: str = "context"
    slot_policy: str = "max"


@dataclass
class PagedConf(StrategyConf):
    """Nothing at start-up; chunks are committed as sequences grow and given back."""

    growth: str = "sync"
    ahead_chunks: int = 4
    release: str = "immediate"
    low_water: Any = "1GiB"
    page_policy: str = "lowest"


@dataclass
class EagerPagesConf(StrategyConf):
    """The budget is committed at start-up; pages are assigned on demand."""

    mem_fraction: float = 1.0


@dataclass
class SGLangConf(StrategyConf):
    """SGLang's start-up, by its own flags."""

    version: str = "0.5.12.post1"
    mem_fraction_static: Any = None
    max_running_requests: Any = None
    max_total_tokens: Any = None
    chunked_prefill_size: Any = None
    cuda_graph_max_bs: Any = None
    attention_backend: Any = None
    page_size: int = 1
    disable_cuda_graph: bool = False
    hybrid_kvcache_ratio: Any = None
    swa_full_tokens_ratio: Any = None


@dataclass
class VLLMConf(StrategyConf):
    """vLLM's start-up, by its own flags."""

    version: str = "0.23.0"
    gpu_memory_utilization: Any = None
    max_num_seqs: Any = None
    max_num_batched_tokens: Any = None
    block_size: int = 16
    enforce_eager: bool = False
    kv_cache_memory_bytes: Any = None
    max_model_len: Any = None
    hybrid_kv_cache_manager: Any = None


@dataclass
class ModelConf:
    """A model's K/V and attention geometry, over all ranks."""

    name: str = MISSING
    layers: int = MISSING
    q_heads_total: int = MISSING
    kv_heads_total: int = MISSING
    head_dim: int = MISSING
    kv_dtype: str = "fp8_e4m3"
    hidden: int = 4096
    rotary_dim: int = 128
    weights_per_rank: Any = MISSING
    # Layers whose attention is local to chunks of `window_tokens`; used when `hybrid` is true.
    local_layers: int = 0
    window_tokens: int = 0
    hybrid: bool = False
    # What decides an engine's defaults for it.
    moe: bool = False
    architecture: str = "LlamaForCausalLM"


@dataclass
class HardwareConf:
    """A GPU, or the scale model of one."""

    name: str = MISSING
    kind: str = MISSING  # auto | cuda | scale_model
    models: str = "h200"  # the device that the scale model models
    device_name: str = ""
    total_bytes: int = 0
    free_bytes: int = 0  # to a process that has made its bare context
    bare_context: int = 0  # of the driver, before libraries and kernels are loaded
    cuda_context: Any = "0"  # what libraries and kernels add to it
    cuda_graph: Any = "56MiB"  # what the driver takes for the graph of a decode step
    sm_count: int = 132
    index: int = 0
    capacity: Any = None


@dataclass
class WorkloadConf:
    """What is done with the pool once it is ready."""

    name: str = MISSING
    kind: str = "fill"  # fill | batch | trace | churn
    sequences: int = 1
    path: Any = None
    rate: Any = "max"  # max | recorded | requests a second
    step_ms: float = 25.0  # what a step of the virtual clock stands for
    requests: Any = None
    min_tokens: Any = "1Ki"
    max_tokens: Any = "256Ki"
    operations: int = 2000


@dataclass
class ParallelConf:
    """How the model is spread over ranks."""

    name: str = MISSING
    kind: str = "tp"  # tp | context
    ranks: int = 8  # ranks that the model is shaped for
    context_ranks: int = 1
    # Ranks that really run; null: one, or as many as torchrun started.
    processes: Any = None
    backend: str = "auto"  # auto | nccl | gloo
    nccl: Any = "0"  # bytes that NCCL takes on a rank, for the planner and the scale model
    # More processes than this, or than there are GPUs, are planned instead of run; null: an error.
    plan_beyond: Any = None


@dataclass
class ExperimentConf:
    """Arms of one question; each arm is a list of overrides on top of the command line's."""

    name: str = "sweep"
    arm: str = ""  # what an arm is called, where its overrides do not say it
    question: str = ""
    arms: Any = None
    matrix: Any = None
    start_engines: bool = False  # start the engines themselves, beside their emulations


@dataclass
class EngineConf:
    """An engine that is started for real."""

    python: Any = None  # that has the engine installed; null: the engine is not started


@dataclass
class EnginesConf:
    """The engines that experiment=real_engines starts."""

    sglang: EngineConf = field(default_factory=EngineConf)
    vllm: EngineConf = field(default_factory=EngineConf)


@dataclass
class SweepConf:
    """Which points are measured."""

    points: Any = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    contexts: Any = None
    brackets: bool = True
    bracket_repeats: int = 2
    repeats: int = 1
    capacity: bool = False  # also fill one sequence until it is refused
    one_process: bool = False  # one process fills through every `fill` and writes a row at each


@dataclass
class TrialConf:
    """How one trial is run and timed."""

    timing: bool = True
    arena: str = "auto"
    page_tokens: int = 128
    chunk_target: Any = "64MiB"  # rounded up to whole pages of all layers, and to 2 MiB
    table_order: str = "identity"
    prefill_chunk_tokens: Any = None  # 2048 on a GPU, 16 on the scale model
    prefill_histories: int = 5  # 0: prefill is not timed
    max_samples: int = 10
    timeout_seconds: float = 600.0
    read_weights: str = "none"  # none | device | offload


@dataclass
class FaultConf:
    """Deliberate faults, for tests: the row's trial_id differs from that of an honest trial."""

    kind: str = "none"
    phase: str = "fill"
    bytes: Any = "0"
    rank: Any = None  # null: on every rank


@dataclass
class RootConf:
    """Everything."""

    strategy: StrategyConf = MISSING
    model: ModelConf = MISSING
    hardware: HardwareConf = MISSING
    workload: WorkloadConf = MISSING
    parallel: ParallelConf = MISSING
    experiment: ExperimentConf = field(default_factory=ExperimentConf)
    sweep: SweepConf = field(default_factory=SweepConf)
    trial: TrialConf = field(default_factory=TrialConf)
    engine: EnginesConf = field(default_factory=EnginesConf)
    fault: FaultConf = field(default_factory=FaultConf)
    # `from` is a word of Python's, so that no class can hold it.
    claims: dict[str, Any] = field(default_factory=lambda: {"from": None})
    context: Any = "10M"
    fill: Any = None
    seed: int = 0
    results: str = "results/runs"


@functools.cache
def register() -> None:
    """Put the schemas where the YAML files of conf/ name them in their defaults."""
    store = ConfigStore.instance()
    store.store(name="root_schema", node=RootConf)
    for name, node in (
        ("static", StaticConf),
        ("paged", PagedConf),
        ("eager_pages", EagerPagesConf),
        ("sglang", SGLangConf),
        ("vllm", VLLMConf),
    ):
        store.store(group="strategy", name=f"{name}_schema", node=node)
    for group, conf in (
        ("model", ModelConf),
        ("hardware", HardwareConf),
        ("workload", WorkloadConf),
        ("parallel", ParallelConf),
    ):
        store.store(group=group, name=f"{group}_schema", node=conf)
