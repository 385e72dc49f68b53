"""What an engine's memory policy needs to know of a model and a GPU, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB = 1 << 20
GIB = 1 << 30
INT32_BYTES = 4
INT64_BYTES = 8

# NVML counts memory that the driver keeps and CUDA never shows. SGLang's memory fraction is taken
# of the former (nvidia-smi), everything else of the latter. Read off an H200 and an H100.
_NVML_MIB = {150_109_880_320: 143_771, 85_029_158_912: 81_559}
_CUDA_SHARE_OF_NVML = 0.9957


def nvml_total_mib(total_bytes: int) -> int:
    """MiB that nvidia-smi shows for a GPU whose total is ``total_bytes`` for CUDA."""
    known = _NVML_MIB.get(total_bytes)
    return known if known is not None else round(total_bytes / MIB / _CUDA_SHARE_OF_NVML)


def engine_total_bytes(capacity_bytes: int, device_total_bytes: int = 0) -> int:
    """Total memory that an engine takes its fractions of.

    The device's own total, as CUDA shows it, when all of it may be used; the capacity when the
    device was made smaller (the driver and the context account for less than 1.5 %), or when no
    total is known.
    """
    whole = capacity_bytes > 0.985 * device_total_bytes
    if not device_total_bytes or not whole:
        return capacity_bytes
    shown = {nvml_mib: cuda_bytes for cuda_bytes, nvml_mib in _NVML_MIB.items()}
    return shown.get(device_total_bytes // MIB, device_total_bytes)


@dataclass(frozen=True)
class EngineModel:
    """One rank of a model, as an engine sees it (sizes of the modelled GPU, never scaled).

    Parameters
    ----------
    layers : int
        Layers that keep K/V.
    kv_heads, q_heads : int
        Local heads of the rank.
    head_dim : int
        Elements of one head of K, and of V.
    kv_itemsize : int
        Bytes of a K/V element: 1 (FP8) or 2 (BF16).
    weights_bytes : int
        Of the rank, without the rotary table.
    hidden_size, intermediate_size : int
        ``intermediate_size`` of the rank; 0 when unknown (then four hidden sizes over the ranks).
    tensor_parallel : int
        Ranks of the engine; enters SGLang's default memory fraction.
    window_layers, window_tokens : int
        Of ``layers``, those whose attention is local, and their chunk or window.
    window_kind : str
        ``chunked`` (Llama 4) or ``sliding``.
    rotary_dim, max_position_embeddings : int
        Shape of the rotary table, which engines build for the whole of the config's positions.
    state_bytes_per_request : int
        Recurrent state a request slot (Qwen3-Next: 9.21 MiB); 0 for attention-only models.
    moe, quantized : bool
        Decide which of vLLM's model runners is the default.
    architecture : str
        As in a config.json.
    """

    layers: int
    kv_heads: int
    q_heads: int
    head_dim: int
    kv_itemsize: int = 1
    weights_bytes: int = 0
    hidden_size: int = 4096
    intermediate_size: int = 0
    tensor_parallel: int = 1
    window_layers: int = 0
    window_tokens: int = 0
    window_kind: str = "chunked"
    rotary_dim: int = 128
    max_position_embeddings: int = 10_000_000
    state_bytes_per_request: int = 0
    moe: bool = False
    quantized: bool = False
    architecture: str = "LlamaForCausalLM"
    name: str = "model"

    def __post_init__(self) -> None:
        positive = (self.layers, self.kv_heads, self.q_heads, self.head_dim, self.tensor_parallel)
        if min(positive) < 1 or self.kv_itemsize not in (1, 2):
            raise ValueError(f"layers, heads, head_dim and tensor_parallel are at least 1: {self}")
        if not 0 <= self.window_layers <= self.layers:
            raise ValueError(f"window_layers={self.window_layers}: from 0 to layers={self.layers}")
        if self.window_layers and self.window_tokens < 1:
            raise ValueError("window_tokens: at least 1 where window_layers is set")

    @property
    def full_layers(self) -> int:
        """Layers with full attention."""
        return self.layers - self.window_layers

    @property
    def layer_token_bytes(self) -> int:
        """K and V of one token in one layer."""
        return 2 * self.kv_heads * self.head_dim * self.kv_itemsize

    @property
    def token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return self.layers * self.layer_token_bytes

    @property
    def rank_intermediate_size(self) -> int:
        """``intermediate_size``, or what it usually is."""
        return self.intermediate_size or 4 * self.hidden_size // self.tensor_parallel

    @property
    def mlp_bytes_per_token(self) -> int:
        """Gate, up and their product, in 16 bits."""
        return 2 * 3 * self.rank_intermediate_size

    @property
    def activation_bytes_per_token(self) -> int:
        """Peak of a forward pass: gate, up and their product, and two hidden states, in 16 bits.

        With 16,384 tokens and the shape of one rank that was started (hidden 1024, intermediate
        13,312) this is 1.28 GiB; vLLM 0.23.0 kept 1.59 GiB there, its own libraries included.
        """
        return self.mlp_bytes_per_token + 2 * 2 * self.hidden_size

    @property
    def weight_tensors_bytes(self) -> tuple[int, ...]:
        """Bytes of a layer's matrices in 16 bits: q, k and v; output; gate and up; down."""
        head = self.head_dim * self.hidden_size * 2
        mlp = self.rank_intermediate_size * self.hidden_size * 2
        return (self.q_heads + 2 * self.kv_heads) * head, self.q_heads * head, 2 * mlp, mlp

    def rope_bytes(self, context_tokens: int, itemsize: int) -> int:
        """Bytes of the table of cosines and sines over every position."""
        return max(self.max_position_embeddings, context_tokens) * self.rotary_dim * itemsize


@dataclass(frozen=True)
class Item:
    """One allocation of an engine's start-up.

    Parameters
    ----------
    phase : str
        ``context``, ``tables`` (before the pool), ``pool`` or ``workspace`` (after it).
    name : str
        As the engine calls it.
    pieces : tuple[tuple[int, int], ...]
        ``(count, bytes)`` of the tensors it consists of, in the order of allocation.
    source : str
        ``file:line@version`` of the formula, or ``measured@version``.
    location : str
        ``device``, ``host`` or ``host_pinned``.
    shape : str
        For people, e.g. ``int32 [2049, 10000004]``.
    transient_bytes : int
        What must be free beside it while it is made, and is free again afterwards.
    before_weights : bool
        The weights, which are there already when we plan, come only after it.
    """

    phase: str
    name: str
    pieces: tuple[tuple[int, int], ...]
    source: str
    location: str = "device"
    shape: str = ""
    transient_bytes: int = 0
    before_weights: bool = False

    @property
    def nbytes(self) -> int:
        """All of its bytes."""
        return sum(count * size for count, size in self.pieces)


@dataclass(frozen=True)
class Refusal:
    """An engine's own refusal to start."""

    phase: str
    name: str
    needed_bytes: int
    available_bytes: int
    message: str


@dataclass(frozen=True)
class EnginePlan:
    """What an engine would allocate, in its order, and what it would then accept.

    Parameters
    ----------
    items : tuple[Item, ...]
        Up to the refusal, when there is one.
    pool_tokens : int
        Tokens that the pool can hold for requests.
    slot_tokens, slots : int
        Tokens of one slot or block (the granularity of assignment), and how many can be assigned:
        vLLM keeps one block back.
    full_groups, window_groups, window_slots, window_extra_slots : int
        How many slots a sequence takes (:meth:`slots_for`).
    request_limit : int
        Requests that run at once.
    max_request_tokens : int
        The longest sequence that is accepted.
    fault : str
        What crashes the engine once everything is allocated: a fault of its own; empty: nothing.
    settings : dict
        Flags as resolved (``mem_fraction_static``, ``max_running_requests``, …).
    """

    engine: str
    version: str
    items: tuple[Item, ...]
    pool_tokens: int
    slot_tokens: int
    request_limit: int
    max_request_tokens: int
    slots: int = 0
    full_groups: int = 1
    window_groups: int = 0
    window_slots: int = 0
    window_extra_slots: int = 0
    window_pool_tokens: int = 0
    refusal: Refusal | None = None
    fault: str = ""
    settings: dict[str, float | int | str | bool] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def slots_for(self, tokens: int) -> int:
        """Count the slots that a sequence of ``tokens`` tokens holds, over all groups."""
        full = -(-tokens // self.slot_tokens)
        window = min(full, self.window_slots) + self.window_extra_slots
        return self.full_groups * full + self.window_groups * window

    def named(self, name: str) -> Item | None:
        """Find an item."""
        return next((item for item in self.items if item.name == name), None)


def tensor(
    phase: str, name: str, shape: tuple[int, ...], dtype: str, source: str, location: str = "device"
) -> Item:
    """Make an item that is one tensor."""
    itemsize = {"int32": 4, "int64": 8, "uint8": 1, "bool": 1, "fp32": 4, "bf16": 2}[dtype]
    nbytes = itemsize
    for extent in shape:
        nbytes *= extent
    text = f"{dtype} [{', '.join(map(str, shape))}]"
    return Item(phase, name, ((1, nbytes),), source, location, text)


MAX_COUNT = 2**31 - 1  # both engines keep counts of tokens and requests in int32
COUNTS = f"a whole number from 1 to {MAX_COUNT}"


def is_count(value: object, least: int = 1, most: int = MAX_COUNT) -> bool:
    """Whether a flag is unset, or a whole number from ``least`` to ``most``."""
    return value is None or (type(value) is int and least <= value <= most)


def is_share(value: object) -> bool:
    """Whether a flag is unset, or a number above 0 and at most 1."""
    return value is None or (type(value) in (int, float) and 0 < value <= 1)  # type: ignore[operator]


def check_flag(engine: str, key: str, value: object, allowed: str, good: bool) -> None:
    """Raise one clear line for a flag that an engine would not take."""
    if not good:
        raise ValueError(f"{engine} {key}={value}: not allowed; allowed: {allowed}")
