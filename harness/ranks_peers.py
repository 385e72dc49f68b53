"""Whether the harnesses on other machines still live: each says so through the store, and hears.

A machine that is gone closes no connection, and a killed harness leaves no last word: what ends is
its beat. Each beat carries what the rank that it started is doing (:mod:`harness.ranks_pulse`).
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

from harness.lock import Busy
from harness.ranks_control import SILENT_SECONDS
from harness.ranks_pulse import Pulse

BEAT_SECONDS = 0.5
JOIN_SECONDS = 2.0


def key_of(rank: int) -> str:
    """Where a rank's harness leaves its beats."""
    return f"beat/{rank}"


class Beat:
    """Says that this harness lives, from a thread of its own: the harness may wait for a process.

    Parameters
    ----------
    store : torch.distributed.Store
    pulse : callable
        What this harness's rank does, None between trials.
    """

    def __init__(self, store: Any, rank: int, pulse: Callable[[], Pulse | None]) -> None:  # noqa: ANN401
        self._store, self._key, self._pulse = store, key_of(rank), pulse
        self._number = 0
        self._over = threading.Event()
        self._say()
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()

    def _say(self) -> None:
        pulse = self._pulse()
        said = {"number": self._number, "host": socket.gethostname()}
        said["pulse"] = None if pulse is None else pulse.to_json()
        self._store.set(self._key, json.dumps(said))
        self._number += 1

    def _go_on(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._say()
            except RuntimeError:  # the store is gone, and with it who listens
                return

    def stop(self) -> None:
        """End the thread before the store goes."""
        self._over.set()
        self._thread.join(JOIN_SECONDS)


class Peers:
    """What rank 0's harness hears of the others'.

    Parameters
    ----------
    store : torch.distributed.Store
    ranks : iterable of int
        The others; this waits for the first beat of each.

    Raises
    ------
    Busy
        Naming those that do not come within ``patience``.
    """

    def __init__(self, store: Any, ranks: Iterable[int], patience: timedelta) -> None:  # noqa: ANN401
        self._store = store
        self.lost: set[int] = set()
        waited = list(ranks)
        try:
            store.wait([key_of(rank) for rank in waited], patience)
        except RuntimeError:
            missing = [str(rank) for rank in waited if not store.check([key_of(rank)])]
            seconds = patience.total_seconds()
            raise Busy(f"did not come within {seconds:g} s: rank {', '.join(missing)}") from None
        self._looked = time.monotonic()
        self._said = {rank: self._hear(rank) for rank in waited}
        self._heard_at = dict.fromkeys(waited, self._looked)

    def _hear(self, rank: int) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._store.get(key_of(rank)))
        return said

    def look(self) -> None:
        """Hear every one, at most once a beat; who is silent for too long is lost for good."""
        now = time.monotonic()
        gap = now - self._looked
        if gap < BEAT_SECONDS:
            return
        self._looked = now
        for rank in self._heard_at.keys() - self.lost:
            said = self._hear(rank)
            # Nobody was silent while nobody listened: between trials, or when we were stopped.
            self._heard_at[rank] += max(0.0, gap - 2 * BEAT_SECONDS)
            if said["number"] != self._said[rank]["number"]:
                self._said[rank], self._heard_at[rank] = said, now
            elif now - self._heard_at[rank] > SILENT_SECONDS:
                self.lost.add(rank)

    def pulse(self, rank: int) -> Pulse | None:
        """What a rank did at its harness's last beat."""
        found = self._said[rank]["pulse"]
        return None if found is None else Pulse(**found)

    def loss(self, rank: int) -> str:
        """How a rank was lost, in words."""
        return (
            f"rank {rank} is lost: its harness on {self._said[rank]['host']} has been silent for "
            f"more than {SILENT_SECONDS:g} s"
        )
