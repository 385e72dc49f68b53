"""Folders of processes that were killed are removed by the next one, and no others."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile

import pytest

from harness.scratch import scratch_folder
from tests.harness.ranks_fixture import ROOT

OWNER = """
import sys
from harness.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "rank1").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _own_tmpdir(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def owner():
    return subprocess.Popen(
        [sys.executable, "-c", OWNER],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_folder_goes_with_its_process(tmp_path):
    with scratch_folder() as folder:
        assert folder.parent == tmp_path
        (folder / "rank1").mkdir()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    others = tmp_path / "kv-alloc-bench-other"
    others.mkdir()
    (others / "kept").write_text("of somebody who never locked it")
    dead, alive = owner(), owner()
    left, held = (p.stdout.readline().strip() for p in (dead, alive))
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    try:
        assert left in map(str, tmp_path.iterdir())
        with scratch_folder() as folder:
            assert set(map(str, tmp_path.iterdir())) == {held, str(others), str(folder)}
            assert (others / "kept").exists()
    finally:
        alive.communicate("")
    assert list(tmp_path.iterdir()) == [others]


def test_a_link_is_not_followed(tmp_path):
    target = tmp_path / "target"
    target.mkdir()
    (target / "owned").write_text("")
    (tmp_path / "kv-alloc-bench-link").symlink_to(target)
    with scratch_folder():
        assert (target / "owned").exists()
