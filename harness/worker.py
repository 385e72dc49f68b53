"""The process of one trial: ``python -m harness.worker SPEC`` (started by the harness).

``--wait PARENT`` instead of SPEC loads the libraries and reads the SPEC's path from standard input.
Reads the cells from SPEC (JSON), runs them, and appends records to the file that SPEC names, one
JSON object a line, each flushed as it happens: what a killed trial had reached is not lost.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from harness.cell import cell_from_json
from harness.oom_killer import oom_kills
from harness.ranks import Place
from harness.ranks_control import Control, Emit
from harness.ranks_pulse import Counters
from harness.trial import Trial

PR_SET_PDEATHSIG = 1
NEEDED = (
    "torch",
    "triton",
    "harness.measure",
    "kernels.ops",
    "kernels.warm",
    "strategies.device_cuda",
)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the harness dies: no orphan measures on."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os._exit(1)


def awaited_spec(parent: int) -> str | None:
    """Load what a trial on a GPU needs, then wait for the path of its spec; None: not needed."""
    die_with_parent(parent)
    for library in NEEDED:
        importlib.import_module(library)
    path = sys.stdin.readline().strip()
    if not path:
        return None
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(json.loads(Path(path).read_text())["log"], os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    return path


def _team(spec: dict[str, Any], emit: Emit) -> Control | None:
    """The ranks that this process is one of; None for a rank by itself."""
    team = spec.get("team")
    if team is None:
        return None
    counters = Counters(Path(team["counters"]))
    return Control(Place(**team["place"]), emit, counters=counters)


def main(path: str) -> int:
    """Run the trial that a spec file describes."""
    spec = json.loads(Path(path).read_text())
    die_with_parent(spec["parent"])
    with open(spec["records"], "a", encoding="utf-8") as out:

        def emit(record: dict[str, Any]) -> None:
            out.write(json.dumps(record) + "\n")
            out.flush()

        try:
            emit({"type": "began", "oom_kills": oom_kills()})
            cells = [cell_from_json(c) for c in spec["cells"]]
            Trial(cells, emit, spec["extra"], _team(spec, emit)).run()
        except Exception as error:  # the harness turns this into a row with status=crash
            emit({"type": "error", "error": f"{type(error).__name__}: {error}"})
            traceback.print_exc()
            return 1
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "--wait":
        found = awaited_spec(int(sys.argv[2]))
        sys.exit(0 if found is None else main(found))
    sys.exit(main(sys.argv[1]))
