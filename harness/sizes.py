"""Sizes as people type them, and as they read them.

K, M, G, T are powers of 1000; Ki, Mi, Gi, Ti powers of 1024. A size of bytes may end in B.
"""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS = {"": 1, **{u: 1000**i for i, u in enumerate("KMGT", 1)}}
_UNITS |= {f"{u}i": 1024**i for i, u in enumerate("KMGT", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?|)(B?)")
LARGEST_CONTEXT_TOKENS = 1 << 40
GIB = 1 << 30
MIB = 1 << 20
KIB = 1 << 10


class BadValue(ValueError):
    """A key's value that is not allowed; its message is the one line that a user reads.

    ``value`` is ``...`` for a word that is no ``key=value`` at all.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        self.key, self.value, self.allowed = key, value, allowed
        typed = key if value is ... else f"{key}={'null' if value is None else value}"
        super().__init__(f"{printable(typed)[:200]}: not allowed; allowed: {printable(allowed)}")


def _parse(text: object, key: str, allowed: str, suffix: str) -> int:
    match = _SIZE.fullmatch(str(text).strip()) if len(str(text)) <= 40 else None
    if match is None or (match[3] and not suffix):
        raise BadValue(key, text, allowed)
    value = Fraction(match[1]) * _UNITS[match[2]]
    if value.denominator != 1 or value < 1:
        raise BadValue(key, text, allowed)
    return int(value)


def parse_tokens(text: object, key: str = "context") -> int:
    """Tokens from ``10M`` (10,000,000), ``512Ki`` (524,288) or a plain number.

    Raises
    ------
    BadValue
        For anything that is not a whole number of tokens between 1 and 2**40.
    """
    allowed = "a whole number of tokens from 1 to 1Ti, such as 131072, 512Ki or 10M"
    tokens = _parse(text, key, allowed, suffix="")
    if tokens > LARGEST_CONTEXT_TOKENS:
        raise BadValue(key, text, allowed)
    return tokens


def parse_bytes(text: object, key: str) -> int:
    """Bytes from ``80GiB``, ``64Mi``, ``1.5G`` or a plain number of bytes.

    Raises
    ------
    BadValue
        For anything that is not a whole positive number of bytes.
    """
    return _parse(text, key, "a size such as 80GiB, 512MiB or 150109880320", suffix="B")


def gib(nbytes: float | None) -> str:
    """Bytes as people read them: ``80.04 GiB``."""
    return "" if nbytes is None else f"{nbytes / GIB:.2f} GiB"


def mib(nbytes: float | None) -> str:
    """Bytes of the scale model: ``743.0 MiB``."""
    return "" if nbytes is None else f"{nbytes / MIB:.1f} MiB"


def gib_or_less(nbytes: float | None) -> str:
    """:func:`gib`, but a smaller unit for bytes that it would round to nothing."""
    return mib_or_less(nbytes) if 0 < (nbytes or 0) < 0.005 * GIB else gib(nbytes)


def mib_or_less(nbytes: float | None) -> str:
    """:func:`mib`, but a smaller unit for bytes that it would round to nothing: ``24.0 KiB``."""
    if nbytes is None or not 0 < nbytes < 0.05 * MIB:
        return mib(nbytes)
    return f"{nbytes / KIB:.1f} KiB" if nbytes >= KIB else f"{nbytes:.0f} B"


def printable(text: object) -> str:
    """Text on one line, without control characters: safe in a table and on a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def tokens_text(tokens: int | None) -> str:
    """``10M``, ``512Ki`` or ``5,843,200``: the shortest exact form."""
    if tokens is None:
        return ""
    for unit in ("G", "M", "K"):
        if tokens % _UNITS[unit] == 0:
            return f"{tokens // _UNITS[unit]}{unit}"
    for unit in ("Gi", "Mi", "Ki"):
        if tokens % _UNITS[unit] == 0:
            return f"{tokens // _UNITS[unit]}{unit}"
    return f"{tokens:,}"
