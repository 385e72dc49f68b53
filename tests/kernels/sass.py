"""Compile kernels for sm_90 on a machine with no GPU, and read the machine code.

``capture()`` turns every launch inside it into a compilation with exactly the arguments, the
specialisation and the options of that launch: the test calls the kernels' public wrappers on CPU
tensors and asserts on what the GPU would have run. Triton and Gluon kernels work alike.

A process in which ``TRITON_INTERPRET`` is set cannot compile, so these tests run without it.
"""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

SM_90 = GPUTarget("cuda", 90, 32)


class StandInDriver:
    """Answers what a launch asks of a driver before it compiles: the target, device and stream."""

    def get_current_target(self) -> GPUTarget:
        return SM_90

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One kernel as ptxas made it for sm_90."""

    name: str
    grid: Any
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    log: str
    opcodes: Counter[str] = field(repr=False)
    asm: Any = field(repr=False)

    def count(self, opcode: str) -> int:
        """Instructions whose name is ``opcode``, with any modifiers: ``count("QGMMA")``."""
        return sum(n for name, n in self.opcodes.items() if name.split(".")[0] == opcode)

    def summary(self) -> Compiled:
        """The same without the compiler's artefacts, so that it can cross processes."""
        return replace(self, grid=None, asm=None)

    @property
    def warnings(self) -> list[str]:
        """Ptxas warnings (C75xx: a wgmma was serialised or a register pair was split)."""
        return [line for line in self.log.splitlines() if "warning" in line or "C75" in line]


def _sass(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [str(tool), "-sass", file.name], check=True, capture_output=True, text=True
        ).stdout


def read(kernel: Any, log: str, grid: Any = None) -> Compiled:
    """Read a compiled kernel: registers, stack, shared memory and instruction counts."""
    text = _sass(kernel.asm["cubin"])
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)"
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    if used is None or stack is None:
        raise AssertionError(f"ptxas left no resource usage for {kernel.name}: {log!r}")
    return Compiled(
        name=kernel.name,
        grid=grid,
        registers=int(used[1]),
        stack_bytes=int(stack[1]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        log=log,
        opcodes=Counter(re.findall(pattern, text, re.M)),
        asm=kernel.asm,
    )


@contextlib.contextmanager
def capture() -> Iterator[list[Compiled]]:
    """Compile every launch made inside instead of running it; yields the list they go to.

    A launch whose specialisation was compiled before in the same block is not listed again.
    """
    launches: list[Compiled] = []
    seen: set[int] = set()
    touched: set[JITFunction] = set()
    run = JITFunction.run
    before = driver._active

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self not in touched:
            touched.add(self)
            self.device_caches.clear()
        with contextlib.redirect_stdout(io.StringIO()) as log:
            kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            launches.append(read(kernel, log.getvalue(), grid))
        return kernel

    driver.set_active(StandInDriver())
    JITFunction.run = compile_only
    try:
        with knobs.compilation.scope(), knobs.nvidia.scope():
            knobs.compilation.always_compile = True
            knobs.nvidia.dump_ptxas_log = True
            yield launches
    finally:
        JITFunction.run = run
        driver._active = before
        for fn in touched:
            fn.device_caches.clear()
