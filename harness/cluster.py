"""A sweep spread by Hydra's own launchers: a job an arm, all their rows in one folder.

``python -m harness -m hydra/launcher=slurm ...`` makes the sweep's folder, lets Hydra's launcher
run :func:`run_arm` once an arm (each writes ``jobs/<arm>/``), and takes the rows in. The folder
must lie where every job can write. Trials that need GPUs never share one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from harness import provenance
from harness.arms import settings_of_command
from harness.compose import compose_config, conf_dir
from harness.earlier import read_runs, without
from harness.folder import (
    FolderError,
    Outcome,
    RunFolder,
    find_or_create,
    read_manifest,
    write_atomic,
)
from harness.hardware import Hardware
from harness.launcher_keys import check_launcher
from harness.lock import Busy, device_lock
from harness.ranks_relay import devices_here
from harness.settings import Settings
from harness.sizes import BadValue, printable
from harness.validate import settings_of
from harness.visible_gpus import gpu_count

# Our option, the plugin's module, and the package that brings it.
PLUGINS = {
    "slurm": ("hydra_submitit_launcher", "hydra-submitit-launcher"),
    "submitit": ("hydra_submitit_launcher", "hydra-submitit-launcher"),
    "processes": ("hydra_joblib_launcher", "hydra-joblib-launcher"),
    "ray_cluster": ("hydra_ray_launcher", "hydra-ray-launcher"),
    "basic": ("", ""),
}
PLAN = "cluster.json"
WAIT_SECONDS = 1.0


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The harness's own words, and those about Hydra's launchers.

    Raises
    ------
    BadValue
        For a launcher that is unknown or whose plugin is not installed.
    """
    ours = [w for w in words if not w.startswith(("hydra/launcher=", "hydra.launcher."))]
    hydra = [w for w in words if w not in ours]
    chosen = [w.partition("=")[2] for w in hydra if w.startswith("hydra/launcher=")]
    if hydra and len(chosen) != 1:
        raise BadValue("hydra/launcher", ", ".join(chosen), f"one of {', '.join(PLUGINS)}")
    for name in chosen:
        if name not in PLUGINS:
            raise BadValue("hydra/launcher", name, ", ".join(PLUGINS))
        module, package = PLUGINS[name]
        if module and importlib.util.find_spec(f"hydra_plugins.{module}") is None:
            raise BadValue("hydra/launcher", name, f"after pip install {package}")
    return ours, hydra


def launch(overrides: Sequence[str], hydra: Sequence[str], words: Sequence[str]) -> int:
    """Run every arm as a job; the exit status.

    Parameters
    ----------
    overrides, hydra : sequence of str
        As :func:`split_words` gives them.
    words : sequence of str
        The whole command line, for the manifest.

    Raises
    ------
    BadValue, FolderError
    """
    from harness.session import begin, finish

    # Composed for the planner: the devices are those of the jobs' machines.
    arms = settings_of_command(overrides, multirun=True, planning=True)
    check_launcher(hydra)
    experiment, digest = arms[0].experiment, provenance.config_hash(arms)
    folder, resumed = find_or_create(Path(arms[0].results).resolve(), experiment, digest)
    print(f"results  {folder.path}" + (f" (resumed, {len(folder.rows)} rows)" if resumed else ""))
    begin(folder, arms, list(words), experiment)
    folder.write_json(PLAN, {"arms": [list(s.overrides) for s in arms]})
    missing = [i for i in range(len(arms)) if not _finished(_job(folder.path, i))]
    status = _through_hydra(folder.path, missing, hydra) if missing else 0
    _gather(folder, len(arms))
    lost = [i for i in range(len(arms)) if not _finished(_job(folder.path, i))]
    for index in lost:
        print(f"harness: job {index}: {_complaint(folder.path, index)}", file=sys.stderr)
    if lost:
        print(f"harness: {len(lost)} of {len(arms)} jobs are missing; the same command resumes")
        return status or 1
    manifest = folder.manifest() | {"jobs": _manifests(folder.path, len(arms))}
    folder.write_json("manifest.json", manifest)
    for name in ("jobs", "hydra"):
        shutil.rmtree(folder.path / name, ignore_errors=True)
    return 0 if finish(folder, arms) else 1


def _job(folder: Path, index: int) -> Path:
    return folder / "jobs" / str(index)


def _finished(path: Path) -> bool:
    return bool(read_manifest(path).get("finished_utc"))


def _manifests(folder: Path, count: int) -> list[dict[str, Any]]:
    """What each job says of the machine it ran on."""
    keep = ("started_utc", "finished_utc", "hardware", "gpus", "gpus_after", "versions", "host")
    found = [read_manifest(_job(folder, i)) for i in range(count)]
    return [{k: m[k] for k in keep if k in m} for m in found]


def _complaint(folder: Path, index: int) -> str:
    path = _job(folder, index) / "error.txt"
    return printable(path.read_text()) if path.exists() else "did not end"


def _gather(folder: RunFolder, count: int) -> None:
    """Take the rows of finished jobs into the sweep's folder."""
    paths = [_job(folder.path, i) for i in range(count)]
    done = [str(p) for p in paths if _finished(p) and (p / "trials.csv").exists()]
    found = read_runs(done)
    fresh = without(found, folder.rows)
    mine = {"run_id": folder.run_id}
    rows, timeline = ([r | mine for r in part] for part in (fresh.rows, fresh.timeline))
    if rows:
        folder.add(Outcome(rows, timeline, fresh.samples))


def _through_hydra(folder: Path, arms: Sequence[int], words: Sequence[str]) -> int:
    """Hand the arms to Hydra's launcher and wait for all of them."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    quoted = str(folder).replace("\\", "\\\\").replace("'", "\\'")
    every = ",".join(str(i) for i in arms)
    own, sys.argv = sys.argv, ["harness", "-m", f"folder='{quoted}'", f"arm={every}", *words]
    try:
        hydra.main(config_path=str(conf_dir()), config_name="cluster", version_base="1.3")(
            run_arm
        )()
    except SystemExit as ended:  # Hydra has said why
        return ended.code if isinstance(ended.code, int) else 1
    finally:
        sys.argv = own
        GlobalHydra.instance().clear()
    return 0


def run_arm(config: DictConfig) -> None:
    """One job: an arm's trials, on devices of its own, into ``jobs/<arm>/``."""
    from harness.session import run_job

    folder, index = Path(str(config.folder)), int(config.arm)
    words = [str(w) for w in json.loads((folder / PLAN).read_text())["arms"][index]]
    path = _job(folder, index)
    path.mkdir(parents=True, exist_ok=True)
    try:
        with own_devices(words) as settings:
            mine = RunFolder(path)
            mine.recover()
            run_job(mine, settings, words)
            mine.close()
    except (BadValue, FolderError, Busy, BlockingIOError) as error:
        write_atomic(path / "error.txt", printable(error))


@contextlib.contextmanager
def own_devices(words: Sequence[str]) -> Iterator[Settings]:
    """Settings on GPUs that no other harness has; waits for them. The scale model needs none.

    The first GPUs that are free are taken, unless ``hardware.index`` names them.
    """
    config = compose_config(words)
    first = settings_of(config, words)
    if first.on_host or first.parallel.planned:
        yield first
        return
    named = any(w.startswith("hardware.index=") for w in words)
    last = gpu_count() - first.parallel.processes
    indices = [first.hardware.index] if named else list(range(max(0, last) + 1))
    candidates = []
    for index in indices:
        config.hardware.index = index
        candidates.append(devices_here(settings_of(config, words)))
    with contextlib.ExitStack() as held:
        config.hardware.index = indices[first_free(held, candidates)]
        yield settings_of(config, words)  # read again: what is free, now that it is ours


def first_free(held: contextlib.ExitStack, candidates: Sequence[Sequence[Hardware]]) -> int:
    """Lock the first of some sets of devices that is free, waiting for one; its number."""
    while True:
        for number, devices in enumerate(candidates):
            with contextlib.suppress(Busy):
                held.enter_context(device_lock(*devices))
                return number
        time.sleep(WAIT_SECONDS)
