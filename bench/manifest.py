"""Where a result file comes from: ``manifest.json`` beside it, as a run of the harness has one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.hardware import seen_gpu
from harness.provenance import installed, now_utc, surroundings
from harness.runs import clean, dicts, lookup, write_file

NAME = "manifest.json"
PEER_PACKAGES = ("flashinfer-python", "apache-tvm-ffi", "nvidia-cudnn-frontend")


class Manifest:
    """Written at the beginning, and again with the GPU's clocks at the end.

    One without ``finished_utc`` is of a result file whose making was cut off.
    """

    def __init__(self, results: Path, argv: Sequence[str], seed: int) -> None:
        gpu = seen_gpu()
        self.path = results.parent / NAME
        self.content: dict[str, Any] = {
            "schema": 1,
            "results": results.name,
            "started_utc": now_utc(),
            "finished_utc": None,
            "argv": list(argv),
            "command": shlex.join(["python", "-m", "bench.attention", *argv]),
            **surroundings(),
            "gpu_uuid": gpu.uuid if gpu else "",
            "seeds": [seed],
        }
        self._write()

    def finish(self, peers: dict[str, str]) -> None:
        """Close it; ``peers`` says of each peer what was loaded, or why it was not."""
        later = surroundings()
        self.content |= {
            "peers": peers | installed(PEER_PACKAGES),
            "gpus_after": later["gpus"],
            "finished_utc": now_utc(),
        }
        self._write()

    def _write(self) -> None:
        write_file(self.path, json.dumps(self.content, indent=1) + "\n")


def beside(results: Path) -> dict[str, Any]:
    """The manifest of a result file; empty where there is none of it."""
    try:
        content = json.loads((results.parent / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    mine = isinstance(content, dict) and content.get("results") == results.name
    return content if mine else {}


def cited(results: Path) -> list[str]:
    """What a page says of where a result file comes from, besides its rows."""
    content = beside(results)
    if not content:
        return []
    commit = clean(lookup(content, "git", "commit", default=""))[:12]
    dirty = " with uncommitted changes" if lookup(content, "git", "dirty") else ""
    ours = [g for g in dicts(content, "gpus") if g.get("uuid") == content.get("gpu_uuid")]
    parts = [f"commit `{commit}`{dirty}" if commit else "no commit known"]
    for gpu in ours[:1]:
        parts += [f"driver {clean(gpu.get('driver'))}", f"`{clean(gpu['uuid'])}`"]
    if not content.get("finished_utc"):
        parts.append("cut off before its end")
    return parts
