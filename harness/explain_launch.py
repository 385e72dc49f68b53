"""An engine's launch, read from a command line or from what its log says: engine, flags, model.

Command lines are split, never run; paths in them are never opened.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from harness.sizes import BadValue, parse_tokens

MAX_COMMAND_CHARACTERS = 1 << 15
_ALLOWED = "sglang serve …, python -m sglang.launch_server …, vllm serve … or vllm's api_server"

# Flag as typed (without dashes, _ for -) -> our key. Engines' own names stay.
_SGLANG = {
    "mem_fraction_static": "share",
    "max_running_requests": "count",
    "max_total_tokens": "count",
    "chunked_prefill_size": "signed",
    "cuda_graph_max_bs": "count",
    "attention_backend": "text",
    "page_size": "count",
    "disable_cuda_graph": "switch",
    "disable_piecewise_cuda_graph": "switch",
    "hybrid_kvcache_ratio": "share",
    "swa_full_tokens_ratio": "share",
    "disable_hybrid_swa_memory": "switch",
}
_VLLM = {
    "gpu_memory_utilization": "share",
    "max_num_seqs": "count",
    "max_num_batched_tokens": "tokens",
    "block_size": "count",
    "enforce_eager": "switch",
    "kv_cache_memory_bytes": "tokens",
    "attention_backend": "text",
    "decode_context_parallel_size": "count",
}
_FLAGS = {"sglang": _SGLANG, "vllm": _VLLM}
_SIXTEEN_BITS = ("auto", "bfloat16", "bf16", "float16", "fp16", "half")
_CONTEXT = ("context_length", "max_model_len")
_TP = ("tp", "tp_size", "tensor_parallel_size")
# Lets a context pass that is longer than the config.json allows, and what the engine takes for yes.
_LONGER = {
    "sglang": ("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", ("true", "1", "yes", "y")),
    "vllm": ("VLLM_ALLOW_LONG_MAX_MODEL_LEN", ("true", "1")),
}
_CHANGE_CONFIG = ("json_model_override_args", "hf_overrides", "rope_scaling")
_OTHER_RANKS = ("pp", "dp", "pp_size", "dp_size", "pipeline_parallel_size", "data_parallel_size")


@dataclass
class Launch:
    """What is known of a launch."""

    engine: str
    version: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    context_tokens: int | None = None
    tensor_parallel: int = 1
    kv_dtype: str = "auto"
    model: str = ""
    notes: list[str] = field(default_factory=list)
    longer_allowed: bool = False  # the environment lets a context pass that the config does not
    changes_config: bool = False
    unread: list[str] = field(default_factory=list)  # flags that no formula here knows

    @property
    def longer_variable(self) -> str:
        """The environment variable with which a longer context than the config's may pass."""
        return _LONGER[self.engine][0]

    @property
    def kv_itemsize(self) -> int:
        """Bytes of a K/V element: 1 for any FP8, else 2."""
        return 1 if "fp8" in self.kv_dtype else 2


def parse_command(text: str) -> Launch:
    """Read a launch command.

    Raises
    ------
    BadValue
        When it is no launch of either engine, or a flag's value is wrong.
    """
    if len(text) > MAX_COMMAND_CHARACTERS:
        raise BadValue("--command", text[:40] + "…", f"up to {MAX_COMMAND_CHARACTERS} characters")
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError:
        raise BadValue("--command", text, "a command with matching quotes") from None
    engine, rest = _engine_of(words, text)
    launch = Launch(engine)
    variable, yes = _LONGER[engine]
    settings = (word.partition("=") for word in words)
    launch.longer_allowed = any(
        name == variable and value.lower() in yes for name, _, value in settings
    )
    for key, value in _pairs(rest, launch):
        apply_flag(launch, key, value)
    if launch.unread:
        names = ", ".join(dict.fromkeys(launch.unread))
        launch.notes.append(f"not read, as if no memory hung on it: {names}")
    return launch


def _engine_of(words: list[str], text: str) -> tuple[str, list[str]]:
    for i, word in enumerate(words):
        name = word.rsplit("/", 1)[-1]
        if word.startswith("sglang.launch_server") or (
            name == "sglang" and words[i + 1 : i + 2] == ["serve"]
        ):
            return "sglang", words[i + 1 + (name == "sglang") :]
        if word.startswith("vllm.entrypoints"):
            return "vllm", words[i + 1 :]
        if name == "vllm" and words[i + 1 : i + 2] == ["serve"]:
            return "vllm", words[i + 2 :]
    raise BadValue("--command", text, _ALLOWED)


def _pairs(words: list[str], launch: Launch) -> Iterable[tuple[str, str | None]]:
    """Flags with their values; ``None`` for a switch."""
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("-"):
            if not launch.model:
                launch.model = word
            continue
        key, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield key, value
        elif i < len(words) and (not words[i].startswith("-") or _is_number(words[i])):
            i += 1
            yield key, words[i - 1]
        else:
            yield key, None


def _is_number(word: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?", word) is not None


def apply_flag(launch: Launch, key: str, value: object) -> None:
    """Take one flag; one that no formula here knows is only remembered."""
    key = key.replace("-", "_")
    if key.startswith(_CHANGE_CONFIG):
        launch.changes_config = True
    if key in _CONTEXT:
        _apply_context(launch, key, value)
    elif key in _TP:
        launch.tensor_parallel = _number(key, value)
    elif key in _OTHER_RANKS and _number(key, value) > 1:
        launch.notes.append(f"{key}={value} is not modelled: figures are for one group of ranks")
    elif key == "kv_cache_dtype":
        _apply_kv_dtype(launch, str(value))
    elif key in ("model", "model_path"):
        launch.model = str(value)
    elif key in ("disable_hybrid_kv_cache_manager", "no_disable_hybrid_kv_cache_manager"):
        launch.flags["hybrid_kv_cache_manager"] = key.startswith("no_") == _switch(value)
    elif key in _FLAGS[launch.engine]:
        made = _value(key, value, _FLAGS[launch.engine][key])
        if made is not None:
            launch.flags[key] = made
    elif key not in _OTHER_RANKS and not key.startswith(_CHANGE_CONFIG):
        launch.unread.append(key)


def _apply_kv_dtype(launch: Launch, value: str) -> None:
    launch.kv_dtype = value
    if "fp8" not in value and value not in _SIXTEEN_BITS:
        launch.notes.append(f"kv_cache_dtype={value} is not modelled: K/V in 16 bits")


def _apply_context(launch: Launch, key: str, value: object) -> None:
    if value in ("auto", "-1", -1) and launch.engine == "vllm":
        launch.flags["max_model_len"] = "auto"
    elif value not in (None, "None"):
        launch.context_tokens = _tokens(key, value)


def _tokens(key: str, value: object) -> int:
    text = str(value)
    # Both engines' users write 10k for 10,000 as well.
    if text[-1:] in ("k", "m", "g"):
        text = text[:-1] + text[-1].upper()
    return parse_tokens(text, key)


def _number(key: str, value: object) -> int:
    text = str(value)
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < 1:
        raise BadValue(key, value, "a whole number from 1 on")
    return int(text)


def _switch(value: object) -> bool:
    return value is None or str(value).lower() in ("true", "1")


def _value(key: str, value: object, kind: str) -> Any:  # noqa: ANN401
    """A flag's value as a number; ``None`` where the log says None."""
    if kind == "switch":
        return _switch(value)
    if value in (None, "None", "auto"):
        return None
    if kind == "text":
        return str(value).lower()
    if kind == "tokens":
        return _tokens(key, value)
    if kind == "signed" and str(value) == "-1":
        return -1
    if kind in ("count", "signed"):
        return _number(key, value)
    try:
        return float(str(value))
    except ValueError:
        raise BadValue(key, value, "a number") from None
