"""Reading files that others wrote: text of a limited size, JSON of a limited depth, or one line.

Nothing read here is executed, imported or followed.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from harness.sizes import BadValue

MAX_LOG_BYTES = 64 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_JSON_DEPTH = 16
MAX_LINE_CHARACTERS = 1 << 16


@contextmanager
def opened(path: str | Path, key: str, allowed: str) -> Iterator[tuple[IO[bytes], os.stat_result]]:
    """A regular file and what is known of it; never waits for a pipe or a device.

    Raises
    ------
    BadValue
        For a file that is missing, no regular one, or one that its reader in the ``with`` block
        cannot read; ``key`` names it, ``allowed`` is what may be.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise BadValue(key, path, f"{allowed} ({_reason(error)})") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise BadValue(key, path, f"{allowed} (not a regular file)")
    try:
        with os.fdopen(descriptor, "rb") as file:
            yield file, found
    except OSError as error:  # /proc holds regular files that open and cannot be read
        raise BadValue(key, path, f"{allowed} ({_reason(error)})") from None


def at_home(path: str | Path) -> Path:
    """``path`` with its ``~`` or ``~user`` written out; as it stands where no such user is."""
    try:
        return Path(os.path.expanduser(path))
    except ValueError:
        return Path(path)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or "no such file").lower()


def read_text(path: str | Path, key: str, limit_bytes: int) -> str:
    """Text of a regular file.

    Parameters
    ----------
    key : str
        What the error calls the file.
    limit_bytes : int
        Larger files are refused, unread.

    Raises
    ------
    BadValue
        For a file that is missing, no regular file, too large, or not text.
    """
    allowed = f"a text file of up to {limit_bytes >> 20} MiB"
    with opened(path, key, allowed) as (file, found):
        if found.st_size > limit_bytes:
            raise BadValue(key, path, f"{allowed} (it has {found.st_size:,} bytes)")
        data = (file.read(limit_bytes + 1) or b"")[:limit_bytes]  # None: it would wait
    if b"\0" in data:
        raise BadValue(key, path, f"{allowed} (it is binary)")
    text = data.decode("utf-8", errors="replace")
    if text.count("\ufffd") > len(text) // 20:
        raise BadValue(key, path, f"{allowed} (it is not UTF-8)")
    return text


def read_json_object(path: str | Path, key: str) -> dict[str, Any]:
    """A JSON object of limited size and depth.

    Raises
    ------
    BadValue
        For anything else, and for an object that names code to run (``_target_``).
    """
    text = read_text(path, key, MAX_CONFIG_BYTES)
    allowed = "a model's config.json"
    if _depth(text) > MAX_JSON_DEPTH:
        raise BadValue(key, path, f"{allowed} (nested deeper than {MAX_JSON_DEPTH})")
    try:
        value = json.loads(text)
    except ValueError:
        raise BadValue(key, path, f"{allowed} (it is not JSON, or cut off)") from None
    if not isinstance(value, dict):
        raise BadValue(key, path, f"{allowed} (not an object)")
    if '"_target_"' in text:
        raise BadValue(key, path, f"{allowed}, without _target_: it is data, never code")
    return value


def _depth(text: str) -> int:
    """Deepest nesting of brackets outside strings, without recursion."""
    deepest = depth = 0
    in_string = escaped = False
    for character in text:
        if in_string:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == '"':
                in_string = False
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth -= 1
    return deepest


def lines(text: str) -> list[str]:
    """Lines of a log, each cut to a sane length."""
    return [line[:MAX_LINE_CHARACTERS] for line in text.splitlines()]
