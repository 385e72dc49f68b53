"""Where a run's figures come from: what a stranger needs to repeat it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.safe_text import MAX_CONFIG_BYTES, read_text
from harness.settings import Settings, from_json, to_json

PACKAGES = (
    "torch triton numpy pandas matplotlib hydra-core omegaconf nvidia-ml-py cuda-bindings"
).split()
ENVIRONMENT_PREFIXES = ("CUDA_", "PYTORCH_", "TRITON_", "NCCL_")
MAX_DIFF_BYTES = 1 << 20
EXPORTED = ".git_archival.txt"


def now_utc() -> str:
    """ISO time, whole seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def config_hash(settings: list[Settings]) -> str:
    """Hash of every resolved configuration of a run.

    The results folder is no part of it, nor where an engine is installed, nor what a GPU happens
    to have free: a run that was killed is found again when another process holds a few bytes more.
    """
    content = []
    for one in settings:
        data = {
            k: v for k, v in to_json(one).items() if k not in ("results", "overrides", "engine")
        }
        data["hardware"].pop("free_bytes")
        data["hardware"]["capacity_bytes"] = one.hardware.asked_bytes
        if one.engine:
            data["hardware"].pop("uuid")
        content.append(data)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def settings_in(folder: Path) -> list[Settings]:
    """Every arm of the ``config.yaml`` that a folder holds, which is read as data.

    Raises
    ------
    AttributeError, LookupError, OSError, RecursionError, TypeError, ValueError, yaml.YAMLError
        When it holds no settings of a run.
    """
    import yaml  # type: ignore[import-untyped]

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # OmegaConf's takes twenty times as long
    text = read_text(folder / "config.yaml", "config.yaml", MAX_CONFIG_BYTES)
    found: Any = yaml.load(text, Loader=loader)
    return [from_json(arm) for arm in found["arms"]]


def hash_in(folder: Path) -> str:
    """The hash of the configuration that a folder holds; empty where there is none to be read."""
    from yaml import YAMLError

    try:
        return config_hash(settings_in(folder))
    except (
        *(OSError, AttributeError, LookupError, RecursionError, TypeError, ValueError),
        YAMLError,
    ):
        return ""


def manifest(
    run_id: str, settings: list[Settings], argv: list[str], experiment: str
) -> dict[str, Any]:
    """The manifest at a run's start; ``finished_utc`` is empty until its end."""
    return {
        "schema": 1,
        "run_id": run_id,
        "experiment": experiment,
        "started_utc": now_utc(),
        "finished_utc": None,
        "argv": argv,
        "command": " ".join(["python", "-m", "harness", *map(shlex.quote, argv)]),
        "config_hash": config_hash(settings),
        **surroundings(),
        "hardware": to_json(settings[0])["hardware"],
        "seeds": sorted({s.seed for s in settings}),
        "attempts": [attempt(settings)],
    }


def surroundings() -> dict[str, Any]:
    """What any measurement depends on: code, versions, GPUs, variables of the libraries."""
    return {
        "git": git_state(),
        "versions": versions(),
        "gpus": gpus(),
        "environment": {
            k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT_PREFIXES)
        },
    }


def attempt(settings: list[Settings]) -> dict[str, Any]:
    """One start of a run: a resumed one has several, perhaps of several commits or GPUs."""
    return {
        "started_utc": now_utc(),
        "pid": os.getpid(),
        "commit": git_state().get("commit", ""),
        "gpu_uuids": sorted({s.hardware.uuid for s in settings if s.hardware.uuid}),
    }


def versions() -> dict[str, str]:
    """Versions of everything that computes."""
    own = {"python": platform.python_version(), "kernel": platform.release()}
    return own | installed(PACKAGES)


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are there."""
    out = {}
    for package in packages:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def git_state() -> dict[str, Any]:
    """Commit, dirty flag and diff of the checkout that runs, or the commit that was exported."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            errors="replace",  # a diff may hold text of any encoding
            check=True,
            timeout=20,
        ).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()) != root:
            return _exported(root)
        commit = git("rev-parse", "HEAD").strip()
        diff = git("diff", "HEAD", "--", ".", ":!results")
        dirty = git("status", "--porcelain", "--", ".", ":!results").strip()
    except (OSError, subprocess.SubprocessError):
        return _exported(root)
    return {
        "commit": commit,
        "dirty": bool(dirty),
        "diff_sha": hashlib.sha256(diff.encode()).hexdigest()[:16] if diff else "",
        "diff": diff if 0 < len(diff) <= MAX_DIFF_BYTES else "",
    }


def _exported(root: Path) -> dict[str, Any]:
    """The commit of a ``git archive``, which writes it into a file; empty without one."""
    try:
        found = re.search(r"^node: ([0-9a-f]{40})$", (root / EXPORTED).read_text(), re.MULTILINE)
    except OSError:
        return {}
    return {"commit": found[1], "dirty": False, "exported": True} if found else {}


def gpus() -> list[dict[str, Any]]:
    """Every GPU as NVML sees it now: identity, memory, clocks, throttling, other processes."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver: no GPUs
        return []
    try:
        return [_gpu(pynvml, i) for i in range(pynvml.nvmlDeviceGetCount())]
    finally:
        pynvml.nvmlShutdown()


def _gpu(nvml: Any, index: int) -> dict[str, Any]:  # noqa: ANN401
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    readings: dict[str, Callable[[], Any]] = {
        "driver": lambda: nvml.nvmlSystemGetDriverVersion(),
        "name": lambda: nvml.nvmlDeviceGetName(handle),
        "uuid": lambda: nvml.nvmlDeviceGetUUID(handle),
        "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, 0),
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, 1),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, 2),
        "throttle_reasons": lambda: hex(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
        "ecc": lambda: nvml.nvmlDeviceGetEccMode(handle)[0],
        "mig": lambda: nvml.nvmlDeviceGetMigMode(handle)[0],
        "compute_processes": lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
    }
    out: dict[str, Any] = {
        "read_utc": now_utc(),
        "total_bytes": int(memory.total),
        "used_bytes": int(memory.used),
    }
    for name, read in readings.items():
        try:
            value = read()
        except nvml.NVMLError as error:
            value = f"not available ({error})"
        out[name] = value.decode() if isinstance(value, bytes) else value
    return out
