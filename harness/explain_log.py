"""What an engine's start-up log says: flags, figures, and where it ended. Read, never executed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from harness.explain_launch import Launch, apply_flag
from harness.safe_text import lines
from harness.sizes import GIB, BadValue
from strategies.sglang_policy import POOL_LINES
from strategies.sglang_tables import REQUEST_TABLE_LINES

_PAIR = re.compile(
    r"['\"]?([A-Za-z_][A-Za-z0-9_]{0,60})['\"]?\s?[=:]\s?"
    r"('[^']{0,4096}'|\"[^\"]{0,4096}\"|None|True|False|-?\d+(?:\.\d+)?|[A-Za-z0-9_.-]{1,200})"
)
_FIGURE = r"(\d{1,9}(?:\.\d{1,9})?)"
_OOM = re.compile(
    rf"Tried to allocate {_FIGURE} ([KMG]i?B)\. GPU \d+ has a total capacity of {_FIGURE} GiB of "
    rf"which {_FIGURE} ([KMG]i?B) is free"
)
_FRAME = re.compile(r'File "([^"]{1,500})", line (\d{1,7}), in (\w+)')
_SHORT_FRAME = re.compile(r"(\w+\.py):(\d{1,7}) (\w+)")
_NEEDS = re.compile(
    rf"max seq len \((\d{{1,15}})\), \({_FIGURE} GiB KV cache is needed, which is larger than the "
    rf"available KV cache memory \({_FIGURE} GiB\)"
)
_TOO_BUSY = re.compile(
    rf"Free memory on device [\w:]{{1,20}} \({_FIGURE}/{_FIGURE} GiB\) on startup is less than"
)
_REFUSALS = (  # words of a refusal -> what is refused
    ("Not enough memory. Please try to increase", "kv_pool"),
    ("leave no GPU memory for the KV cache", "kv_pool"),
    ("No available memory for the cache blocks", "kv_pool"),
    ("is less than desired GPU memory utilization", "gpu_memory_utilization"),
    ("To allow overriding this maximum, set the env var", "context"),
)
_TOO_LONG = re.compile(
    r"(?:context_length|max_model_len) \((\d{1,15})\) is greater than the derived"
)
_VERSION = re.compile(
    r"(?:LLM engine \(v|vLLM (?:API server )?version |sglang[ =v]+)(\d[\w.]{2,19})"
)
# What an engine prints while it starts; prose about engines has none of these lines.
_STARTING = re.compile(
    r"ServerArgs\(\w+=|Load weight (?:begin|end)\.|KV Cache is allocated\.|KV pool holds \d|"
    r"max_total_num_tokens=\d|fired up and ready to roll|non-default args: \{|LLM engine \(v\d|"
    r"vLLM API server version \d|Model loading took \d|Available KV cache memory: -?\d|"
    r"GPU KV cache size: \d|Application startup complete"
)
_OOM_MESSAGE = re.compile(
    r"OutOfMemoryError\b|(?:CUDA|HIP)[\w ]{0,20}:? '?out of memory", re.IGNORECASE
)
_FIGURE_WORDS = ("Load weight", "loading took", "KV cache", "#tokens", "KV pool holds")
MAX_HEAD_LINES = 20_000
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "KB": 1 << 10, "MB": 1 << 20}
_UNITS["GB"] = 1 << 30

# (file, function or nothing) of a frame -> the allocation that it makes.
_FRAMES = (
    ("memory_pool.py", "_create_buffers", "kv_pool"),
    ("memory_pool.py", "_create_buffers_normal", "kv_pool"),
    ("swa_memory_pool.py", "", "kv_pool"),
    ("flashattention_backend.py", "init_cuda_graph_state", "page_table"),
    ("triton_backend.py", "init_cuda_graph_state", "cuda_graph_kv_indices"),
    ("flashinfer_backend.py", "init_cuda_graph_state", "cuda_graph_kv_indices"),
    ("piecewise_cuda_graph_runner.py", "", "piecewise_cuda_graphs"),
    ("cuda_graph_runner.py", "", "decode_cuda_graphs"),
    ("rotary_embedding.py", "", "rope_cos_sin"),
    ("block_table.py", "", "block_tables"),
    ("attn_utils.py", "", "kv_pool"),
    ("gpu_model_runner.py", "_allocate_kv_cache_tensors", "kv_pool"),
    ("loader.py", "", "weights"),
    ("base_loader.py", "", "weights"),
)


@dataclass
class LogFacts:
    """Figures of a log; 0 or empty where it does not say.

    ``outcome`` is ``ok``, ``oom``, ``refused`` or ``unknown``.
    """

    launch: Launch
    outcome: str = "unknown"
    failed: str = ""
    where: str = ""
    message: str = ""
    tried_bytes: int = 0
    free_bytes: int = 0
    total_bytes: int = 0
    needed_bytes: int = 0
    available_kv_bytes: int = 0
    free_before_bytes: int = 0
    weights_bytes: int = 0
    pool_tokens: int = 0


def read_log(text: str, key: str = "LOG", engine: str | None = None) -> LogFacts:
    """Read a log of either engine.

    Parameters
    ----------
    text : str
    key : str
        What an error calls the log.
    engine : str, optional
        Whose log it is where the text does not say, as an out-of-memory message alone does not.

    Raises
    ------
    BadValue
        When it is the log of neither: no line of a start, no refusal, nothing out of memory.
    """
    found = lines(text)
    engine = _engine(found) or engine
    if engine is None or not any(map(_is_of_a_start, found)):
        allowed = "a start-up log of SGLang or vLLM, or its out-of-memory message or refusal"
        raise BadValue(key, "(its text)", allowed)
    facts = LogFacts(Launch(engine))
    frame: tuple[str, int, str] | None = None
    for line in found:
        _read_figures(facts, line)
        frame = next(_frames(line), None) or frame
        if facts.outcome != "oom" and _OOM_MESSAGE.search(line) is not None:
            _read_oom(facts, line, frame)
        elif "KV cache is needed" in line and (needs := _NEEDS.search(line)) is not None:
            _read_refusal(facts, line, needs)
        for words, what in _REFUSALS:
            if words in line:
                facts.outcome, facts.failed, facts.message = "refused", what, _after_type(line)
        if facts.failed == "context" and (asked := _TOO_LONG.search(line)) is not None:
            facts.launch.context_tokens = facts.launch.context_tokens or int(asked[1])
        if (busy := _TOO_BUSY.search(line)) is not None:
            facts.free_bytes, facts.total_bytes = _gib(busy[1]), _gib(busy[2])
            facts.free_before_bytes = facts.free_bytes
        if facts.outcome == "oom" and not facts.failed:
            _name_failure(facts, next(_frames(line), None))
    if facts.outcome == "unknown" and any(_is_ready(line) for line in found):
        facts.outcome = "ok"
    return facts


def _engine(found: list[str]) -> str | None:
    signs = {
        "sglang": (
            "server_args=",
            "ServerArgs(",
            "sglang",
            "memory_pool.py",
            "Load weight ",
            "SGLANG_",
        ),
        "vllm": (
            "vllm",
            "vLLM",
            "VLLM_",
            "non-default args",
            "LLM engine (v",
            "Model loading took",
            "Available KV cache memory",
            "KV cache is needed",
            "gpu_memory_utilization",
            "GPU memory utilization",
        ),
    }
    # The start is what counts; a server's log may go on for days.
    head = found[:MAX_HEAD_LINES]
    count = {
        engine: sum(any(word in line for word in words) for line in head)
        for engine, words in signs.items()
    }
    best = max(count, key=lambda engine: count[engine])
    return best if count[best] else None


def _is_of_a_start(line: str) -> bool:
    """Whether an engine that starts printed this line, or the exception that ended it."""
    if _STARTING.search(line) is not None or _OOM_MESSAGE.search(line) is not None:
        return True
    refused = any(words in line for words, _ in _REFUSALS)
    return refused or _NEEDS.search(line) is not None or _TOO_BUSY.search(line) is not None


def _is_ready(line: str) -> bool:
    return "ready to roll" in line or "Application startup complete" in line


def _frames(line: str) -> Iterator[tuple[str, int, str]]:
    """Source positions named in a line."""
    if ".py" not in line:
        return
    for pattern in (_FRAME, _SHORT_FRAME):
        for match in pattern.finditer(line):
            name = match[1].replace("\\", "/").rsplit("/", 1)[-1]
            if "/torch/" not in match[1]:
                yield name, int(match[2]), match[3]


def _read_figures(facts: LogFacts, line: str) -> None:
    launch = facts.launch
    if "ServerArgs(" in line or "non-default args" in line:
        for name, value in _PAIR.findall(line):
            _take_flag(launch, name, value)
    elif "LLM engine (v" in line:
        _read_engine_line(launch, line)
    if not launch.version and ("LLM" in line or "sglang" in line):
        version = _VERSION.search(line)
        launch.version = version[1].rstrip(".") if version else ""
    if not any(word in line for word in _FIGURE_WORDS):
        return
    if (match := re.search(r"Load weight begin\. avail mem=([\d.]{1,9}) GB", line)) is not None:
        facts.free_before_bytes = _gib(match[1])
    if (match := re.search(r"mem usage=([\d.]{1,9}) GB", line)) and "Load weight end" in line:
        facts.weights_bytes = _gib(match[1])
    if (match := re.search(r"Model loading took ([\d.]{1,9}) GiB", line)) is not None:
        facts.weights_bytes = _gib(match[1])
    if (match := re.search(r"Available KV cache memory: ([\d.]{1,9}) GiB", line)) is not None:
        facts.available_kv_bytes = _gib(match[1])
    if (match := re.search(r"#tokens: (\d{1,15})", line)) is not None:
        facts.pool_tokens = int(match[1])
    if (match := re.search(r"KV pool holds (\d{1,15}) tokens", line)) is not None:
        facts.pool_tokens = int(match[1])
    if (match := re.search(r"GPU KV cache size: ([\d,]{1,20}) tokens", line)) is not None:
        facts.pool_tokens = int(match[1].replace(",", ""))


def _take_flag(launch: Launch, name: str, value: str) -> None:
    plain = value.strip("'\"")
    if plain in ("None", "") or (plain == "False" and name != "disable_hybrid_kv_cache_manager"):
        return
    apply_flag(launch, name, plain)


def _read_engine_line(launch: Launch, line: str) -> None:
    """``Initializing a V1 LLM engine (v…) with config: …, max_seq_len=…, …``."""
    for name, value in _PAIR.findall(line):
        plain = value.strip("'\"")
        if name == "max_seq_len" and launch.context_tokens is None and plain.isdigit():
            launch.context_tokens = int(plain)
        elif name in ("tensor_parallel_size", "kv_cache_dtype", "enforce_eager"):
            _take_flag(launch, name, plain)


def _gib(text: str) -> int:
    return round(float(text) * GIB) if text.count(".") <= 1 and text != "." else 0


def _read_oom(facts: LogFacts, line: str, frame: tuple[str, int, str] | None) -> None:
    facts.outcome, facts.message = "oom", _after_type(line)
    match = _OOM.search(line)
    if match is not None:
        facts.tried_bytes = round(float(match[1]) * _UNITS[match[2]])
        facts.total_bytes = round(float(match[3]) * GIB)
        facts.free_bytes = round(float(match[4]) * _UNITS[match[5]])
    _name_failure(facts, next(_frames(line), None) or frame)


def _name_failure(facts: LogFacts, frame: tuple[str, int, str] | None) -> None:
    if frame is None:
        return
    name, number, function = frame
    facts.where = f"{name}:{number} {function}"
    if name == "memory_pool.py":
        facts.launch.version = facts.launch.version or _version_of(number)
        if number in REQUEST_TABLE_LINES.values():
            facts.failed = "req_to_token"
            return
    for file, wanted, allocation in _FRAMES:
        if name == file and wanted in ("", function):
            facts.failed = allocation
            return


def _version_of(line_number: int) -> str:
    """The release whose memory_pool.py allocates on this line."""
    for table in (POOL_LINES, REQUEST_TABLE_LINES):
        for version, number in table.items():
            if number == line_number:
                return version
    return ""


def _read_refusal(facts: LogFacts, line: str, needs: re.Match[str]) -> None:
    facts.outcome, facts.failed = "refused", "kv_pool"
    facts.message = _after_type(line)
    facts.needed_bytes, facts.available_kv_bytes = _gib(needs[2]), _gib(needs[3])
    facts.launch.context_tokens = facts.launch.context_tokens or int(needs[1])


def _after_type(line: str) -> str:
    """The message of an exception's line, without what comes before it."""
    match = re.search(r"(?:ValueError|RuntimeError|OutOfMemoryError): (.*)", line)
    return (match[1] if match else line).strip()[:600]
