"""Compile kernels for sm_90 on a machine with no GPU, and read the machine code.

``capture()`` turns every launch inside it into a compilation with exactly the arguments, the
specialisation and the options of that launch: the test calls the kernels' public wrappers on CPU
tensors and asserts on what the GPU would have run. Triton and Gluon kernels work alike.
``compile_all()`` does so in processes of its own and reads the instructions of all at once:
starting the disassembler takes longer than reading a kernel.

A process in which ``TRITON_INTERPRET`` is set cannot compile, so these tests run without it.
"""

from __future__ import annotations

import contextlib
import io
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
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


@dataclass
class Compiled:
    """One kernel as ptxas made it for sm_90."""

    name: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    num_warps: int
    log: str
    ptx: str = field(repr=False)
    code: bytes = field(repr=False)  # its instructions, 16 bytes each
    listing: list[str] = field(default_factory=list, repr=False)  # filled by disassemble()

    @property
    def opcodes(self) -> Counter[str]:
        """How often each instruction stands in it, by its name with modifiers."""
        return Counter(self.listing)

    def places(self, opcode: str) -> list[int]:
        """Where instructions named ``opcode``, with any modifiers, stand."""
        return [i for i, name in enumerate(self.listing) if name.split(".")[0] == opcode]

    def count(self, opcode: str) -> int:
        """Instructions whose name is ``opcode``, with any modifiers: ``count("QGMMA")``."""
        return len(self.places(opcode))

    @property
    def warnings(self) -> list[str]:
        """Ptxas warnings (C75xx: a wgmma was serialised or a register pair was split)."""
        return [line for line in self.log.splitlines() if "warning" in line or "C75" in line]


def _code(cubin: bytes) -> bytes:
    """The text sections of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    count, of_names = struct.unpack_from("<HH", cubin, 0x3C)
    # Name, type, flags, address, offset, size and four more fields.
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    names = headers[of_names][4]
    return b"".join(
        cubin[h[4] : h[4] + h[5]] for h in headers if cubin[names + h[0] :].startswith(b".text.")
    )


def disassemble(kernels: list[Compiled]) -> None:
    """List the instructions of each kernel, reading all of them in one go."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".raw") as file:
        file.write(b"".join(kernel.code for kernel in kernels))
        file.flush()
        text = subprocess.run(
            [str(tool), "-b", "SM90a", file.name], check=True, capture_output=True, text=True
        ).stdout
    pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)"
    found = re.findall(pattern, text, re.M)
    if 16 * len(found) != sum(len(kernel.code) for kernel in kernels):
        raise AssertionError("the disassembler did not read every instruction")
    at = 0
    for kernel in kernels:
        end = at + len(kernel.code) // 16
        kernel.listing = found[at:end]
        at = end


def read(kernel: Any, log: str) -> Compiled:
    """Read a compiled kernel: registers, stack and shared memory."""
    used = re.search(r"Used (\d+) registers", log)
    stack = re.search(r"(\d+) bytes stack frame", log)
    if used is None or stack is None:
        raise AssertionError(f"ptxas left no resource usage for {kernel.name}: {log!r}")
    return Compiled(
        name=kernel.name,
        registers=int(used[1]),
        stack_bytes=int(stack[1]),
        shared_bytes=kernel.metadata.shared,
        num_warps=kernel.metadata.num_warps,
        log=log,
        ptx=kernel.asm["ptx"],
        code=_code(kernel.asm["cubin"]),
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
            launches.append(read(kernel, log.getvalue()))
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
