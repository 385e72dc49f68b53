"""Which smallest change of flags lets a context start: a short ordered list, each one tried.

A shorter context is no such change: where none is found, :func:`longest_accepted` says how far it
goes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from harness.planner import admits, predict
from harness.planner_engines import ENGINES
from harness.planner_spec import PlanSpec, Prediction
from harness.sizes import gib

GOALS = ("start", "admit")
REQUESTS = (1024, 512, 256, 128, 64, 32, 16, 8, 4, 2, 1)
FRACTIONS = (0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3, 0.2, 0.1)
LOWER_UTILIZATIONS = (0.85, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
LEAST_TOKENS = 128  # a context below a page is no advice
# How much memory goes where: the engine's own default may do what a given value does not.
TAKEN_BACK = {
    "sglang": (
        "max_total_tokens",
        "mem_fraction_static",
        "chunked_prefill_size",
        "cuda_graph_max_bs",
    ),
    "vllm": ("kv_cache_memory_bytes", "gpu_memory_utilization", "max_num_batched_tokens"),
}
SEQUENCES = (512, 256, 128, 64, 32, 16)
FEW_REQUESTS = 16
UTILIZATIONS = (0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98)

# Without it 0.11.0 turns the manager off for chunked-local layers, whatever the flag says
# (config/__init__.py:499-529@0.11.0); it is set from 0.19.1 on (envs.py:225@0.23.0).
CHUNKED_HYBRID = "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"

Flags = tuple[tuple[str, str], ...]
Candidate = tuple[Flags, str, PlanSpec]


@dataclass(frozen=True)
class Change:
    """A change of flags that works, as the planner has tried.

    ``flags`` are pairs of a flag and its value, ``costs`` says what they give up; ``spec`` and
    ``prediction`` are those of the changed configuration.
    """

    flags: Flags
    costs: str
    spec: PlanSpec
    prediction: Prediction

    @property
    def text(self) -> str:
        """The flags, as one would type them."""
        return " ".join(f"{key}={value}" for key, value in self.flags)

    @property
    def leaves(self) -> str:
        """What it gives up, and what stays free on the modelled device."""
        left = f"{gib(self.prediction.free_bytes * self.spec.scale)} stay free"
        return f"{self.costs}; {left}" if self.costs else left


def smallest_change(spec: PlanSpec, goal: str = "start") -> Change | None:
    """Find the first change, from those that give up least on, that reaches the goal.

    Parameters
    ----------
    goal : str
        ``start``: the process reaches ``ready``. ``admit``: it also accepts a request of the full
        context.

    Returns
    -------
    Change or None
        None when nothing needs changing, or nothing helps.
    """
    if goal not in GOALS:
        raise ValueError(f"goal={goal}: allowed are {', '.join(GOALS)}")
    if _reaches(spec, predict(spec.filled(0.0)), goal):
        return None
    for flags, costs, changed in _candidates(spec):
        try:
            made = predict(changed.filled(0.0))
        except ValueError:  # a flag that this version of the engine does not take
            continue
        if _reaches(changed, made, goal) and _has_room(changed, made):
            return Change(flags, _with_figures(costs, made), changed, made)
    return None


def longest_accepted(spec: PlanSpec) -> Change | None:
    """Find the longest context of which a whole request is accepted.

    Looked for with the flags as they are, with fewer requests at once (engines), and with a slot of
    the whole context (static); the least change that comes within 1 % of the longest is taken. It
    is shorter by up to a fifth where SGLang would have no room for a prefill chunk.

    Returns
    -------
    Change or None
        None where it would be a handful of tokens.
    """
    found = [c for flags, costs, base in _bases(spec) if (c := _longest(flags, costs, base))]
    longest = max((c.spec.context_tokens for c in found), default=0)
    # The first that comes within 1 %: it takes the least away.
    good = (c for c in found if c.spec.context_tokens >= 0.99 * longest)
    return next(good, None)


def _reaches(spec: PlanSpec, made: Prediction, goal: str) -> bool:
    return made.started and (goal == "start" or made.admits_context)


def _has_room(spec: PlanSpec, made: Prediction) -> bool:
    """Whether an engine that starts could also run one prefill chunk of its own."""
    if spec.strategy != "sglang" or spec.engine_model is None:
        return True
    chunk = max(0, int(made.settings.get("chunked_prefill_size", 0)))
    return made.free_bytes * spec.scale >= chunk * spec.engine_model.activation_bytes_per_token


def _with_figures(costs: str, made: Prediction) -> str:
    return costs.format(pool=f"{made.pool_tokens:,}")


def _candidates(spec: PlanSpec) -> Iterator[Candidate]:
    """Given flags taken back, all candidates of the strategy, and K/V in 8 bits."""
    for key in TAKEN_BACK.get(spec.strategy, ()):
        if spec.options.get(key) is not None:
            yield ((key, "null"),), "the engine's own default", spec.with_options(**{key: None})
    if spec.strategy == "sglang":
        yield from _sglang(spec)
    elif spec.strategy == "vllm":
        yield from _vllm(spec)
    if _itemsize(spec) == 2:
        flags = (("kv_cache_dtype", "fp8_e4m3"),)
        yield flags, "K/V in 8 bits", _with_fp8(spec)
        if spec.strategy == "sglang":
            for number in REQUESTS:
                pair = (*flags, ("max_running_requests", str(number)))
                changed = _with_fp8(spec).with_options(max_running_requests=number)
                yield pair, f"K/V in 8 bits, at most {number} requests at once", changed
    if spec.strategy == "static":
        yield from _static(spec)


def _sglang(spec: PlanSpec) -> Iterator[Candidate]:
    limit = predict(spec.filled(0.0)).settings.get("max_running_requests", 1 << 30)
    numbers = [n for n in REQUESTS if n < int(limit)]
    for number in numbers:
        changed = spec.with_options(max_running_requests=number)
        flags = (("max_running_requests", str(number)),)
        yield flags, f"at most {number} requests at once", changed
    if not spec.options.get("disable_cuda_graph"):
        changed = spec.with_options(disable_cuda_graph=True)
        yield (("disable_cuda_graph", "true"),), "slower decoding", changed
    if spec.options.get("page_size", 1) < 64:
        yield (("page_size", "64"),), "slots in pages of 64 tokens", spec.with_options(page_size=64)
    now = spec.options.get("mem_fraction_static") or 1.0
    for fraction in FRACTIONS:
        if fraction < now:
            changed = spec.with_options(mem_fraction_static=fraction)
            flags = (("mem_fraction_static", str(fraction)),)
            yield flags, "a pool of {pool} tokens", changed
    for number in numbers:
        changed = spec.with_options(max_running_requests=number, mem_fraction_static=0.8)
        both = (("max_running_requests", str(number)), ("mem_fraction_static", "0.8"))
        yield both, f"at most {number} requests at once, a pool of {{pool}} tokens", changed
    for fraction in (0.92, 0.94, 0.96, 0.98):
        for number in (16, 1):
            changed = spec.with_options(max_running_requests=number, mem_fraction_static=fraction)
            both = (("max_running_requests", str(number)), ("mem_fraction_static", str(fraction)))
            yield both, f"at most {number} requests at once, less for activations", changed


def _vllm(spec: PlanSpec) -> Iterator[Candidate]:
    now = predict(spec.filled(0.0)).settings.get("gpu_memory_utilization", 0.92)
    model = spec.engine_model
    if model is not None and model.window_layers:
        changed = spec.with_options(hybrid_kv_cache_manager=True)
        costs = "local layers keep one window"
        if model.window_kind == "chunked" and spec.options.get("version") == "0.11.0":
            costs += f"; only with {CHUNKED_HYBRID}=1 in the environment"
        yield (("hybrid_kv_cache_manager", "true"),), costs, changed
    higher = [u for u in UTILIZATIONS if u > float(now)]
    for share in higher:
        flags = (("gpu_memory_utilization", str(share)),)
        changed = spec.with_options(gpu_memory_utilization=share)
        yield flags, "less for everything that vLLM does not count", changed
    if not spec.options.get("enforce_eager"):
        yield (("enforce_eager", "true"),), "slower decoding", spec.with_options(enforce_eager=True)
    yield from _fewer_sequences(spec)
    small = spec.with_options(max_num_batched_tokens=2048)
    yield (("max_num_batched_tokens", "2048"),), "smaller prefill chunks", small
    changed = spec.with_options(
        enforce_eager=True, max_num_batched_tokens=2048, gpu_memory_utilization=0.98
    )
    together = (
        ("gpu_memory_utilization", "0.98"),
        ("enforce_eager", "true"),
        ("max_num_batched_tokens", "2048"),
    )
    yield (
        together,
        "slower decoding, smaller prefill chunks, little room for anything else",
        changed,
    )
    for share in LOWER_UTILIZATIONS:  # where others hold some of the GPU
        if share < float(now):
            flags = (("gpu_memory_utilization", str(share)),)
            changed = spec.with_options(gpu_memory_utilization=share)
            yield flags, "a pool of {pool} tokens", changed


def _fewer_sequences(spec: PlanSpec) -> Iterator[Candidate]:
    """Tables of fewer requests are smaller, and fit into 32 bits."""
    for number in SEQUENCES:
        if (spec.options.get("max_num_seqs") or number + 1) > number:
            flags = (("max_num_seqs", str(number)),)
            costs = f"at most {number} requests at once"
            yield flags, costs, spec.with_options(max_num_seqs=number)


def _static(spec: PlanSpec) -> Iterator[Candidate]:
    yield from _whole_slot(spec)
    changed = replace(spec, strategy="paged", options={})
    yield (("strategy", "paged"),), "memory runs out while a sequence grows, not before", changed
    for fraction in FRACTIONS:
        if fraction < spec.options.get("mem_fraction", 1.0):
            flags = (("mem_fraction", str(fraction)),)
            yield flags, "a slot of {pool} tokens", spec.with_options(mem_fraction=fraction)


def _whole_slot(spec: PlanSpec) -> Iterator[Candidate]:
    if spec.options.get("mem_fraction", 1.0) < 1:
        flags = (("mem_fraction", "1.0"),)
        yield flags, "a slot of the whole context", spec.with_options(mem_fraction=1.0)


def _bases(spec: PlanSpec) -> Iterator[Candidate]:
    """Flags with which a shorter context is looked for."""
    yield (), "", spec
    if spec.strategy == "static":
        yield from _whole_slot(spec)
    if spec.strategy == "sglang":
        few = spec.with_options(max_running_requests=FEW_REQUESTS)
        flags = (("max_running_requests", str(FEW_REQUESTS)),)
        if (spec.options.get("max_running_requests") or FEW_REQUESTS + 1) > FEW_REQUESTS:
            yield flags, f"at most {FEW_REQUESTS} requests at once", few
    if spec.strategy == "vllm":
        yield from _fewer_sequences(spec)


def _longest(flags: Flags, costs: str, base: PlanSpec) -> Change | None:
    good, bad = 0, base.context_tokens
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if admits(base, middle) else (good, middle)
    key = {"sglang": "context_length", "vllm": "max_model_len"}.get(base.strategy, "context")
    for share in (1.0, 0.99, 0.97, 0.95, 0.9, 0.8):
        tokens = int(good * share)
        if tokens < LEAST_TOKENS:
            return None
        changed = base.at(tokens)
        made = predict(changed.filled(0.0))
        if _reaches(changed, made, "admit") and _has_room(changed, made):
            room = "room for a prefill chunk" if share < 1 else ""
            told = ", ".join(filter(None, (costs, room)))
            return Change((*flags, (key, str(tokens))), told, changed, made)
    return None


def _itemsize(spec: PlanSpec) -> int:
    if spec.strategy in ENGINES and spec.engine_model is not None:
        return spec.engine_model.kv_itemsize
    return spec.model.groups[0].geometry.itemsize if spec.model is not None else 1


def _with_fp8(spec: PlanSpec) -> PlanSpec:
    model = spec.model
    if model is not None:
        groups = tuple(
            replace(
                g,
                geometry=replace(g.geometry, kv_dtype="fp8_e4m3"),
                pages_per_chunk=g.pages_per_chunk * g.geometry.itemsize,
            )
            for g in model.groups
        )
        model = replace(model, groups=groups)
    engine = spec.engine_model
    if engine is not None:
        engine = replace(engine, kv_itemsize=1)
    return replace(spec, model=model, engine_model=engine)
