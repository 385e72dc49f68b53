"""Versions of the engines whose internals the adapters know."""

from __future__ import annotations

# The last one is what `pip install` lines name.
VERSIONS = {"sglang": ("0.5.12.post1",), "vllm": ("0.23.0",)}
