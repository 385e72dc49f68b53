"""What the adapters share: records of a start, and who held the memory when one failed.

Runs inside an engine's own Python and imports nothing of the harness; torch and pynvml only when a
start is under way. The records are described in :mod:`harness.engines.protocol`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback

from stacks import asked, causes, held, traceback_frames, where
from versions import VERSIONS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from stacks import Frames

POLL_SECONDS = 0.02
MESSAGE_CHARS = 2000
HISTORY_ENTRIES = 400_000
DEFAULT_POOL = (0, 0)  # where torch keeps what is no graph's


class Moved(Exception):
    """An internal of the engine is not where its known version has it."""


class Recorder:
    """Writes the records of one start.

    Parameters
    ----------
    spec_path : str
        The spec, as :mod:`harness.engines.protocol` describes it.
    engine : str
        ``sglang`` or ``vllm``; its package has the same name.
    loading_seconds : float
        What the start had taken before: every ``seconds`` of the records counts it.
    """

    def __init__(self, spec_path: str, engine: str, loading_seconds: float = 0.0) -> None:
        with open(spec_path, encoding="utf-8") as file:
            self.spec: dict[str, Any] = json.load(file)
        self.engine = engine
        self.version = ""
        self._out = open(self.spec["records"], "a", encoding="utf-8")  # noqa: SIM115
        self._began = time.monotonic() - loading_seconds
        self._lock = threading.Lock()
        self._nvml: Any = None
        self._handle: Any = None
        self._peak = 0
        self._stop = False
        self.items: dict[str, dict[str, Any]] = {}

    # -- records --------------------------------------------------------------------------------

    def emit(self, kind: str, **fields: Any) -> None:  # noqa: ANN401
        """Append one record, at once."""
        seconds = round(time.monotonic() - self._began, 3)
        text = json.dumps({"type": kind, "seconds": seconds, **fields}, default=str)
        with self._lock:
            self._out.write(text + "\n")
            self._out.flush()

    def begin(self, version: str) -> None:
        """Say which engine starts; start reading memory.

        Raises
        ------
        Moved
            For a version whose internals are not known.
        """
        known = VERSIONS[self.engine]
        if version not in known:
            raise Moved(
                f"{self.engine} {version} is installed; this adapter knows {', '.join(known)}"
            )
        wanted = self.spec.get("version")
        if wanted is not None and wanted != version:
            raise Moved(f"{self.engine} {version} is installed; strategy.version={wanted}")
        self.version = version
        import pynvml
        import torch

        pynvml.nvmlInit()
        self._nvml = pynvml
        uuid = self.spec.get("gpu_uuid")
        self._handle = (
            pynvml.nvmlDeviceGetHandleByUUID(uuid.encode())
            if uuid
            else pynvml.nvmlDeviceGetHandleByIndex(0)
        )
        self.emit(
            "began",
            engine=self.engine,
            version=version,
            torch=str(torch.__version__),
            python=sys.version.split()[0],
            nvml_used_bytes=self.nvml_used(),
        )
        threading.Thread(target=self._poll, daemon=True).start()
        torch.cuda.init()
        torch.cuda.memory._record_memory_history(
            enabled="all", context="alloc", stacks="python", max_entries=HISTORY_ENTRIES
        )

    def phase(self, name: str, step: str = "") -> dict[str, Any]:
        """Record every meter at the end of a phase; returns the reading."""
        reading = self.reading()
        self.emit("phase", phase=name, step=step or name, **reading)
        return reading

    def item(
        self,
        phase: str,
        name: str,
        nbytes: int,
        shape: str = "",
        location: str = "device",
        count: int = 1,
        how: str = "tensor",
    ) -> None:
        """Record one allocation of the engine, by the name that its emulation gives it."""
        fields = {
            "phase": phase,
            "name": name,
            "bytes": int(nbytes),
            "count": int(count),
            "shape": shape,
            "location": location,
            "how": how,
        }
        self.items[name] = fields
        self.emit("item", **fields)

    def tensor(self, phase: str, name: str, value: Any, count: int = 1) -> None:  # noqa: ANN401
        """Record one of ``count`` equal tensors."""
        dtype = str(value.dtype).replace("torch.", "")
        shape = f"{dtype} [{', '.join(str(n) for n in value.shape)}]"
        location = "device"
        if value.device.type == "cpu":
            location = "host_pinned" if value.is_pinned() else "host"
        nbytes = count * value.numel() * value.element_size()
        self.item(
            phase, name, nbytes, f"{count} x {shape}" if count > 1 else shape, location, count
        )

    def ready(self, **fields: Any) -> None:  # noqa: ANN401
        """Record that the engine is ready; ``fields`` are what it would serve."""
        import torch

        torch.cuda.synchronize()
        self._stop = True
        reading = self.reading()
        self.emit("held", lines=held(self.engine))
        self.emit("ready", nvml_peak_bytes=self._peak, **reading, **fields)

    # -- meters ---------------------------------------------------------------------------------

    def nvml_used(self) -> int:
        """Bytes in use on the GPU, as nvidia-smi counts them."""
        used = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used)
        self._peak = max(self._peak, used)
        return used

    def _poll(self) -> None:
        while not self._stop:
            self.nvml_used()
            time.sleep(POLL_SECONDS)

    def reading(self) -> dict[str, Any]:
        """NVML's, CUDA's and torch's figures at this moment."""
        import torch

        free, total = torch.cuda.mem_get_info()
        return {
            "nvml_used_bytes": self.nvml_used(),
            "device_free_bytes": int(free),
            "device_used_bytes": int(total - free),
            "torch_allocated_bytes": int(torch.cuda.memory_allocated()),
            "torch_reserved_bytes": int(torch.cuda.memory_reserved()),
            "torch_peak_reserved_bytes": int(torch.cuda.max_memory_reserved()),
        }

    def graphs_bytes(self) -> int:
        """What CUDA graphs may hold: the driver's memory beyond torch's, torch's private pools."""
        import torch

        free, total = torch.cuda.mem_get_info()
        driver = int(total - free) - int(torch.cuda.memory_reserved())
        pools = [
            int(segment["total_size"])
            for segment in torch.cuda.memory_snapshot()
            if tuple(segment.get("segment_pool_id", DEFAULT_POOL)) != DEFAULT_POOL
        ]
        return driver + sum(pools)

    # -- internals ------------------------------------------------------------------------------

    def get(self, owner: Any, path: str) -> Any:  # noqa: ANN401
        """An attribute of an attribute …; :class:`Moved` where one is missing."""
        found = owner
        for name in path.split("."):
            if not hasattr(found, name):
                what = type(owner).__name__
                raise Moved(f"{self.engine} {self.version}: {what}.{path} is not where it was")
            found = getattr(found, name)
        return found

    def wrap(
        self,
        owner: Any,  # noqa: ANN401
        name: str,
        before: Callable[[Any], None] | None = None,
        after: Callable[[Any], None] | None = None,
    ) -> None:
        """Have a method of a class tell us when it begins and ends; both are given the object."""
        original = self.get(owner, name)

        def told(this: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if before is not None:
                before(this)
            result = original(this, *args, **kwargs)
            if after is not None:
                after(this)
            return result

        setattr(owner, name, told)

    # -- failures -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def guarded(
        self,
        refusals: tuple[str, ...],
        name_of: Callable[[Frames], str],
        on_failure: Callable[[], dict[str, int]],
    ) -> Iterator[None]:
        """Turn whatever a start raises into a ``failed`` record.

        Parameters
        ----------
        refusals : tuple of str
            How the messages begin with which the engine itself declines for want of memory.
        name_of : callable
            Names an allocation by the frames of its stack, innermost first.
        on_failure : callable
            Records the items that were made before it; returns how many equal tensors the
            allocations of a name consist of, where that is known.
        """
        try:
            yield
        except BaseException as error:
            traceback.print_exc()
            pieces: dict[str, int] = {}
            with contextlib.suppress(Exception):
                pieces = on_failure()
            self._failed(error, refusals, name_of, pieces)

    def _failed(
        self,
        error: BaseException,
        refusals: tuple[str, ...],
        name_of: Callable[[Frames], str],
        pieces: dict[str, int],
    ) -> None:
        chain = list(causes(error))
        root = next((e for e in chain if type(e).__name__ == "OutOfMemoryError"), None)
        how = "oom" if root is not None else "crash"
        refused = next((e for e in chain if str(e).startswith(refusals)), None)
        if root is None and refused is not None:
            root, how = refused, "refused"
        root = root or error
        frames = traceback_frames(root)
        fields: dict[str, Any] = {}
        with contextlib.suppress(Exception):
            fields |= self.reading()
        if how == "oom":
            fields |= asked(str(root))
            recorded = fields.pop("frames", None)
            frames = recorded or frames
            name = fields["allocation"] = name_of(frames)
            if name in pieces and "asked_bytes" in fields:
                fields["whole_bytes"] = pieces[name] * fields["asked_bytes"]
        with contextlib.suppress(Exception):
            self.emit("held", lines=held(self.engine, name_of))
        self.emit(
            "failed",
            how=how,
            error_type=type(root).__name__,
            message=str(root)[:MESSAGE_CHARS],
            where=where(frames[0], self.engine) if frames else "",
            stack=[where(f, self.engine) for f in frames[:8]],
            nvml_peak_bytes=self._peak,
            **fields,
        )


def record_start(
    engine: str,
    make: Callable[[Recorder], Any],
    refusals: tuple[str, ...],
    name_of: Callable[[Frames], str],
) -> None:
    """Start the engine that the awaited spec describes, and end; the records say how it went.

    Parameters
    ----------
    engine : str
        As for :class:`Recorder`.
    make : callable
        Makes the start, an object with ``run()`` and ``failed()``, from its recorder.
    refusals, name_of
        As for :meth:`Recorder.guarded`.
    """
    from awaited import awaited_spec

    path, loading_seconds = awaited_spec()
    if not path:  # no start is wanted any more
        return
    recorder = Recorder(path, engine, loading_seconds)
    start = make(recorder)
    with recorder.guarded(refusals, name_of, start.failed):
        start.run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads and the engine's own children are ended by our keeper
