"""A reader that has seen enough (``| head``) ends a command quietly."""

from __future__ import annotations

import functools
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

CLOSED_EXIT = 128 + signal.SIGPIPE  # as a shell reports a command that SIGPIPE ended

Main = Callable[[Sequence[str] | None], int]


def ends_quietly(main: Main) -> Callable[..., int]:
    """Decorate a command's ``main``: when its reader goes away it returns :data:`CLOSED_EXIT`.

    SIGPIPE keeps being ignored: a run also writes to its trials' pipes, and must outlive them.
    """

    @functools.wraps(main)
    def run(words: Sequence[str] | None = None) -> int:
        try:
            try:
                return main(words)
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
            if not closed:  # another pipe: a fault of ours
                raise
            _silence(closed)
            return CLOSED_EXIT

    return run


def _is_closed(stream: TextIO) -> bool:
    """Whether nobody reads any more; to flush again does not say it when nothing is buffered."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):  # no file of the system's
        return False
    asked = select.poll()
    asked.register(number, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in asked.poll(0))


def _silence(streams: Sequence[TextIO]) -> None:
    """Let what they still hold go nowhere, so that Python's own flush at its end cannot fail."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
