"""The report's model as one of eight ranks holds it, and the GPU that it is given."""

from __future__ import annotations

from dataclasses import replace

from strategies.engine_model import GIB, MIB, EngineModel

H200_BYTES = 143_156 * MIB
ONE_RANK = EngineModel(
    layers=48,
    kv_heads=1,
    q_heads=8,
    head_dim=128,
    weights_bytes=round(3.99 * GIB),
    hidden_size=1024,
    intermediate_size=13312,
)
TWO_HEADS = replace(ONE_RANK, kv_heads=2)
