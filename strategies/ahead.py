"""Mapping ahead: a background thread keeps committed chunks ready, so that growth finds them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator


class AheadMapper:
    """Calls ``prepare`` whenever there may be something to commit.

    Parameters
    ----------
    lock : threading.RLock
        Held during each call; between calls it is left to a request that waits for it
        (:meth:`first`), so that one waits for one chunk at the most.
    prepare : callable
        Commits one chunk and returns True, or returns False when there is nothing to do.
    """

    def __init__(self, lock: threading.RLock, prepare: Callable[[], bool]) -> None:
        self._prepare, self._lock = prepare, lock
        self._changed = threading.Condition(lock)
        self._queue = threading.Condition()
        self._waiting = 0  # requests that wait for the lock
        self._pending = self._busy = self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="map-ahead", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Hold the lock, before the thread takes it again: locks are not given in turn."""
        with self._queue:
            self._waiting += 1
        try:
            self._lock.acquire()
        finally:
            with self._queue:
                self._waiting -= 1
                self._queue.notify_all()
        try:
            yield
        finally:
            self._lock.release()

    def poke(self) -> None:
        """Look again, since something changed. The caller holds the lock."""
        self._pending = self._thread.is_alive()
        self._changed.notify_all()

    def check(self) -> None:
        """Raise what ended the background thread, if anything did."""
        if self._failure is not None:
            raise RuntimeError("mapping ahead has failed") from self._failure

    def settle(self) -> None:
        """Wait until there is nothing more to commit."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._pending or self._busy))

    def stop(self) -> None:
        """End the thread; the caller must not hold the lock."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._next():
                with self._queue:
                    self._queue.wait_for(lambda: not self._waiting)
        except BaseException as failure:
            self._failure = failure
        with self._changed:
            self._pending = self._busy = False
            self._changed.notify_all()

    def _next(self) -> bool:
        """Prepare one chunk, or wait to be poked; False when the thread is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._busy or self._stopping)
            if self._stopping:
                return False
            self._pending = False
            self._busy = self._prepare()
            if not self._busy:
                self._changed.notify_all()
            return True
