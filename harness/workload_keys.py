"""The keys of a workload, checked: what is done with the pool once it is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.sizes import BadValue, parse_tokens
from harness.trace_file import MAX_REQUESTS, SAMPLE, read_trace

if TYPE_CHECKING:
    from omegaconf import DictConfig

KINDS = ("fill", "batch", "trace", "churn")
# Tokens are accounted and pages touched, not written; nothing is timed.
ACCOUNTED = ("trace", "churn")
# Pages that an allocator can hand out when no kernel reads them.
ACCOUNTED_PAGE_TOKENS = tuple(1 << i for i in range(9))
MAX_OPERATIONS = 1_000_000
MAX_RATE = 1e6


def workload_keys(conf: DictConfig) -> dict[str, Any]:
    """The ``workload`` group as plain numbers; a trace is read once, and named by its content.

    Raises
    ------
    BadValue
        One line: key, value and what is allowed; for a trace, the line of the file too.
    """
    from omegaconf import OmegaConf

    found = OmegaConf.to_container(conf, resolve=True)
    assert isinstance(found, dict)
    keys: dict[str, Any] = {str(k): v for k, v in found.items()}
    if keys["kind"] not in KINDS:
        raise BadValue("workload.kind", keys["kind"], ", ".join(KINDS))
    _whole(keys, "sequences", 1, 65536)
    _whole(keys, "operations", 1, MAX_OPERATIONS)
    for name in ("min_tokens", "max_tokens"):
        keys[name] = parse_tokens(keys[name], f"workload.{name}")
    if keys["min_tokens"] > keys["max_tokens"]:
        allowed = f"up to workload.max_tokens={keys['max_tokens']}"
        raise BadValue("workload.min_tokens", keys["min_tokens"], allowed)
    if not 0.001 <= keys["step_ms"] <= 1e6:
        raise BadValue("workload.step_ms", keys["step_ms"], "0.001 to 1000000 milliseconds")
    keys["rate"] = _rate(keys["rate"])
    if keys["requests"] is not None:
        keys["requests"] = parse_tokens(keys["requests"], "workload.requests")
        _whole(keys, "requests", 1, MAX_REQUESTS)
    if keys["path"] is not None and not isinstance(keys["path"], str):
        raise BadValue("workload.path", keys["path"], "a file's path")
    if keys["kind"] == "trace":
        trace = read_trace(keys["path"] or None, keys["requests"])
        keys["trace_file"] = SAMPLE.name if keys["path"] is None else trace.name
        keys["trace_digest"] = trace.digest
    return keys


def _whole(keys: dict[str, Any], name: str, low: int, high: int) -> None:
    if not low <= keys[name] <= high:
        raise BadValue(f"workload.{name}", keys[name], f"{low} to {high}")


def _rate(value: object) -> str | float:
    if value in ("max", "recorded"):
        return str(value)
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    if number is None or not 0 < number <= MAX_RATE:
        raise BadValue("workload.rate", value, "max, recorded, or requests a second above 0")
    return float(number)
