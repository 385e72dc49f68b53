"""Sweeps through Hydra's launchers on this machine, and GPUs that two jobs never share."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf

from harness import cluster, hardware, lock, ranks_relay, session
from harness.cli import main
from harness.cluster import first_free, split_words
from harness.compose import compose_config
from harness.hardware import Hardware
from harness.launcher_keys import check_launcher
from harness.runs import load_run
from harness.sizes import BadValue
from tests.harness.ranks_fixture import LIMIT_SECONDS, SMALL, processes_about, start

SWEEP = ("-m", "strategy=static,paged", *SMALL, "fill=0", "trial.timing=false")
GPU = Hardware("h200", "cuda", "NVIDIA H200", 1, 1, 1, 1, 0, 132, 0, "GPU-a")
GPU_0 = replace(GPU, uuid="GPU-0")


@pytest.mark.beside
@pytest.mark.parametrize("launcher", ["processes", "submitit", "ray_cluster"])
def test_jobs_of_a_sweep_land_in_one_folder(launcher, tmp_path):
    pytest.importorskip(f"hydra_plugins.{cluster.PLUGINS[launcher][0]}")
    words = [*SWEEP, f"results={tmp_path / 'runs'}", f"hydra/launcher={launcher}"]
    if launcher == "ray_cluster":
        words += [f"hydra.launcher.ray.remote.{what}" for what in ("num_cpus=1", "num_gpus=0")]
    process = start(["-m", "harness", *words], tmp_path)
    said = process.communicate(timeout=LIMIT_SECONDS)[0]
    assert process.returncode == 0, said
    (manifest,) = tmp_path.glob("runs/*/*/manifest.json")
    run = load_run(manifest.parent)
    assert sorted(run.rows["strategy"]) == ["paged", "static"]
    assert set(run.rows["run_id"]) == {manifest.parent.name}
    assert set(run.timeline["trial_id"]) == set(run.rows["trial_id"])
    assert set(run.summary["strategies"]) == {"paged", "static"}
    assert len(json.loads(manifest.read_text())["jobs"]) == 2
    assert not (manifest.parent / "jobs").exists()
    assert processes_about(tmp_path) == []


def test_a_job_that_fails_is_named_and_the_same_command_resumes(tmp_path, monkeypatch, capsys):
    words = [*SWEEP[1:], f"results={tmp_path}"]
    own, ran = cluster.run_arm, []

    def second_fails(config):
        if int(config.arm) == 1 and len(ran) < 2:
            path = Path(config.folder) / "jobs" / "1"
            path.mkdir(parents=True)
            (path / "error.txt").write_text("no such device")
        else:
            own(config)
        ran.append(int(config.arm))

    monkeypatch.setattr(cluster, "run_arm", second_fails)
    monkeypatch.setattr("harness.outcome.draw", lambda *drawn: [])  # figures are not its matter
    command = (words, ["hydra/launcher=basic"], ["-m", *words])
    assert cluster.launch(*command) == 1
    assert "job 1: no such device" in capsys.readouterr().err
    assert cluster.launch(*command) == 0
    assert ran == [0, 1, 1]
    (folder,) = tmp_path.glob("*/*/trials.csv")
    assert sorted(load_run(folder.parent).rows["strategy"]) == ["paged", "static"]


def test_hydra_launcher_needs_a_sweep(tmp_path):
    process = start(["-m", "harness", *SMALL, "hydra/launcher=basic"], tmp_path)
    said = process.communicate(timeout=LIMIT_SECONDS)[0]
    assert process.returncode == 2
    assert said.startswith("harness: hydra/launcher=")
    assert said.count("\n") == 1


def test_words_about_launchers_are_told_apart():
    words = ["strategy=paged", "hydra/launcher=basic", "hydra.launcher.n_jobs=3"]
    assert split_words(words) == (["strategy=paged"], words[1:])
    assert split_words(["strategy=paged"]) == (["strategy=paged"], [])


@pytest.mark.parametrize("words", [["hydra/launcher=pbs"], ["hydra.launcher.n_jobs=2"]])
def test_a_launcher_that_is_not_there_is_refused(words):
    with pytest.raises(BadValue, match=r"^hydra/launcher="):
        split_words(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("processes n_jobs=x", "n_jobs=x: not allowed; allowed: a whole number"),
        ("processes n_jobs=0", "n_jobs=0: not allowed; allowed: jobs at a time, 1 or more"),
        ("processes nope=1", "nope=1: not allowed; allowed: keys of hydra/launcher=processes: "),
        ("processes _target_=os.system", "_target_=os.system: not allowed; allowed: keys of "),
        ("submitit timeout_min=-3", "timeout_min=-3: not allowed; allowed: 1 or more"),
        ("basic n_jobs=2", "n_jobs=2: not allowed; allowed: keys of hydra/launcher=basic: none"),
    ],
)
def test_a_launcher_s_key_is_refused_before_anything_is_written(words, said, tmp_path, capsys):
    name, word = words.split()
    if module := cluster.PLUGINS[name][0]:
        pytest.importorskip(f"hydra_plugins.{module}")
    launcher = [f"hydra/launcher={name}", f"hydra.launcher.{word}"]
    assert main([*SWEEP, *launcher, f"results={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"harness: hydra.launcher.{said}")
    assert not (tmp_path / "runs").exists()


def test_slurm_is_refused_where_there_is_none(tmp_path, capsys, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*SWEEP, "hydra/launcher=slurm", f"results={tmp_path / 'runs'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("harness: hydra/launcher=slurm: not allowed; allowed: where srun is")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["n_jobs=-1", "n_jobs=4", "timeout=null", "verbose=0"])
def test_a_launcher_s_key_that_it_takes_passes(word):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    check_launcher(["hydra/launcher=processes", f"hydra.launcher.{word}"])


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BadValue, match=r"pip install hydra-submitit-launcher"):
        split_words(["hydra/launcher=slurm"])


def test_every_launcher_has_a_file_and_no_user_sets_its_class():
    names = {p.stem for p in (cluster.conf_dir() / "hydra" / "launcher").glob("*.yaml")}
    assert names == set(cluster.PLUGINS) - {"basic"}
    with pytest.raises(BadValue):
        compose_config(["hydra.launcher._target_=os.system"])


@dataclass
class Ray:
    """What the Ray plugin's own schema has, both of any keys."""

    init: dict[str, Any] = field(default_factory=dict)
    remote: dict[str, Any] = field(default_factory=dict)


@dataclass
class RayLauncher:
    """Stands in for the plugin's ``hydra/launcher=ray``, on which ours is built."""

    _target_: str = "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher"
    ray: Ray = field(default_factory=Ray)


def launcher_of(name, *words):
    """The launcher's part of a job's configuration, as Hydra composes it."""
    with initialize_config_dir(str(cluster.conf_dir()), version_base="1.3"):
        own = ["folder=here", f"hydra/launcher={name}", *words]
        return compose("cluster", own, return_hydra_config=True).hydra.launcher


@pytest.fixture
def ray(monkeypatch):
    """Ray's launcher: the plugin's own schema where it is installed, else its stand-in."""
    if importlib.util.find_spec("hydra_plugins.hydra_ray_launcher") is None:
        store = ConfigStore.instance()
        monkeypatch.setattr(store, "repo", copy.deepcopy(store.repo))
        store.store(group="hydra/launcher", name="ray", node=RayLauncher)


def test_the_launcher_of_ray_composes_without_ray(ray):
    made = launcher_of("ray_cluster")
    assert made._target_ == RayLauncher._target_
    assert made.ray.init.address is None
    assert made.ray.remote == {"num_cpus": 8, "num_gpus": 1}


def test_every_key_of_ray_s_launcher_that_the_documents_name_can_be_set(ray):
    words = ("hydra.launcher.ray.init.address=auto", "hydra.launcher.ray.remote.num_gpus=0")
    made = launcher_of("ray_cluster", *words)
    assert (made.ray.init.address, made.ray.remote.num_gpus) == ("auto", 0)
    with pytest.raises(ConfigCompositionException, match="rey"):
        launcher_of("ray_cluster", "hydra.launcher.rey.init.address=auto")


@pytest.mark.parametrize(
    ("name", "words", "key", "value"),
    [
        ("slurm", ("hydra.launcher.partition=gpu",), "partition", "gpu"),
        ("slurm", ("hydra.launcher.gpus_per_node=8",), "gpus_per_node", 8),
        ("submitit", (), "timeout_min", 120),
        ("processes", ("hydra.launcher.n_jobs=4",), "n_jobs", 4),
    ],
)
def test_the_other_launchers_compose_on_their_plugins(name, words, key, value):
    pytest.importorskip(f"hydra_plugins.{cluster.PLUGINS[name][0]}")
    assert launcher_of(name, *words)[key] == value


def test_two_jobs_never_share_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_DIR", tmp_path)
    monkeypatch.setattr(cluster, "WAIT_SECONDS", 0.01)
    gpus = [[GPU], [replace(GPU, index=1, uuid="GPU-b")]]
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        assert first_free(first, gpus) == 0
        assert first_free(second, gpus) == 1
        with contextlib.ExitStack() as third:
            found: list[int] = []
            waiting = threading.Thread(target=lambda: found.append(first_free(third, gpus)))
            waiting.start()
            waiting.join(0.2)
            assert waiting.is_alive()
            second.close()
            waiting.join(10)
            assert found == [1]


def test_a_job_measures_on_the_gpu_that_it_holds(tmp_path, monkeypatch):
    seen = [hardware.GpuSeen("NVIDIA H200", 150 << 30, 149 << 30, f"GPU-{n}") for n in range(2)]
    monkeypatch.setattr(lock, "LOCK_DIR", tmp_path)
    monkeypatch.setattr(hardware, "torch_has_cuda", lambda: True)
    monkeypatch.setattr(hardware, "seen_gpu", lambda index=0: seen[index])
    monkeypatch.setattr(cluster, "gpu_count", lambda: 2)
    ran = []

    def run_job(folder, settings, words):
        ran.append(settings.hardware.uuid)
        with pytest.raises(lock.Busy), lock.device_lock(settings.hardware):
            pass

    monkeypatch.setattr(session, "run_job", run_job)
    monkeypatch.setattr(ranks_relay, "seen_gpu", hardware.seen_gpu)
    words = ["hardware=auto", "context=64K", "sweep.contexts=[64K]"]
    (tmp_path / cluster.PLAN).write_text(json.dumps({"arms": [words]}))
    job = OmegaConf.create({"folder": str(tmp_path), "arm": 0})
    with lock.device_lock(GPU_0):
        cluster.run_arm(job)
    cluster.run_arm(job)
    assert ran == ["GPU-1", "GPU-0"]
    assert not list(tmp_path.rglob("error.txt"))


def test_a_job_of_several_ranks_takes_all_their_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_DIR", tmp_path)
    other = replace(GPU, index=1, uuid="GPU-b")
    with contextlib.ExitStack() as held, contextlib.ExitStack() as more:
        assert first_free(held, [[GPU, other]]) == 0
        with pytest.raises(lock.Busy):
            more.enter_context(lock.device_lock(other))
