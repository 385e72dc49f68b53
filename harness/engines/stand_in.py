"""The stand-in model: one rank of ours as a config.json that both engines read.

A Llama of the rank's own layers, heads and head size, whose intermediate size is what brings its
weights to those of the rank. K/V, pools and index tables depend on nothing else; activations
follow the intermediate size, in the engine, its emulation and the planner alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from harness.settings import Settings
from harness.sizes import BadValue
from kernels.view import DTYPE_BYTES
from strategies.engine_model import EngineModel

VOCAB_TOKENS = 32_000  # no tokenizer is loaded
LEAST_HIDDEN = 1024  # narrower matrices would need a much larger intermediate size
INTERMEDIATE_STEP = 128  # what the engines' kernels like
ITEMSIZE = 2  # bf16 weights
LEAST_POSITIONS = 10_000_000
ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class StandIn:
    """Shape of the stand-in; ``weights_bytes`` are counted, as an engine loads them."""

    layers: int
    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    positions: int

    @property
    def weights_bytes(self) -> int:
        """Embedding, head, norms and every layer's matrices, in 16 bits."""
        layer = self._attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        tables = 2 * VOCAB_TOKENS * self.hidden + self.hidden
        return ITEMSIZE * (self.layers * layer + tables)

    @property
    def _attention(self) -> int:
        return self.hidden * self.head_dim * 2 * (self.q_heads + self.kv_heads)

    def config(self) -> dict[str, Any]:
        """The config.json."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.q_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "partial_rotary_factor": self.rotary_dim / self.head_dim,
            "vocab_size": VOCAB_TOKENS,
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-05,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
        }

    def engine_model(self, kv_dtype: str, name: str) -> EngineModel:
        """The same, as the engines' formulas take it: a model of one rank."""
        return EngineModel(
            layers=self.layers,
            kv_heads=self.kv_heads,
            q_heads=self.q_heads,
            head_dim=self.head_dim,
            kv_itemsize=DTYPE_BYTES[kv_dtype],
            weights_bytes=self.weights_bytes,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            rotary_dim=self.rotary_dim,
            max_position_embeddings=self.positions,
            architecture=ARCHITECTURE,
            name=name,
        )


def stand_in(settings: Settings, context_tokens: int = 1) -> StandIn:
    """Shape the stand-in of a model's rank, for a context.

    Raises
    ------
    BadValue
        When the rank's weights are too few to hold even the attention's matrices.
    """
    model, tp = settings.model, settings.parallel.tp
    made = StandIn(
        layers=model.layers,
        hidden=max(LEAST_HIDDEN, model.hidden // tp),
        intermediate=0,
        q_heads=model.q_heads(tp),
        kv_heads=model.kv_heads(tp),
        head_dim=model.head_dim,
        rotary_dim=model.rotary_dim,
        positions=max(LEAST_POSITIONS, context_tokens),
    )
    each = ITEMSIZE * 3 * made.hidden * made.layers
    steps = round((model.weights_bytes - made.weights_bytes) / each / INTERMEDIATE_STEP)
    if steps < 1:
        least = made.weights_bytes + each * INTERMEDIATE_STEP
        raise BadValue("model.weights_per_rank", model.weights_bytes, f"at least {least} bytes")
    return StandIn(**{**made.__dict__, "intermediate": steps * INTERMEDIATE_STEP})
