"""Engines that are started for real: SGLang and vLLM, each in a Python of its own."""
