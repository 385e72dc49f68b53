"""What the device can do at best: copy, read, write, and FP8 matrix products."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.data import device
from bench.peers import Peers
from bench.rows import Rows
from bench.timing import by_events, rest

Job = tuple[float, str, Callable[[], None]]


def jobs(rows: Rows, peers: Peers, dry: bool) -> list[Job]:
    """Reference rates, first of all."""
    nbytes = 1 << (20 if dry else 33)
    side = 64 if dry else 8192
    rep_ms = 1 if dry else 40

    def memory() -> None:
        x = torch.ones(nbytes, dtype=torch.uint8, device=device())
        half = x[: nbytes // 2], x[nbytes // 2 :]
        calls = {
            "copy": (lambda: half[0].copy_(half[1]), nbytes),
            "read": (lambda: x.view(torch.int32).max(), nbytes),
            "write": (lambda: x.zero_(), nbytes),
        }
        for name, (call, moved) in calls.items():
            sample = by_events(call, rep_ms)
            rows.add(sample, None, moved, work=f"rate {name}", kernel="torch", gate="no answer")

    def product() -> None:
        if device() == "cpu":
            return
        a = torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn)
        b = torch.randn(side, side, device="cuda").to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        for fast in (True, False):

            def call(fast: bool = fast) -> torch.Tensor:
                return torch._scaled_mm(a, b, one, one, None, None, torch.bfloat16, fast)

            for name, ms in (("short", 35), ("sustained", 300)):
                rest()
                rows.add(by_events(call, ms), None, flops=2.0 * side**3, work="rate FP8 product",
                         kernel="cuBLAS", variant="fast" if fast else "full", timing=name,
                         gate="no answer")  # fmt: skip

    return [(0.0, "rate memory", memory), (0.1, "rate FP8 product", product)]
