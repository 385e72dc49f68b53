"""A configured model, and what one rank stores of it: on a device, or in the scale model.

The scale model keeps one layer, one KV head and 128 K/V elements a token over all groups (64 of K
and 64 of V), so that scale = K/V elements a token / 128: 192 for 48 layers x 2 heads x 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.sizes import BadValue, parse_bytes, parse_tokens
from kernels.view import DTYPE_BYTES, Geometry
from strategies.model import KVModel, LayerGroup, chunk_pages

if TYPE_CHECKING:
    from omegaconf import DictConfig

SCALE_MODEL_HEAD_DIM = 64
HOST_PAGE_BYTES = 4096
SCALE_MODEL_ELEMENTS = 2 * SCALE_MODEL_HEAD_DIM


@dataclass(frozen=True)
class ModelSpec:
    """Attention geometry over all ranks; ``weights_bytes`` is one rank's."""

    name: str
    layers: int
    q_heads_total: int
    kv_heads_total: int
    head_dim: int
    kv_dtype: str
    hidden: int
    rotary_dim: int
    weights_bytes: int
    local_layers: int = 0
    window_tokens: int = 0
    hybrid: bool = False
    moe: bool = False
    architecture: str = "LlamaForCausalLM"

    def q_heads(self, tp: int) -> int:
        """Query heads of one of ``tp`` tensor-parallel ranks."""
        return self.q_heads_total // tp

    def kv_heads(self, tp: int) -> int:
        """KV heads of one rank: replicated when there are fewer than ranks."""
        return max(1, self.kv_heads_total // tp)

    def kv_model(self, tp: int, page_tokens: int, chunk_target_bytes: int) -> KVModel:
        """What one rank stores, at full size."""
        local = self.local_layers if self.hybrid else 0
        parts = [("full", self.layers - local, 0)]
        if local:
            parts.append(("local", local, self.window_tokens))
        groups = []
        for name, layers, window in parts:
            geometry = Geometry(
                layers,
                self.kv_heads(tp),
                self.q_heads(tp),
                self.head_dim,
                self.kv_dtype,
                page_tokens,
            )
            pages = chunk_pages(geometry.page_bytes, chunk_target_bytes)
            groups.append(LayerGroup(name, geometry, pages, window))
        return KVModel(self.name, tuple(groups))

    def scale(self, tp: int) -> int:
        """Bytes of the modelled device for each byte of the scale model."""
        elements = 2 * self.layers * self.kv_heads(tp) * self.head_dim
        return max(1, elements // SCALE_MODEL_ELEMENTS)


def scaled(model: KVModel) -> KVModel:
    """The same groups with one layer and one KV head each, 128 elements a token in all.

    Chunks keep their number of pages, so that OOM points transfer, or have the smallest multiple of
    it that fills whole pages of the host.
    """
    layers = sum(g.geometry.layers for g in model.groups)
    groups, left = [], SCALE_MODEL_HEAD_DIM
    for group in model.groups:
        full = group.geometry
        last = group is model.groups[-1]
        dim = left if last else max(1, SCALE_MODEL_HEAD_DIM * full.layers // layers)
        left -= dim
        small = Geometry(1, 1, full.group, dim, full.kv_dtype, full.page_tokens)
        unit = HOST_PAGE_BYTES // math.gcd(small.page_bytes, HOST_PAGE_BYTES)
        pages = math.lcm(group.pages_per_chunk, unit)
        groups.append(replace(group, geometry=small, pages_per_chunk=pages))
    return KVModel(model.name, tuple(groups))


def known_model(name: str, ranks: int) -> ModelSpec:
    """A model of conf/model/ as it stands there, without composing a whole configuration."""
    from omegaconf import DictConfig, OmegaConf

    from harness.compose import conf_dir
    from harness.schema import ModelConf

    loaded = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    assert isinstance(loaded, DictConfig)
    loaded.pop("defaults")
    conf = OmegaConf.merge(OmegaConf.structured(ModelConf), loaded)
    assert isinstance(conf, DictConfig)
    return model_spec(conf, ranks)


def shares(conf: DictConfig, ranks: int) -> bool:
    """Whether tensor-parallel ranks can share the heads: query heads split, KV heads or copies."""
    q_heads, kv_heads = int(conf.q_heads_total), int(conf.kv_heads_total)
    if q_heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        return False
    return q_heads // ranks % max(1, kv_heads // ranks) == 0


def model_spec(conf: DictConfig, ranks: int) -> ModelSpec:
    """The model of a configuration, checked.

    Raises
    ------
    BadValue
        For geometry that no kernel has, or that ``ranks`` ranks cannot share.
    """
    for key in ("layers", "q_heads_total", "kv_heads_total", "head_dim", "hidden", "rotary_dim"):
        if not 1 <= int(conf[key]) <= 1 << 20:
            raise BadValue(f"model.{key}", conf[key], "a whole number from 1 to 1048576")
    if conf.head_dim not in (64, 128, 256):
        raise BadValue("model.head_dim", conf.head_dim, "64, 128 or 256")
    if conf.kv_dtype not in DTYPE_BYTES:
        raise BadValue("model.kv_dtype", conf.kv_dtype, ", ".join(DTYPE_BYTES))
    if conf.q_heads_total % ranks:
        raise BadValue("model.q_heads_total", conf.q_heads_total, f"a multiple of {ranks} ranks")
    if conf.kv_heads_total % ranks and ranks % conf.kv_heads_total:
        raise BadValue(
            "model.kv_heads_total", conf.kv_heads_total, f"a multiple or divisor of {ranks} ranks"
        )
    if (conf.q_heads_total // ranks) % max(1, conf.kv_heads_total // ranks):
        raise BadValue(
            "model.q_heads_total", conf.q_heads_total, "a multiple of the KV heads on each rank"
        )
    window = 0
    if conf.local_layers:
        if not 0 <= conf.local_layers < conf.layers:
            raise BadValue("model.local_layers", conf.local_layers, f"0 to {conf.layers - 1}")
        window = parse_tokens(conf.window_tokens, "model.window_tokens")
        if window % 128:
            raise BadValue("model.window_tokens", conf.window_tokens, "a multiple of 128 tokens")
    if conf.hybrid and not conf.local_layers:
        raise BadValue("model.hybrid", conf.hybrid, "true only with model.local_layers above 0")
    return ModelSpec(
        name=str(conf.name),
        layers=int(conf.layers),
        q_heads_total=int(conf.q_heads_total),
        kv_heads_total=int(conf.kv_heads_total),
        head_dim=int(conf.head_dim),
        kv_dtype=str(conf.kv_dtype),
        hidden=int(conf.hidden),
        rotary_dim=int(conf.rotary_dim),
        weights_bytes=parse_bytes(conf.weights_per_rank, "model.weights_per_rank"),
        local_layers=int(conf.local_layers),
        window_tokens=window,
        hybrid=bool(conf.hybrid),
        moe=bool(conf.moe),
        architecture=str(conf.architecture),
    )
