"""The keys of Hydra's launchers, looked at before a sweep's folder is made.

The plugins look at them only once they run, and then end in a traceback.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from harness.compose import conf_dir
from harness.sizes import BadValue

PREFIX = "hydra.launcher."
_TYPES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
# Numbers of which there is at least one; the other ones may be 0.
_COUNTS = ("timeout_min", "cpus_per_task", "tasks_per_node", "nodes", "mem_gb", "array_parallelism")


def check_launcher(words: Sequence[str]) -> None:
    """Check ``hydra/launcher=NAME`` and every ``hydra.launcher.KEY=VALUE``.

    Raises
    ------
    BadValue
        For a key that the launcher lacks, a value that it cannot take, and Slurm where there is
        none.
    """
    (chosen,) = [w for w in words if not w.startswith(PREFIX)]
    name = chosen.partition("=")[2]
    if name == "slurm" and shutil.which("srun") is None:
        raise BadValue("hydra/launcher", name, "where srun is: this is no Slurm cluster")
    known = _composed([chosen])
    for word in words:
        if word != chosen:
            _check_word(word, chosen, known)
    for key, value in _composed(words).items():
        _check_number(str(key), value)


def _check_word(word: str, chosen: str, known: dict[Any, Any]) -> None:
    from hydra.errors import HydraException

    key, _, value = word.partition("=")
    keys = sorted(str(k) for k in known if not str(k).startswith("_"))
    if key.removeprefix(PREFIX).partition(".")[0] not in keys:
        raise BadValue(key, value, f"keys of {chosen}: {', '.join(keys) or 'none'}")
    try:
        _composed([chosen, word])
    except HydraException as error:
        wanted = re.search(r"converted to (\w+)", str(error.__cause__ or error))
        allowed = _TYPES.get(wanted[1]) if wanted else None
        raise BadValue(key, value, allowed or "what its plugin documents") from None


def _check_number(key: str, value: Any) -> None:  # noqa: ANN401
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if key == "n_jobs" and value == 0:
        raise BadValue(PREFIX + key, value, "jobs at a time, 1 or more; -1 is one a core")
    if key in _COUNTS and value < 1:
        raise BadValue(PREFIX + key, value, "1 or more")
    if key != "n_jobs" and value < 0:
        raise BadValue(PREFIX + key, value, "0 or more")


def _composed(words: Sequence[str]) -> dict[Any, Any]:
    """The launcher's part of a job's configuration."""
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        whole = compose("cluster", ["folder=.", *words], return_hydra_config=True)
    found = OmegaConf.to_container(whole.hydra.launcher)
    assert isinstance(found, dict)
    return found
