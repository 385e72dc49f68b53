"""Which device this is: a GPU that torch can use, or the scale model of one.

Looks without importing torch (its import takes seconds, a bracket trial on the host a tenth).
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from harness.sizes import BadValue, parse_bytes
from harness.visible_gpus import nvml_handle

if TYPE_CHECKING:
    from omegaconf import DictConfig

KINDS = ("auto", "cuda", "scale_model")
MAX_GPUS = 1024


@dataclass(frozen=True)
class Hardware:
    """The device that trials run on, or that the planner plans for.

    ``free_bytes`` is what is free at the start (on a GPU, before the CUDA context is made);
    ``capacity_bytes`` what a trial may use of it; both are the modelled device's bytes.
    """

    option: str
    kind: str  # cuda | scale_model
    device_name: str
    total_bytes: int
    free_bytes: int
    capacity_bytes: int
    context_bytes: int
    cuda_graph_bytes: int
    sm_count: int
    index: int
    uuid: str = ""

    @property
    def asked_bytes(self) -> int | None:
        """The capacity that was asked for; None for all that is free, which varies a little."""
        return self.capacity_bytes if self.capacity_bytes < self.free_bytes else None


@dataclass(frozen=True)
class GpuSeen:
    """What NVML says of one GPU."""

    name: str
    total_bytes: int
    free_bytes: int
    uuid: str


def torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build, read from its version file."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    text = (Path(spec.origin).parent / "version.py").read_text()
    return re.search(r"^cuda(: [^=]*)? = '[\d.]+'", text, re.MULTILINE) is not None


def seen_gpu(index: int = 0) -> GpuSeen | None:
    """What NVML sees of the GPU that CUDA calls ``index``; None without a driver or such a GPU."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # any failure to load the driver's library means: no GPU here
        return None
    try:
        handle = nvml_handle(pynvml, index)
        if handle is None:
            return None
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        return GpuSeen(
            _text(pynvml.nvmlDeviceGetName(handle)),
            int(memory.total),
            int(memory.free),
            _text(pynvml.nvmlDeviceGetUUID(handle)),
        )
    finally:
        pynvml.nvmlShutdown()


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def known_device(name: str) -> DictConfig:
    """The file of conf/hardware/ that describes a device."""
    from omegaconf import DictConfig, OmegaConf

    from harness.compose import conf_dir

    path = conf_dir() / "hardware" / f"{name}.yaml"
    devices = sorted(p.stem for p in path.parent.glob("*.yaml") if "total_bytes" in p.read_text())
    if name not in devices:
        raise BadValue("hardware.models", name, ", ".join(devices))
    loaded = OmegaConf.load(path)
    assert isinstance(loaded, DictConfig)
    return loaded


def resolve(conf: DictConfig, planning: bool = False) -> Hardware:
    """The device for a configuration.

    Parameters
    ----------
    conf : DictConfig
        The ``hardware`` group.
    planning : bool
        Plan for the configured device, whether it is here or not.

    Raises
    ------
    BadValue
        When the device is not here, or the capacity exceeds it.
    """
    index = int(conf.index)
    if not 0 <= index < MAX_GPUS:
        raise BadValue("hardware.index", index, f"0 to {MAX_GPUS - 1}")
    if conf.kind not in KINDS:
        raise BadValue("hardware.kind", conf.kind, ", ".join(KINDS))
    gpu = seen_gpu(index) if conf.kind != "scale_model" and torch_has_cuda() else None
    kind = str(conf.kind)
    if kind == "auto":
        kind = "cuda" if gpu is not None else "scale_model"
    if kind == "scale_model":
        described = known_device(str(conf.models))
    elif conf.kind == "auto":
        assert gpu is not None
        described = _by_device_name(gpu.name)
    else:
        described = conf
    _check(described)
    # A GPU is met before its context is made; the scale model models what a process then sees.
    bare = int(described.bare_context) if kind == "cuda" else 0
    free = int(described.free_bytes) + bare
    found = Hardware(
        option=str(conf.name),
        kind=kind,
        device_name=str(described.device_name),
        total_bytes=int(described.total_bytes),
        free_bytes=free,
        capacity_bytes=free,
        context_bytes=bare + parse_bytes(described.cuda_context, "hardware.cuda_context"),
        cuda_graph_bytes=parse_bytes(described.cuda_graph, "hardware.cuda_graph")
        if kind == "cuda"
        else 0,
        sm_count=int(described.sm_count),
        index=index,
    )
    if kind == "cuda" and not planning:
        found = _as_present(found, gpu, conf)
    return _capped(found, conf.capacity)


def _check(described: DictConfig) -> None:
    """A description that a user changed by keys still describes a device."""
    if not described.device_name:
        raise BadValue("hardware.kind", described.kind, "scale_model, or hardware=h200, h100")
    for key, value, top in (
        ("sm_count", described.sm_count, 4096),
        ("total_bytes", described.total_bytes, 1 << 44),
        ("free_bytes", described.free_bytes, described.total_bytes),
    ):
        if not 1 <= value <= top:
            raise BadValue(f"hardware.{key}", value, f"1 to {top}")


def _by_device_name(name: str) -> DictConfig:
    for option in ("h200", "h100"):
        described = known_device(option)
        if described.device_name == name:
            return described
    # An unknown GPU: the H200's description, with the numbers read off the device itself.
    return known_device("h200")


def _as_present(found: Hardware, gpu: GpuSeen | None, conf: DictConfig) -> Hardware:
    if gpu is None:
        raise BadValue(
            "hardware", conf.name, "a device that is here: hardware=scale_model needs no GPU"
        )
    if conf.kind == "cuda" and conf.device_name != gpu.name:
        raise BadValue("hardware", conf.name, f"auto or scale_model; this GPU is a {gpu.name}")
    return replace(
        found,
        device_name=gpu.name,
        total_bytes=gpu.total_bytes,
        free_bytes=gpu.free_bytes,
        capacity_bytes=gpu.free_bytes,
        uuid=gpu.uuid,
    )


def _capped(found: Hardware, capacity: object) -> Hardware:
    if capacity is None:
        return found
    wanted = parse_bytes(capacity, "hardware.capacity")
    if wanted > found.free_bytes:
        raise BadValue(
            "hardware.capacity", capacity, f"up to {found.free_bytes} bytes on {found.device_name}"
        )
    return replace(found, capacity_bytes=wanted)
