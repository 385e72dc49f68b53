"""Strategies by name: how a configuration becomes a strategy.

Each entry names the module and class that build it; the module is imported when it is first asked
for. A strategy from elsewhere joins with :func:`register`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from strategies.device import Device
from strategies.model import KVModel
from strategies.strategy import Strategy

_CONSTRUCTORS: dict[str, tuple[str, str]] = {
    "static": ("strategies.static", "Static"),
    "paged": ("strategies.paged", "Paged"),
    "eager_pages": ("strategies.eager_pages", "EagerPages"),
    "sglang": ("strategies.sglang", "SGLang"),
    "vllm": ("strategies.vllm", "VLLM"),
}
_REQUIRED = ("device", "model", "context_tokens", "sequences")


def register(name: str, module: str, attribute: str) -> None:
    """Let :func:`build` make ``name`` by calling ``module.attribute``.

    It is called as ``attribute(device, model, context_tokens, sequences, **options)``.
    """
    _CONSTRUCTORS[name] = (module, attribute)


def names() -> tuple[str, ...]:
    """Every strategy that can be built."""
    return tuple(_CONSTRUCTORS)


def options(name: str) -> dict[str, Any]:
    """List the options of a strategy with their defaults."""
    return {
        key: parameter.default
        for key, parameter in inspect.signature(_constructor(name)).parameters.items()
        if key not in _REQUIRED and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }


def build(
    name: str,
    device: Device,
    model: KVModel,
    context_tokens: int,
    sequences: int = 1,
    **chosen: Any,  # noqa: ANN401
) -> Strategy:
    """Make a strategy; nothing is allocated before its ``start()``.

    Raises
    ------
    ValueError
        One line that names the key, its value and what is allowed.
    """
    constructor = _constructor(name)
    allowed = options(name)
    for key, value in chosen.items():
        if key not in allowed:
            raise ValueError(f"{key}={value}: {name} allows {', '.join(allowed)}")
    made: Strategy = constructor(device, model, context_tokens, sequences, **chosen)
    return made


def _constructor(name: str) -> Any:  # noqa: ANN401
    if name not in _CONSTRUCTORS:
        raise ValueError(f"strategy={name}: allowed are {', '.join(_CONSTRUCTORS)}")
    module, attribute = _CONSTRUCTORS[name]
    return getattr(importlib.import_module(module), attribute)
