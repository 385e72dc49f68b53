"""Keeps one engine: ``python -m harness.engines.keeper PARENT PYTHON ADAPTER``.

Starts the engine in a process group of its own, reads the path of its spec from standard input,
ends the engine when its time is up, when it is told to (SIGTERM), when the input ends without a
spec or when the harness (PARENT) dies, and leaves no process of it behind: orphans of the engine
are re-parented to the keeper, whatever session they went to, and killed. Imports nothing but the
standard library: it must start at once and hold no memory. The engine is given neither our
PYTHONPATH nor our working folder: packages of ours have names that others look for (``kernels``).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harness.oom_killer import oom_kills

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
POLL_SECONDS = 0.05
# A killed process gives 140 GiB of a GPU, and pinned host memory, back before it is gone.
REAP_SECONDS = 60.0


def main(parent: int, command: list[str]) -> int:
    """Start the engine, wait for the spec, hand it over, and record how the engine ended."""
    told: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before the call
        return 1
    engine = fault = None
    try:
        engine = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            cwd="/",
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
            start_new_session=True,
            preexec_fn=_die_with_keeper,
        )
    except OSError as error:
        fault = f"{command[0]}: cannot be started ({error.strerror})"
    path = sys.stdin.readline().strip()
    if not path:  # no start is wanted any more
        _end(engine)
        return 0
    spec: dict[str, Any] = json.loads(Path(path).read_text())
    before = oom_kills()
    began = time.monotonic()
    ended: dict[str, Any] = {"code": 127, "timed_out": False, "left": 0}
    if engine is None:
        print(fault, flush=True)
    else:
        assert engine.stdin is not None
        with contextlib.suppress(OSError):  # it has died; how is read below
            engine.stdin.write(f"{spec['start']}\n".encode())
            engine.stdin.close()
        while engine.poll() is None and not told:
            if time.monotonic() - began > spec["timeout_seconds"]:
                ended["timed_out"] = True
                break
            time.sleep(POLL_SECONDS)
        ended["left"] = _end(engine)
        ended["code"] = engine.returncode if engine.returncode is not None else -signal.SIGKILL
    kills = {"oom_kills_before": before, "oom_kills_after": oom_kills()}
    seconds = round(time.monotonic() - began, 3)
    record = {"type": "ended", "seconds": seconds, **ended, **kills}
    _drop_half_line(Path(spec["records"]))
    with open(spec["records"], "a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")
    return 0


def _end(engine: subprocess.Popen[bytes] | None) -> int:
    """End the engine and all that it started; how many it had left behind."""
    if engine is None:
        return 0
    running = engine.poll() is None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    if running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            engine.wait(REAP_SECONDS)
    return _end_children()


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value)


def _die_with_keeper() -> None:
    """In the engine, before it is executed: it dies with us, also when we are killed."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _drop_half_line(records: Path) -> None:
    """Drop what a killed engine had begun to write."""
    data = records.read_bytes() if records.exists() else b""
    if not data.endswith(b"\n"):
        records.write_bytes(data[: data.rfind(b"\n") + 1])


def _end_children() -> int:
    """Kill and reap every process that is left below us; how many there were."""
    ended = 0
    deadline = time.monotonic() + REAP_SECONDS
    while time.monotonic() < deadline:
        for child in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        try:
            child, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return ended
        ended += child != 0
        if not child:
            time.sleep(POLL_SECONDS)
    return ended


def _children() -> list[int]:
    """Processes whose parent we are, by choice or by adoption."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = (entry / "stat").read_text().rpartition(")")[2].split()[1]
                if int(parent) == os.getpid():
                    found.append(int(entry.name))
    return found


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
