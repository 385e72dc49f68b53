"""Deliberate faults inside a trial, so that tests see how the harness takes the real ones.

A fault is part of the configuration: its rows have identities of their own, and say what was done.
"""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from strategies.device import Device
from strategies.strategy import Strategy

_HIDDEN: list[object] = []  # keeps the hidden allocation alive, unknown to the ledger


def flip_signs(fault: dict[str, Any], strategy: Strategy, sequence: int, rank: int) -> None:
    """Turn the sign of every K and V that a rank stores, once it has passed its own gate."""
    if fault["kind"] != "flipped_signs" or fault.get("rank", rank) != rank:
        return
    for view in strategy.batch([sequence]):
        size, page_tokens = view.geometry.page_bytes, view.geometry.page_tokens
        (length,), (start,) = view.lengths_host, view.starts
        for index in range(start // page_tokens, -(-length // page_tokens)):
            page = int(view.page_table[0, index])
            view.arena[page * size : (page + 1) * size].bitwise_xor_(0x80)


def strike(fault: dict[str, Any], phase: str, device: Device | None, rank: int = 0) -> None:
    """Do what ``fault`` says when ``phase`` begins, on the rank that it names or on every one."""
    if fault["kind"] == "none" or fault["phase"] != phase or fault.get("rank", rank) != rank:
        return
    kind = fault["kind"]
    if kind == "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "kill_harness":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(3600)
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "exception":
        raise RuntimeError(f"a deliberate fault in phase {phase}")
    elif kind == "host_oom":
        raise MemoryError(f"a deliberate host out-of-memory error in phase {phase}")
    elif kind == "hidden_allocation":
        assert device is not None
        observer, device.observer = device.observer, None
        _HIDDEN.append(device.allocate(phase, "hidden", int(fault["bytes"]) // device.scale))
        device.observer = observer
