"""A process in an engine's place: starts, refuses, fails, hangs, dies, or leaves a grandchild.

Run as ``engine_stand_in.py BEHAVIOUR ADAPTER``, the spec's path on standard input. Its records are
those of the adapters' own recorder, over a torch and an NVML that are made up here; no figure of it
is a measurement.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import types

GIB = 1 << 30
TOTAL = 140 * GIB
POOL_FILE = "/site-packages/sglang/srt/mem_cache/memory_pool.py"


class OutOfMemoryError(RuntimeError):
    """As torch's: told by its name."""


class Memory:
    """What the made-up GPU holds: (bytes, frames) of every live allocation."""

    def __init__(self) -> None:
        self.live: list[tuple[int, list[dict[str, object]]]] = []
        self.ooms: list[dict[str, object]] = []

    @property
    def used(self) -> int:
        return GIB + sum(nbytes for nbytes, _ in self.live)

    def take(self, nbytes: int, line: int, function: str) -> None:
        frames: list[dict[str, object]] = [
            {"filename": "/site-packages/torch/zeros.py", "line": 1, "name": "zeros"},
            {"filename": POOL_FILE, "line": line, "name": function},
        ]
        if nbytes > TOTAL - self.used:
            free = TOTAL - self.used
            self.ooms.append(
                {"action": "oom", "size": nbytes, "device_free": free, "frames": frames}
            )
            asked, left = nbytes / GIB, free / GIB
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {asked:.2f} GiB. GPU 0 has a total "
                f"capacity of 140.00 GiB of which {left:.2f} GiB is free."
            )
        self.live.append((nbytes, frames))

    def snapshot(self) -> dict[str, object]:
        blocks = [
            {"state": "active_allocated", "size": n, "requested_size": n, "frames": f}
            for n, f in self.live
        ]
        return {"segments": [{"blocks": blocks}], "device_traces": [self.ooms]}

    def segments(self) -> list[dict[str, object]]:
        return [
            {"total_size": n, "segment_pool_id": (0, int("capture" in str(f[-1]["name"])))}
            for n, f in self.live
        ]


def made_up_modules(memory: Memory) -> None:
    """Put a torch and a pynvml in place that know this memory."""
    torch, nvml = types.ModuleType("torch"), types.ModuleType("pynvml")
    cuda = types.SimpleNamespace(
        init=lambda: None,
        synchronize=lambda: None,
        mem_get_info=lambda: (TOTAL - memory.used, TOTAL),
        memory_allocated=lambda: memory.used - GIB,
        memory_reserved=lambda: memory.used - GIB,
        max_memory_reserved=lambda: memory.used - GIB,
        memory_snapshot=memory.segments,
        memory=types.SimpleNamespace(
            _record_memory_history=lambda **given: None, _snapshot=memory.snapshot
        ),
    )
    torch.__dict__.update(
        __version__="0.0", cuda=cuda, is_tensor=lambda one: hasattr(one, "element_size")
    )
    nvml.__dict__.update(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=memory.used),
    )
    sys.modules.update(torch=torch, pynvml=nvml)


def name_of(frames: list[dict[str, object]]) -> str:
    own = [f for f in frames if f["filename"] == POOL_FILE]
    names = {"_create_buffers": "kv_pool", "__init__": "req_to_token"}
    return names.get(str(own[0]["name"]), "weights") if own else ""


def run_adapter(memory: Memory, adapter: str, moved: bool) -> None:
    """Run the adapter itself against a made-up engine; it ends the process."""
    import runpy

    import made_up_engines
    from versions import VERSIONS

    engine = os.path.basename(adapter).removeprefix("start_").removesuffix(".py")
    getattr(made_up_engines, engine)(memory, VERSIONS[engine][-1], moved)
    sys.argv = [adapter]
    runpy.run_path(adapter, run_name="__main__")


def main(behaviour: str, adapter: str) -> None:
    if behaviour == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "hangs":
        subprocess.Popen(["sleep", "300"], start_new_session=True)
        time.sleep(300)
    if behaviour == "breaks":
        print("ImportError: libcudart is missing", flush=True)
        sys.exit(1)
    sys.path.insert(0, os.path.dirname(adapter))
    memory = Memory()
    made_up_modules(memory)
    if behaviour.startswith("adapter"):
        run_adapter(memory, adapter, moved=behaviour == "adapter_moved")
    from awaited import awaited_spec
    from recorder import Recorder
    from versions import VERSIONS

    recorder = Recorder(awaited_spec()[0], "sglang")
    with recorder.guarded(("Not enough memory",), name_of, lambda: {"kv_pool": 96}):
        version = "9.9" if behaviour == "unknown_version" else VERSIONS["sglang"][-1]
        recorder.begin(version)
        recorder.phase("context")
        if behaviour == "moved":
            recorder.get(recorder, "req_to_token_pool.req_to_token")
        memory.take(4 * GIB, 10, "load")
        recorder.phase("weights")
        recorder.item("weights", "weights", 4 * GIB, how="parameters")
        if behaviour == "refuses":
            raise RuntimeError("Not enough memory. Please try to increase --mem-fraction-static.")
        rows = recorder.spec["flags"].get("max_running_requests", 2048) + 1
        table = rows * (recorder.spec["flags"]["context_length"] + 4) * 4
        memory.take(table, 149, "__init__")
        recorder.item("tables", "req_to_token", table, f"int32 [{rows}, …]")
        for _ in range(96):
            memory.take(GIB, 907, "_create_buffers")
        recorder.phase("pool")
        recorder.item("pool", "kv_pool", 96 * GIB, count=96)
        if behaviour == "half_a_line":
            os.write(recorder._out.fileno(), b'{"type": "item", "na')
            os.kill(os.getpid(), signal.SIGKILL)
        if behaviour == "no_record":
            recorder.emit("gossip")
        if behaviour == "grandchild":
            subprocess.Popen(["sleep", "300"], start_new_session=True)
        recorder.ready(
            pool_tokens=96 * GIB // 24576,
            request_limit=rows - 1,
            max_request_tokens=96 * GIB // 24576 - 1,
            settings={"cwd": os.getcwd(), "path": os.environ.get("PYTHONPATH")},
        )
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:3])
