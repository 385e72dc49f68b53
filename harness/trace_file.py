"""Request traces: arrivals and lengths from a file that others wrote, read as data.

Two formats, told apart by the first line, plain or gzip:

* Azure's CSV, ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Splitwise, ISCA '24);
* Mooncake's JSON lines (FAST '25), ``{"timestamp": ms, "input_length": tokens,
  "output_length": tokens, "hash_ids": [...]}``, whose ids name prefix blocks of 512 tokens.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

from harness.safe_text import at_home, opened
from harness.sizes import LARGEST_CONTEXT_TOKENS, BadValue

KEY = "workload.path"
SAMPLE = Path(__file__).parent / "data" / "azure_conv_2023_first_10000.csv.gz"
MAX_TEXT_BYTES = 512 << 20  # of the text, once decompressed
MAX_LINE_BYTES = 1 << 20
MAX_REQUESTS = 2_000_000
MAX_LINES = MAX_REQUESTS + 100_000
MAX_HASHES_PER_REQUEST = 1 << 16
CSV_COLUMNS = ("timestamp", "contexttokens", "generatedtokens")
JSON_KEYS = ("timestamp", "input_length", "output_length")
_ALLOWED = "a trace: Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens) or Mooncake's JSON lines"
_NUMBER = re.compile(r"\d{1,15}")
_SECONDS = re.compile(r"\d{1,12}(\.\d{1,12})?")
_MOMENT = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d{1,9})?(Z|[+-]\d\d:\d\d)?", re.IGNORECASE
)
_BAD_LINE = (ValueError, KeyError, TypeError, OverflowError, RecursionError, csv.Error)


class Request(NamedTuple):
    """One request: when it came (seconds after the first), prompt and generated tokens."""

    arrival_seconds: float
    input_tokens: int
    output_tokens: int

    @property
    def total_tokens(self) -> int:
        """Tokens that it holds when it ends."""
        return self.input_tokens + self.output_tokens


@dataclass(frozen=True)
class Trace:
    """Requests in order of arrival.

    ``digest`` is the SHA-256 of the text that was read. ``prefix_hashes`` counts the ids of prefix
    blocks over all requests, ``prefix_hashes_repeated`` those that stood before in the file; blocks
    are not shared.
    """

    name: str
    digest: str
    requests: tuple[Request, ...]
    prefix_hashes: int = 0
    prefix_hashes_repeated: int = 0

    @property
    def input_tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(r.input_tokens for r in self.requests)

    @property
    def output_tokens(self) -> int:
        """Generated tokens of all requests."""
        return sum(r.output_tokens for r in self.requests)

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest request."""
        return max(r.total_tokens for r in self.requests)


def read_trace(path: str | Path | None = None, limit: int | None = None) -> Trace:
    """The first ``limit`` requests in a file, put in order; of the bundled sample without a path.

    Raises
    ------
    BadValue
        One line: what is wrong, in which line of the file.
    """
    file = SAMPLE if path is None else at_home(path)
    with opened(file, KEY, _ALLOWED) as (source, found):
        del source
        state = (found.st_size, found.st_mtime_ns, found.st_ino)
    return _read(file, limit, state)


@lru_cache(maxsize=2)
def _read(file: Path, limit: int | None, state: tuple[int, ...]) -> Trace:
    """Read a file that is in this state; every arm of an experiment asks for the same one."""
    del state
    digest = hashlib.sha256()
    found: list[tuple[float, int, int]] = []
    hashes = _Hashes()
    with opened(file, KEY, _ALLOWED) as (source, _):
        lines = _lines(source, file, digest.update)
        number, first = next(lines, (1, ""))
        if not first:
            raise _bad(file, number, "the file is empty")
        parse = _json_line(hashes) if first.lstrip().startswith("{") else _csv_line(first, file)
        rest = [(number, first)] if first.lstrip().startswith("{") else []
        for number, line in _chain(rest, lines):
            if limit is not None and len(found) == limit:
                break
            if len(found) == MAX_REQUESTS:
                raise _bad(file, number, f"more than {MAX_REQUESTS:,} requests")
            try:
                found.append(_checked(parse(line)))
            except _BAD_LINE as error:
                raise _bad(file, number, _reason(error)) from None
    if not found:
        raise _bad(file, number, "no request in it")
    return _in_order(file, digest.hexdigest(), found, hashes)


def _in_order(
    file: Path, digest: str, found: list[tuple[float, int, int]], hashes: _Hashes
) -> Trace:
    found.sort(key=lambda r: r[0])
    first = found[0][0]
    requests = tuple(Request(at - first, given, made) for at, given, made in found)
    return Trace(file.name, digest, requests, hashes.total, hashes.repeated)


class _Hashes:
    """Counts ids of prefix blocks, and those that came before."""

    def __init__(self) -> None:
        self.total = self.repeated = 0
        self._seen: set[int] = set()

    def add(self, ids: object) -> None:
        """Count a request's ids; raises ``ValueError`` for anything but a list of numbers."""
        if not isinstance(ids, list) or len(ids) > MAX_HASHES_PER_REQUEST:
            raise ValueError(f"hash_ids: a list of up to {MAX_HASHES_PER_REQUEST} numbers")
        if not all(type(i) is int for i in ids):
            raise ValueError("hash_ids: whole numbers only")
        self.total += len(ids)
        before = len(self._seen)
        self._seen.update(ids)
        self.repeated += len(ids) - (len(self._seen) - before)


def _lines(
    source: IO[bytes], file: Path, digest: Callable[[bytes], None]
) -> Iterator[tuple[int, str]]:
    """Number and text of every line that is not blank, decompressed, within the limits."""
    packed = source.read(2) == b"\x1f\x8b"
    source.seek(0)
    text: Any = gzip.GzipFile(fileobj=source) if packed else source
    size = number = 0
    while True:
        try:
            line: bytes = text.readline(MAX_LINE_BYTES + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            raise _bad(file, number + 1, "damaged gzip") from None
        if not line:
            return
        number, size = number + 1, size + len(line)
        if len(line) > MAX_LINE_BYTES:
            raise _bad(file, number, f"a line of more than {MAX_LINE_BYTES >> 20} MiB")
        if size > MAX_TEXT_BYTES or number > MAX_LINES:
            raise _bad(file, number, f"more than {MAX_TEXT_BYTES >> 20} MiB or {MAX_LINES:,} lines")
        digest(line)
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
        except UnicodeDecodeError:
            raise _bad(file, number, "not UTF-8 text") from None
        if decoded:
            yield number, decoded


def _chain(
    first: list[tuple[int, str]], rest: Iterator[tuple[int, str]]
) -> Iterator[tuple[int, str]]:
    yield from first
    yield from rest


Parse = Callable[[str], tuple[float, int, int]]


def _csv_line(header: str, file: Path) -> Parse:
    """How to read a line under this header; further columns are left alone."""
    try:
        names = [n.strip().lower() for n in next(csv.reader([header]))]
        at = [names.index(c) for c in CSV_COLUMNS]
    except (ValueError, csv.Error, StopIteration):
        raise _bad(file, 1, "no such columns, and no JSON object") from None

    def parse(line: str) -> tuple[float, int, int]:
        fields = next(csv.reader([line]))
        if len(fields) != len(names):
            raise ValueError(f"{len(fields)} fields instead of {len(names)}")
        moment, given, made = (fields[i].strip() for i in at)
        return _moment(moment), _tokens(given), _tokens(made)

    return parse


def _moment(text: str) -> float:
    """Seconds, from a number of them or a date and time."""
    if _SECONDS.fullmatch(text):
        return float(text)
    if not _MOMENT.fullmatch(text):
        raise ValueError(f"TIMESTAMP {text[:40]!r}: a date and time, or seconds")
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _tokens(text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise ValueError(f"{text[:40]!r}: a number of tokens")
    return int(text)


def _json_line(hashes: _Hashes) -> Parse:
    def parse(line: str) -> tuple[float, int, int]:
        found = json.loads(line, parse_constant=_no_constant)
        if not isinstance(found, dict):
            raise ValueError("not an object")
        for key in JSON_KEYS:
            if type(found[key]) not in (int, float) or not math.isfinite(found[key]):
                raise ValueError(f"{key}: a number")
        moment, given, made = (found[key] for key in JSON_KEYS)
        if given != int(given) or made != int(made):
            raise ValueError("input_length and output_length are whole numbers of tokens")
        hashes.add(found.get("hash_ids", []))
        return moment / 1e3, int(given), int(made)

    return parse


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _checked(request: tuple[float, int, int]) -> tuple[float, int, int]:
    """The request, when its numbers can be those of one; raises ``ValueError``."""
    moment, given, made = request
    if given < 0 or made < 0 or not 1 <= given + made <= LARGEST_CONTEXT_TOKENS:
        raise ValueError(f"{given} and {made} tokens: 1 to {LARGEST_CONTEXT_TOKENS} in all")
    if not abs(moment) < 1e12:
        raise ValueError("a moment in time")
    return request


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return "no JSON object, or cut off"
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error) if isinstance(error, ValueError) else "too deeply nested, or no request"


def _bad(file: Path, number: int, reason: str) -> BadValue:
    return BadValue(KEY, file, f"{_ALLOWED} (line {number}: {reason})")
