"""How the processes that a launcher started find each other, and what is said until they have."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from harness.lock import Busy
from harness.ranks import Launched

RENDEZVOUS = timedelta(seconds=300)
QUIET_SECONDS = 10.0  # what is waited for longer is said
TRY_SECONDS = 0.5


class Unmet(Busy):
    """This process did not find the others: a matter of its own, not of all ranks."""


def meet(here: Launched) -> Any:  # noqa: ANN401
    """The store through which all processes talk, rank 0's or torchrun's own.

    Raises
    ------
    Unmet
        After five minutes, naming who was waited for, and where.
    """
    if here.rank:
        _reach(here)
    from torch.distributed import DistError, rendezvous

    try:
        # As torch does it: MASTER_ADDR and MASTER_PORT, which torchrun sets to its own.
        store, _, _ = next(rendezvous("env://", timeout=RENDEZVOUS))
    except DistError as error:
        raise Unmet(f"{_waited(here)} in vain: {error}") from None
    return store


@contextlib.contextmanager
def long_wait_is_said(here: Launched) -> Iterator[None]:
    """Say on standard error what this process waits for, once it has for long."""
    word = threading.Timer(QUIET_SECONDS, _say, [here])
    word.daemon = True
    word.start()
    try:
        yield
    finally:
        word.cancel()


def _reach(here: Launched) -> None:
    """Wait until somebody listens where rank 0 should: torch prints its stack while it waits."""
    until = time.monotonic() + RENDEZVOUS.total_seconds()
    while True:
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            left = max(TRY_SECONDS, until - time.monotonic())
            socket.create_connection(address, timeout=left).close()
            return
        except OSError as error:
            if time.monotonic() + TRY_SECONDS > until:
                why = error.strerror or error
                raise Unmet(f"{_waited(here)} for {_limit()}, in vain: {why}") from None
        time.sleep(TRY_SECONDS)


def _say(here: Launched) -> None:
    line = _waited(here).replace("waited", "waits")
    print(f"harness: {line}, for at most {_limit()}", file=sys.stderr, flush=True)


def _waited(here: Launched) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    last = here.world_size - 1
    others = "rank 0" if here.rank else "rank 1" if last == 1 else f"ranks 1 to {last}"
    return f"rank {here.rank} waited for {others} at {place}"


def _limit() -> str:
    return f"{RENDEZVOUS.total_seconds():g} s"
