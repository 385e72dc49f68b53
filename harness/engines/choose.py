"""Which engines are here to be started, and one line for each that is not."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.engines.adapters.versions import VERSIONS
from harness.planner_engines import ENGINES
from harness.sizes import BadValue

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from harness.settings import Settings


def install_line(engine: str) -> str:
    """What makes a Python that can start an engine."""
    version = VERSIONS[engine][-1]
    folder = f".venv-{engine}"
    return f"python -m venv {folder} && {folder}/bin/pip install {engine}=={version}"


def engine_of(conf: DictConfig, planning: bool = False) -> dict[str, Any]:
    """An arm's engine: the Python that starts it, or None where none is given.

    Raises
    ------
    BadValue
        For a Python that is none, or a strategy that is no engine.
    """
    engine = str(conf.strategy.name)
    if engine not in ENGINES:
        raise BadValue("strategy", engine, f"{', '.join(ENGINES)}: the engines that can be started")
    key, given = f"engine.{engine}.python", conf.engine[engine].python
    if given is None or planning:
        return {"python": None}
    allowed = f"null, or a Python with {engine} installed ({install_line(engine)})"
    if not isinstance(given, str) or not given.strip():
        raise BadValue(key, given, allowed)
    found = shutil.which(os.path.expanduser(given))
    if found is None:
        raise BadValue(key, given, allowed)
    return {"python": str(Path(found).absolute())}


def check_engine(settings: Settings) -> None:
    """Refuse what an engine cannot be started with here; raises :class:`BadValue`."""
    if settings.on_host:
        allowed = "a CUDA GPU: engines are started for real; experiment=root_cause emulates them"
        raise BadValue("hardware", settings.hardware.option, allowed)
    if settings.hardware.asked_bytes is not None:
        raise BadValue("hardware.capacity", settings.hardware.asked_bytes, "null: all of the GPU")
    if settings.model.local_layers:
        allowed = "a model without local layers: the stand-in is a plain one"
        raise BadValue("model", settings.model.name, allowed)
    if settings.parallel.processes > 1 or settings.parallel.context_ranks > 1:
        allowed = "one process, context_ranks=1: one rank is started"
        raise BadValue("parallel", settings.parallel.kind, allowed)
    if settings.workload["kind"] != "fill" or settings.sequences != 1:
        raise BadValue("workload", settings.workload["name"], "single, one sequence")
    version = settings.options.get("version")
    known = VERSIONS[settings.strategy]
    if version not in known:
        allowed = f"{', '.join(known)}: the versions that can be started"
        raise BadValue("strategy.version", version, allowed)


def chosen(settings: Sequence[Settings]) -> tuple[list[Settings], list[str]]:
    """The arms whose engine is here, and a line for each engine that is not.

    Raises
    ------
    BadValue
        When none is.
    """
    missing = [s.strategy for s in settings if s.engine and s.engine["python"] is None]
    names = list(dict.fromkeys(missing))
    kept = [s for s in settings if not s.engine or s.engine["python"] is not None]
    if not kept and names:
        keys = " or ".join(f"engine.{name}.python" for name in names)
        allowed = "a Python with the engine installed: " + "; ".join(map(install_line, names))
        raise BadValue(keys, None, allowed)
    lines = [
        f"skipped  {name}: engine.{name}.python is not set; {install_line(name)}" for name in names
    ]
    return kept, lines
