"""One command from its settings to its folder: lock, resume, run, summary, figures, words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import forecast, provenance
from harness.earlier import read_runs, without
from harness.folder import RunFolder, find_or_create
from harness.lock import device_lock
from harness.progress import Progress
from harness.ranks_relay import devices_here
from harness.ranks_summary import per_trial
from harness.rows import own_crash
from harness.run import Run
from harness.settings import Settings
from harness.summary import summarise


def run_session(settings: list[Settings], words: list[str], results: Path) -> bool:
    """Run everything, write everything, print what a person wants to know.

    Returns
    -------
    bool
        Whether every trial ended in a recorded status that is no fault of the harness.

    Raises
    ------
    BadValue
        Before anything is written, when the planner or a strategy does not know a flag's value.
    """
    for one in settings:
        forecast.check(one)
    earlier = read_runs(settings[0].claims_from, rows_only=True)
    devices = [d for s in settings if not s.claims_from for d in devices_here(s)]
    experiment = settings[0].experiment
    digest = provenance.config_hash(settings)
    with device_lock(*devices):
        folder, resumed = find_or_create(results, experiment, digest, provenance.hash_in)
        _announce(folder, settings, resumed)
        begin(folder, settings, words, experiment)
        if settings[0].claims_from:
            folder.add(without(earlier, folder.rows))
        else:
            _measure(folder, settings)
        return finish(folder, settings)


def run_job(folder: RunFolder, settings: Settings, words: list[str]) -> None:
    """The trials of one job of a sweep over a cluster, into a folder of its own."""
    forecast.check(settings)
    begin(folder, [settings], words, settings.experiment)
    _measure(folder, [settings])
    ended = {"gpus_after": provenance.gpus(), "finished_utc": provenance.now_utc()}
    folder.write_json("manifest.json", folder.manifest() | ended)


def _announce(folder: RunFolder, settings: list[Settings], resumed: bool) -> None:
    hardware = settings[0].hardware
    what = (
        f"scale model of an {hardware.device_name}, {scales(settings)}, real bytes on this "
        "machine; OOM points transfer, speeds do not"
        if settings[0].on_host
        else hardware.device_name
    )
    parallel = settings[0].parallel
    talk = f", through {parallel.backend}" if parallel.backend else ""
    what += f"; {parallel.processes} of {parallel.ranks} ranks run{talk}"
    if settings[0].claims_from:
        print(f"rows     of {', '.join(settings[0].claims_from)}; no trial is run")
    else:
        print(f"device   {what}")
    was = f" (resumed, {len(folder.rows)} rows)" if resumed else ""
    print(f"results  {folder.path}{was}", flush=True)


def scales(settings: list[Settings]) -> str:
    """``1:192``; where models have scales of their own, ``1:192 (report), 1:96 (…)``."""
    models: dict[int, list[str]] = {}
    for one in settings:
        own = models.setdefault(one.scale, [])
        if one.model.name not in own:
            own.append(one.model.name)
    if len(models) == 1:
        return f"1:{settings[0].scale}"
    return ", ".join(f"1:{scale} ({', '.join(own)})" for scale, own in models.items())


def begin(folder: RunFolder, settings: list[Settings], words: list[str], experiment: str) -> None:
    """Write the manifest and the resolved configuration; an attempt more when it is resumed."""
    manifest = folder.manifest()
    if manifest:
        before = manifest.get("attempts")
        before = before if isinstance(before, list) else []
        manifest["attempts"] = [*before, provenance.attempt(settings)]
    else:
        manifest = provenance.manifest(folder.run_id, settings, words, experiment)
    folder.write_json("manifest.json", manifest)
    folder.write_text("config.yaml", config_yaml(settings))


def config_yaml(settings: list[Settings]) -> str:
    """The resolved settings of every arm."""
    from omegaconf import OmegaConf

    from harness.settings import to_json

    return OmegaConf.to_yaml(OmegaConf.create({"arms": [to_json(s) for s in settings]}))


def _measure(folder: RunFolder, settings: list[Settings]) -> None:
    progress = Progress(settings)
    try:
        Run(folder, settings, progress, on_row=progress.row).execute()
        progress.done()
    except KeyboardInterrupt:
        folder.write_json("summary.json", summarise(folder.rows, []))
        raise
    finally:
        progress.close()


def _beside_engines(folder: RunFolder, settings: list[Settings]) -> dict[str, Any]:
    """What engines that were started held, beside their emulations and the planner."""
    from harness.engines.pairs import brackets_of, pairs_of

    found = read_runs([str(folder.path)])
    return {
        "pairs": pairs_of(found.rows, found.timeline, found.samples, settings),
        "engine_brackets": brackets_of(found.rows, settings),
    }


def finish(folder: RunFolder, settings: list[Settings]) -> bool:
    """Sum up, draw and tell; whether no trial ended by a fault of the harness."""
    from harness.claims import decide
    from harness.outcome import draw, tell

    summary: dict[str, Any] = summarise(folder.rows, [])
    summary["claims"] = decide(per_trial(folder.rows))
    if any(s.engine for s in settings):
        summary |= _beside_engines(folder, settings)
    folder.write_json("summary.json", summary)
    manifest = folder.manifest()
    manifest["gpus_after"] = provenance.gpus()
    manifest["finished_utc"] = provenance.now_utc()
    figures = draw(folder, summary, manifest)
    folder.write_json("manifest.json", manifest)
    tell(folder, settings, summary, figures)
    if settings[0].claims_from:  # how those trials ended was their own run's to say
        return True
    died = [r for r in per_trial(folder.rows) if r["status"] == "crash" and not r.get("signal")]
    return all(map(own_crash, died))
