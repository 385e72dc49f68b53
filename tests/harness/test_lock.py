"""One harness a device, whoever started it and whatever became of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from harness import lock
from harness.hardware import Hardware
from harness.lock import Busy, device_lock, lock_path
from tests.harness.command import (
    QUICK,
    environment,
    is_gone,
    processes_of,
    trial_process,
    until,
)
from tests.harness.somebody_else import somebody_else

LOCKS = lock.LOCK_DIR

HOLDER = """
import sys, time
from pathlib import Path
from harness import lock
from tests.harness.test_lock import gpu
lock.LOCK_DIR = Path(sys.argv[1])
with lock.device_lock(gpu(sys.argv[2])):
    print("held", flush=True)
    time.sleep(600)
"""


def gpu(uuid: str, kind: str = "cuda") -> Hardware:
    return Hardware("auto", kind, "NVIDIA H200", 1, 1, 1, 1, 0, 132, 0, uuid)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LOCK_DIR", tmp_path)


@pytest.fixture
def holder(tmp_path):
    """Another process that measures on GPU-1."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path), "GPU-1"],
        env=environment(TMPDIR=str(tmp_path / "elsewhere")),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_harness_is_refused_by_the_uuid(holder):
    with pytest.raises(Busy) as refused, device_lock(gpu("GPU-1")):
        pass
    assert f"process {holder.pid}" in str(refused.value) and "GPU-1" in str(refused.value)
    with device_lock(gpu("GPU-2")):
        pass


def test_a_killed_harness_frees_the_device(holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with device_lock(gpu("GPU-1")):
        assert lock_path("GPU-1").read_text() == str(os.getpid())


def test_all_devices_or_none(holder):
    with pytest.raises(Busy), device_lock(gpu("GPU-0"), gpu("GPU-1")):
        pass
    with device_lock(gpu("GPU-0"), gpu("GPU-0"), gpu("GPU-2")):
        pass


def test_the_scale_model_needs_no_lock(holder, tmp_path):
    with device_lock(gpu("GPU-1", kind="scale_model")), device_lock():
        pass


def test_a_name_from_a_driver_stays_in_the_folder(tmp_path):
    assert lock_path("../../GPU 1/x").parent == tmp_path
    with device_lock(gpu("../../GPU 1/x")):
        pass


def test_a_lock_file_that_cannot_be_opened_is_said_in_one_line(tmp_path):
    lock_path("GPU-3").symlink_to(tmp_path / "target")
    with pytest.raises(Busy, match="cannot be locked"), device_lock(gpu("GPU-3")):
        pass
    assert not (tmp_path / "target").exists()


@pytest.fixture
def open_folder(monkeypatch):
    """A folder like /tmp, with a lock file that root made."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o1777)
        monkeypatch.setattr(lock, "LOCK_DIR", Path(name))
        path = lock_path("GPU-4")
        path.write_text("77")
        path.chmod(0o644)
        yield path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_lock_file_that_is_not_ours_to_write_still_keeps_two_apart(open_folder):
    held, again = device_lock(gpu("GPU-4")), device_lock(gpu("GPU-4"))
    with somebody_else(), held, pytest.raises(Busy, match="process 77"), again:
        pass
    assert open_folder.read_text() == "77"


MEASURES = """
import sys
from pathlib import Path
from harness import lock
from harness.launch import run_job
from harness.spares import Spares
from tests.harness.test_launch import job
from tests.harness.test_lock import gpu
lock.LOCK_DIR = Path(sys.argv[1])
with lock.device_lock(gpu("GPU-5")):
    spares = Spares(1) if sys.argv[2] == "spare" else None
    if spares:
        from harness.launch import child_environment
        spares.prepare(child_environment())
    hangs = job("fault.kind=hang", "fault.phase=pool")
    run_job(hangs, Path(sys.argv[1]) / ".trial", lambda record: print("on", flush=True), spares)
"""


@pytest.mark.parametrize("kind", ["fresh", "spare"])
def test_a_trial_holds_the_device_of_its_harness_until_it_is_gone(tmp_path, kind):
    """As long as its process is there, so may be its memory on the GPU."""
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURES, str(tmp_path), kind],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    trial = None
    try:
        assert process.stdout.readline() == "on\n"
        there = processes_of(tmp_path / ".trial") if kind == "fresh" else _children(process.pid)
        trial = there[0]
        assert str(lock_path("GPU-5")) in _open_files(trial)
        process.kill()
        until(lambda: is_gone(trial), seconds=30)
        with device_lock(gpu("GPU-5")):
            pass
    finally:  # of a test that fails nothing stays
        process.kill()
        process.communicate()
        if trial is not None and not is_gone(trial):
            os.kill(trial, signal.SIGKILL)


# The command on a machine whose driver knows one GPU; a trial hangs before it would touch it.
ON_A_GPU = """
import sys
from harness import hardware
from harness.cli import main
gpu = hardware.GpuSeen("NVIDIA H200", 150_754_820_096, 150_109_880_320, sys.argv[1])
hardware.torch_has_cuda, hardware.seen_gpu = lambda: True, lambda index=0: gpu
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.beside
def test_of_two_commands_on_one_gpu_the_second_is_refused_and_measures_nothing(tmp_path):
    uuid = f"GPU-made-up-{os.getpid()}"
    words = (*QUICK, "hardware=auto", "fault.kind=hang", "fault.phase=context")
    first, second = (
        [sys.executable, "-c", ON_A_GPU, uuid, *words, f"results={tmp_path / name}"]
        for name in ("first", "second")
    )
    holder = subprocess.Popen(first, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        trial = until(lambda: trial_process(tmp_path / "first"))
        ended = subprocess.run(
            second, env=environment(), cwd=tmp_path, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (2, "")
        assert ended.stderr == (
            f"harness: NVIDIA H200 ({uuid}) is being measured by process {holder.pid}; "
            "wait for it, or choose another hardware.index\n"
        )
        assert not (tmp_path / "second").exists() and not is_gone(trial)
    finally:
        holder.kill()
        holder.wait()
        (LOCKS / f"kv-alloc-bench-{uuid}.lock").unlink()
    until(lambda: is_gone(trial), seconds=30)


def _open_files(process: int) -> list[str]:
    """What a process has open; a file that it closes meanwhile is left out."""
    found = []
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(entry))
    return found


def _children(process: int) -> list[int]:
    found = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return sorted(int(p) for p in found)
