"""The context that a config.json allows: a longer one is refused before any weights are loaded.

SGLang 0.5.12.post1: ``srt/configs/model_config.py:541-568``, with the length of
``srt/utils/hf_transformers/common.py:374-391``. vLLM 0.23.0: ``config/model.py:2112-2249``, with
the length of ``transformers_utils/model_arch_config_convertor.py:310-343``. Each has an environment
variable that lets a longer context pass; other versions were not read.
"""

from __future__ import annotations

from typing import Any

from harness.explain_launch import Launch
from harness.hf_config import HFConfig

SOURCES = {
    "sglang": "srt/configs/model_config.py:564@0.5.12.post1",
    "vllm": "config/model.py:2245@0.23.0",
}
# Where a config.json may say how long its model's sequences get: SGLang takes the first of its keys
# that is there, vLLM the smallest of its own, but for the one that it always follows.
_SGLANG_KEYS = (
    "max_sequence_length",
    "seq_length",
    "max_seq_len",
    "model_max_length",
    "max_position_embeddings",
)
_VLLM_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_VLLM_FIRST = "model_max_length"


def refusal(launch: Launch, config: HFConfig) -> str:
    """Say that the engine refuses this context, and what lets it pass; ``""`` where it does not.

    Nothing is said where the config does not tell, or the launch changes it.
    """
    asked = launch.context_tokens
    if asked is None or launch.longer_allowed or launch.changes_config:
        return ""
    limit, key = longest_context(launch.engine, config.lengths)
    if limit is None or asked <= limit:
        return ""
    return (
        f"{asked:,} tokens of context: config.json allows {limit:,} ({key}); "
        f"{launch.longer_variable}=1 in the environment lets them pass  "
        f"{SOURCES[launch.engine]}; what follows is with it, for memory alone"
    )


def longest_context(engine: str, lengths: dict[str, Any]) -> tuple[int | None, str]:
    """Return the longest context that a config.json allows, and the key that says so.

    Parameters
    ----------
    engine : str
        ``sglang`` or ``vllm``.
    lengths : dict
        Of the config.json: whatever of the keys of both engines is there, ``rope_scaling`` or
        ``rope_parameters``, and ``model_type``.
    """
    sizes = {k: v for k, v in lengths.items() if type(v) is int and v > 0}
    rope = lengths.get("rope_parameters") or lengths.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(v, dict) for v in rope.values()):
        return None, ""  # one for each kind of layer, say
    kind = rope.get("rope_type") or rope.get("type")
    factor = rope.get("factor") or 1
    if type(factor) not in (int, float) or not 0 < factor < 1e6:
        return None, ""
    if engine == "sglang":
        key = next((k for k in _SGLANG_KEYS if k in sizes), "")
        if kind == "llama3" or "original_max_position_embeddings" in rope:
            factor = 1
        return (int(sizes[key] * factor), key) if key else (None, "")
    key = min((k for k in _VLLM_KEYS if k in sizes), key=lambda k: sizes[k], default="")
    key = _VLLM_FIRST if _VLLM_FIRST in sizes else key
    if not key:
        return None, ""
    limit = sizes[key]
    if "gemma3" not in str(lengths.get("model_type")):
        if kind == "yarn":
            original = rope.get("original_max_position_embeddings")
            if type(original) is not int:
                return None, ""
            limit = original
        limit = int(limit * (1 if kind in ("su", "longrope", "llama3") else factor))
    return max(limit, sizes.get(_VLLM_FIRST, 0)), key
