"""Stacks of allocations: which line of an engine holds memory, and which asked for too much.

Runs inside an engine's own Python and imports nothing of the harness.
"""

from __future__ import annotations

import contextlib
import linecache
import os
import re
import traceback

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Frames = list[dict[str, Any]]

MIB = 1 << 20
HELD_LEAST_BYTES = 16 * MIB
HELD_LINES = 24
# Frames of these files only pass an allocation on.
_PASSING = ("/torch/", "<frozen", "/contextlib.py", "/threading.py", "/runpy.py", "??")
_NAME = re.compile(r"""(?:self\.(\w+)\s*(?::[^=]+)?=[^=]|["'](\w+)["']\s*:)""")
_ASKED = re.compile(r"Tried to allocate ([\d.]+) (KiB|MiB|GiB)")
_FREE = re.compile(r"of which ([\d.]+) (KiB|MiB|GiB) is free")
_UNITS = {"KiB": 1 << 10, "MiB": MIB, "GiB": 1 << 30}


def asked(message: str) -> dict[str, Any]:
    """Bytes that an allocation asked for and that were free, exactly where torch tells."""
    found: dict[str, Any] = {}
    for key, pattern in (("asked_bytes", _ASKED), ("free_bytes", _FREE)):
        said = pattern.search(message)
        if said:
            found[key] = int(float(said[1]) * _UNITS[said[2]])
    with contextlib.suppress(Exception):
        import torch

        traces = torch.cuda.memory._snapshot()["device_traces"]
        last = [e for trace in traces for e in trace if e["action"] == "oom"][-1]
        found["asked_bytes"] = int(last["size"])
        if last.get("device_free") is not None:
            found["free_bytes"] = int(last["device_free"])
        found["frames"] = own_frames(last.get("frames", []))
    return found


def held(engine: str, name_of: Callable[[Frames], str] | None = None) -> list[dict[str, Any]]:
    """Live allocations by source line, largest first, from torch's own snapshot."""
    import torch

    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for segment in torch.cuda.memory._snapshot()["segments"]:
        for block in segment["blocks"]:
            if block["state"] != "active_allocated":
                continue
            frames = own_frames(block.get("frames", []))
            stack = tuple(where(f, engine) for f in frames[:4])
            one = groups.setdefault(
                stack, {"bytes": 0, "count": 0, "name": name_of(frames) if name_of else ""}
            )
            one["bytes"] += int(block.get("requested_size", block["size"]))
            one["count"] += 1
    lines = [
        {"where": stack[0] if stack else "unknown", "stack": list(stack), **one}
        for stack, one in groups.items()
        if one["bytes"] >= HELD_LEAST_BYTES
    ]
    return sorted(lines, key=lambda line: -line["bytes"])[:HELD_LINES]


def where(frame: dict[str, Any], engine: str) -> str:
    """A frame as ``file:line function``, the file within the engine's package."""
    path = str(frame["filename"])
    _, found, rest = path.rpartition(f"/{engine}/")
    return f"{rest if found else os.path.basename(path)}:{frame['line']} {frame['name']}"


def source_line(frames: Frames) -> str:
    """Name an allocation that has no other name by where it stands."""
    if not frames:
        return ""
    return f"{os.path.basename(str(frames[0]['filename']))}:{frames[0]['line']}"


def source_name(frame: dict[str, Any]) -> str:
    """What a line of source assigns: ``self.NAME = …`` or ``"NAME": …``; ``""`` for neither."""
    text = linecache.getline(str(frame["filename"]), int(frame["line"]))
    found = _NAME.search(text)
    return (found[1] or found[2]) if found else ""


def own_frames(frames: Frames) -> Frames:
    """Frames that are not torch's own, innermost first."""
    return [f for f in frames if f["filename"] and not any(p in f["filename"] for p in _PASSING)]


def traceback_frames(error: BaseException) -> Frames:
    """Frames of the engine in which an error arose, innermost first."""
    found = traceback.extract_tb(error.__traceback__)
    return own_frames(
        [{"filename": f.filename, "line": f.lineno, "name": f.name} for f in found[::-1]]
    )


def causes(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it, each once."""
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__
