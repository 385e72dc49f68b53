"""Processes that a launcher started, and that do not find each other: each says so in a line."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest

from harness import ranks_meeting
from harness.cli import main


@pytest.fixture
def environment(monkeypatch):
    """Sets what a launcher sets; nobody listens at the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def give(**names):
        known = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in (known | names).items():
            monkeypatch.setenv(name, value)
        return port

    return give


def lines_of(tmp_path, capsys):
    words = ["hardware=scale_model", "parallel.ranks=2", f"results={tmp_path / 'runs'}"]
    assert main(words) == 2
    assert not (tmp_path / "runs").exists()
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"RANK": "x"}, "RANK=x"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "2"}, "RANK=2"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"RANK": "1", "MASTER_PORT": "abc"}, "MASTER_PORT=abc"),
    ],
)
def test_any_rank_says_what_its_launcher_got_wrong(wrong, key, environment, tmp_path, capsys):
    environment(**wrong)
    (line,) = lines_of(tmp_path, capsys)
    assert line.startswith(f"harness: {key}: not allowed; allowed: ")


@pytest.mark.parametrize(("rank", "other"), [("1", "rank 0"), ("0", "rank 1")])
def test_a_rank_says_whom_it_waits_for_and_ends(
    rank, other, environment, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(ranks_meeting, "RENDEZVOUS", timedelta(seconds=2))
    monkeypatch.setattr(ranks_meeting, "QUIET_SECONDS", 0.2)
    port = environment(RANK=rank)
    waits, ended = lines_of(tmp_path, capsys)
    assert waits == (f"harness: rank {rank} waits for {other} at 127.0.0.1:{port}, for at most 2 s")
    assert ended.startswith(f"harness: rank {rank} waited for {other} at 127.0.0.1:{port}")
    assert "in vain: " in ended
