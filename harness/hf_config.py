"""Reads a Hugging Face config.json as data: the shape of one rank for the engines' formulas."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.safe_text import read_json_object
from harness.sizes import BadValue
from strategies.engine_model import EngineModel

# What says how long a model's sequences get, beside ``max_position_embeddings``.
LENGTHS = (
    "max_position_embeddings max_sequence_length seq_length max_seq_len model_max_length "
    "n_positions max_target_positions max_seq_length seq_len rope_scaling rope_parameters "
    "model_type"
).split()
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,120}")
_LARGEST = 1 << 40
# Llama 4: one layer in four has no rotary embedding and attends to everything.
LLAMA4_FULL_EVERY = 4


@dataclass(frozen=True)
class HFConfig:
    """What is used of a config.json, over all ranks."""

    architecture: str
    layers: int
    full_layers: int
    window_layers: int
    window_tokens: int
    window_kind: str
    q_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    rotary_dim: int
    max_positions: int
    experts: int
    moe_intermediate: int
    shared_intermediate: int
    dense_layers: int
    tied: bool
    quantized: bool
    state_bytes: int
    vision: bool
    lengths: dict[str, Any]

    def engine_model(self, tensor_parallel: int = 1, kv_itemsize: int = 1) -> EngineModel:
        """Shape one of ``tensor_parallel`` ranks."""
        tp = tensor_parallel
        if self.q_heads % tp:
            raise BadValue("tensor_parallel", tp, f"a divisor of {self.q_heads} query heads")
        return EngineModel(
            layers=self.full_layers + self.window_layers,
            kv_heads=max(1, self.kv_heads // tp),
            q_heads=self.q_heads // tp,
            head_dim=self.head_dim,
            kv_itemsize=kv_itemsize,
            weights_bytes=self.weights_bytes(tp),
            hidden_size=self.hidden,
            intermediate_size=-(-self._active_intermediate() // tp),
            tensor_parallel=tp,
            window_layers=self.window_layers,
            window_tokens=self.window_tokens,
            window_kind=self.window_kind,
            rotary_dim=self.rotary_dim,
            max_position_embeddings=self.max_positions,
            state_bytes_per_request=-(-self.state_bytes // tp),
            moe=self.experts > 1,
            quantized=self.quantized,
            architecture=self.architecture,
        )

    def _active_intermediate(self) -> int:
        return max(self.intermediate, self.moe_intermediate, self.shared_intermediate)

    def weights_bytes(self, tensor_parallel: int) -> int:
        """Bytes of one rank's weights, by counting the matrices of every layer.

        Embeddings stay in 16 bits when the rest is quantised to 8.
        """
        tp, width = tensor_parallel, 1 if self.quantized else 2
        kv_heads = max(1, self.kv_heads // tp)
        heads = self.q_heads // tp
        attention = self.hidden * self.head_dim * (2 * heads + 2 * kv_heads)
        dense = 3 * self.hidden * self.intermediate / tp
        sparse = 3 * self.hidden * (self.experts * self.moe_intermediate) / tp
        sparse += 3 * self.hidden * self.shared_intermediate / tp + self.hidden * self.experts
        dense_layers = self.layers if self.experts <= 1 else self.dense_layers
        mlp = dense_layers * dense + (self.layers - dense_layers) * sparse
        tables = (1 if self.tied else 2) * self.vocab * self.hidden / tp
        return int((self.layers * attention + mlp) * width + tables * 2)


def read_hf_config(path: str | Path, key: str = "--config") -> HFConfig:
    """Read the shape of a model.

    Raises
    ------
    BadValue
        One line for a file that is no such config, or for a model that is not understood.
    """
    raw = read_json_object(path, key)
    outer = raw
    if isinstance(raw.get("text_config"), dict):
        raw = {**{k: v for k, v in raw.items() if k != "text_config"}, **raw["text_config"]}
        raw["architectures"] = outer.get("architectures") or raw.get("architectures")
    if raw.get("kv_lora_rank"):
        raise BadValue(key, path, "a model with K/V heads (latent attention is not modelled)")
    fields = _Fields(raw, key)
    hidden, q_heads = fields.number("hidden_size"), fields.number("num_attention_heads")
    layers = fields.number("num_hidden_layers")
    head_dim = fields.number("head_dim", hidden // q_heads)
    kinds = _layer_kinds(raw, fields, layers)
    return HFConfig(
        architecture=_architecture(raw, key),
        layers=layers,
        full_layers=kinds[0],
        window_layers=kinds[1],
        window_tokens=kinds[2],
        window_kind="chunked" if raw.get("attention_chunk_size") else "sliding",
        q_heads=q_heads,
        kv_heads=fields.number("num_key_value_heads", q_heads),
        head_dim=head_dim,
        hidden=hidden,
        intermediate=_dense_intermediate(raw, fields),
        vocab=fields.number("vocab_size", 128_256),
        rotary_dim=max(2, int(head_dim * fields.share("partial_rotary_factor"))),
        max_positions=fields.number("max_position_embeddings", 131_072),
        experts=_experts(raw, fields),
        moe_intermediate=_moe_intermediate(raw, fields),
        shared_intermediate=_shared_intermediate(raw, fields),
        dense_layers=_dense_layers(raw, fields, layers),
        tied=raw.get("tie_word_embeddings") is True,
        quantized=_is_8_bit(outer) or _is_8_bit(raw),
        state_bytes=_state_bytes(raw, fields, layers - kinds[0] - kinds[1]),
        vision=isinstance(outer.get("vision_config"), dict),
        lengths={k: raw[k] for k in LENGTHS if k in raw},
    )


class _Fields:
    """Numbers of a config, each checked to be one."""

    def __init__(self, raw: dict[str, Any], key: str) -> None:
        self.raw, self.key = raw, key

    def number(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 1 <= value <= _LARGEST:
            raise BadValue(f"{self.key} {name}", value, "a whole number from 1 on")
        return value

    def share(self, name: str) -> float:
        value = self.raw.get(name)
        if value is None:
            return 1.0
        if type(value) not in (int, float) or not 0 < value <= 1:
            raise BadValue(f"{self.key} {name}", value, "a number above 0, at most 1")
        return float(value)


def _architecture(raw: dict[str, Any], key: str) -> str:
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and names else "LlamaForCausalLM"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise BadValue(f"{key} architectures", name, "names of letters, digits, _ . -")
    return name


def _layer_kinds(raw: dict[str, Any], fields: _Fields, layers: int) -> tuple[int, int, int]:
    """Layers with full attention, layers with a window, and its tokens."""
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == layers:
        full = sum(1 for kind in kinds if kind == "full_attention")
        local = sum(1 for kind in kinds if kind in ("sliding_attention", "chunked_attention"))
        name = "attention_chunk_size" if raw.get("attention_chunk_size") else "sliding_window"
        return full, local, fields.number(name) if local else 0
    if raw.get("attention_chunk_size"):
        rope = raw.get("no_rope_layers")
        local = layers - layers // LLAMA4_FULL_EVERY
        if isinstance(rope, list) and len(rope) == layers:
            local = sum(1 for value in rope if value == 1)
        return layers - local, local, fields.number("attention_chunk_size")
    if raw.get("full_attention_interval"):
        full = layers // fields.number("full_attention_interval")
        return full, 0, 0
    if raw.get("sliding_window") and raw.get("use_sliding_window", True) is True:
        return 0, layers, fields.number("sliding_window")
    return layers, 0, 0


def _experts(raw: dict[str, Any], fields: _Fields) -> int:
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if raw.get(name):
            return fields.number(name)
    return 1


def _moe_intermediate(raw: dict[str, Any], fields: _Fields) -> int:
    if raw.get("moe_intermediate_size"):
        return fields.number("moe_intermediate_size")
    return fields.number("intermediate_size", 4 * fields.number("hidden_size"))


def _dense_intermediate(raw: dict[str, Any], fields: _Fields) -> int:
    if raw.get("intermediate_size_mlp"):
        return fields.number("intermediate_size_mlp")
    return fields.number("intermediate_size", 4 * fields.number("hidden_size"))


def _shared_intermediate(raw: dict[str, Any], fields: _Fields) -> int:
    if _experts(raw, fields) <= 1:
        return 0
    if raw.get("shared_expert_intermediate_size"):
        return fields.number("shared_expert_intermediate_size")
    if raw.get("n_shared_experts"):
        return fields.number("n_shared_experts") * _moe_intermediate(raw, fields)
    # Llama 4 has a shared expert as large as a routed one.
    return _moe_intermediate(raw, fields) if raw.get("intermediate_size_mlp") else 0


def _dense_layers(raw: dict[str, Any], fields: _Fields, layers: int) -> int:
    """Layers of a mixture of experts that are dense."""
    if raw.get("first_k_dense_replace"):
        return min(layers, fields.number("first_k_dense_replace"))
    step = raw.get("interleave_moe_layer_step") or raw.get("decoder_sparse_step")
    if type(step) is int and step > 1:
        return layers - layers // step
    return 0


def _is_8_bit(raw: dict[str, Any]) -> bool:
    quantization = raw.get("quantization_config")
    return isinstance(quantization, dict) and bool(quantization)


def _state_bytes(raw: dict[str, Any], fields: _Fields, linear_layers: int) -> int:
    """Recurrent state a request over all ranks: fp32 state and 16-bit convolution rows."""
    if linear_layers < 1 or not raw.get("linear_num_value_heads"):
        return 0
    values, keys = fields.number("linear_num_value_heads"), fields.number("linear_num_key_heads")
    key_dim, value_dim = (fields.number(f"linear_{k}_head_dim") for k in ("key", "value"))
    kernel = fields.number("linear_conv_kernel_dim", 4)
    state = values * key_dim * value_dim * 4
    rows = (2 * keys * key_dim + values * value_dim) * (kernel - 1) * 2
    return linear_layers * (state + rows)
