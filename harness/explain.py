"""``python -m harness.explain LOG`` and/or ``--command '…' --config config.json --gpu h200``.

Reads an engine's start-up log or command line and a Hugging Face config.json, and names the
allocation that failed, the one that ate the memory, and the smallest change of flags that starts,
with the planner's table beside it. Nothing that is read is executed, and no path in it is opened.
Exit 0 with an answer, 2 for bad input, with one line.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence

from harness.arguments import OneLineParser
from harness.closed_pipe import ends_quietly
from harness.explain_differs import disagreements
from harness.explain_formula import request_table_answer
from harness.explain_launch import Launch, parse_command
from harness.explain_log import LogFacts, read_log
from harness.explain_longest import refusal
from harness.explain_spec import Question, engine_flag, question
from harness.gpus import GPUS, Gpu, gpu_named, gpu_with_total
from harness.hf_config import HFConfig, read_hf_config
from harness.phases import phase_name
from harness.planner import largest_context_that_starts, predict
from harness.planner_changes import GOALS, Change, longest_accepted, smallest_change
from harness.planner_spec import PlanSpec, Prediction
from harness.planner_text import eater, items_table, longest_text, no_flag
from harness.safe_text import MAX_LOG_BYTES, read_text
from harness.sizes import BadValue, gib

ENGINE_NAMES = {"sglang": "SGLang", "vllm": "vLLM"}


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = OneLineParser(
        prog="python -m harness.explain",
        description="Why an engine does not start: what failed, what ate the memory, what helps.",
        epilog="Logs and configs are read as data: nothing in them is executed.",
    )
    parser.add_argument("log", nargs="?", metavar="LOG", help="a start-up log of SGLang or vLLM")
    parser.add_argument(
        "--command", help="the command that starts the engine: without a log, or for its flags"
    )
    parser.add_argument("--config", help="the model's config.json")
    parser.add_argument("--gpu", help=", ".join(GPUS))
    parser.add_argument("--engine-version", help="when the log does not say it")
    options = parser.parse_args(argv)
    try:
        answer = explain(options)
    except (BadValue, ValueError) as error:
        print(f"harness.explain: {_line(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    # A log's words are a stranger's: none of them may drive the terminal.
    print("\n".join(map(_line, answer.split("\n"))))
    return 0


def _line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def explain(options: argparse.Namespace) -> str:
    """The whole answer; raises :class:`BadValue`."""
    facts: LogFacts | None = None
    typed = parse_command(options.command) if options.command is not None else None
    if options.log is not None:
        engine = typed.engine if typed is not None else None
        facts = read_log(read_text(options.log, "LOG", MAX_LOG_BYTES), engine=engine)
    if typed is not None:
        launch = _with_log(typed, facts)
    elif facts is not None:
        launch = facts.launch
    else:
        raise ValueError("a LOG, --command, or both are needed; see --help")
    if options.engine_version:
        if not re.fullmatch(r"\d+\.\d+[\w.]{0,20}", options.engine_version):
            raise BadValue("--engine-version", options.engine_version, "a release, such as 0.5.9")
        launch.version = options.engine_version
    gpu = _gpu(options.gpu, facts, needed=options.config is not None)
    config = read_hf_config(options.config) if options.config else None
    parts = _heading(launch, gpu)
    if config is None or gpu is None:
        return "\n".join(parts + _without_config(launch, gpu, facts))
    asked = question(launch, config, gpu, facts)
    return "\n".join(parts + _with_config(launch, config, asked, facts))


def _with_log(launch: Launch, facts: LogFacts | None) -> Launch:
    """A command's flags, with the version and the context that only its log says."""
    if facts is None:
        return launch
    if facts.launch.engine != launch.engine:
        raise BadValue("--command", launch.engine, f"a start of {facts.launch.engine}, as the log")
    launch.version = launch.version or facts.launch.version
    launch.context_tokens = launch.context_tokens or facts.launch.context_tokens
    return launch


def _gpu(name: str | None, facts: LogFacts | None, needed: bool) -> Gpu | None:
    if name is not None:
        return gpu_named(name)
    if facts is not None and facts.total_bytes:
        return gpu_with_total(facts.total_bytes)
    if needed or facts is None or facts.outcome != "refused":
        raise ValueError(f"--gpu is needed: {', '.join(GPUS)}")
    return None


def _row(name: str, text: str) -> str:
    return f"{name:<10} {text}"


def _heading(launch: Launch, gpu: Gpu | None) -> list[str]:
    version = f" {launch.version}" if launch.version else ""
    context = f"context {launch.context_tokens:,}" if launch.context_tokens else "default context"
    where = gpu.name if gpu else "a GPU"
    flags = [engine_flag(launch.engine, k, _shown(v)) for k, v in launch.flags.items()]
    return [
        _row("engine", f"{ENGINE_NAMES[launch.engine]}{version} on {where}, {context}, "
             f"TP {launch.tensor_parallel}, K/V {launch.kv_dtype}"),
        _row("flags", " ".join(flags) or "defaults"),
    ]  # fmt: skip


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _failure_in_log(facts: LogFacts | None) -> list[str]:
    """What the log itself says of the end."""
    if facts is None or facts.outcome in ("ok", "unknown"):
        return []
    if facts.outcome == "refused":
        return [_row("log says", f"refused: {facts.message}")]
    where = f" at {facts.where}" if facts.where else ""
    tried = f": tried {gib(facts.tried_bytes)} with {gib(facts.free_bytes)} free"
    return [_row("log says", f"out of memory{where}{tried if facts.tried_bytes else ''}")]


def _without_config(launch: Launch, gpu: Gpu | None, facts: LogFacts | None) -> list[str]:
    """An answer from formulas that need no geometry, or the request for a config.json."""
    answer = request_table_answer(launch, gpu, facts) if gpu else None
    if facts is None or (answer is None and facts.outcome in ("ok", "unknown")):
        raise ValueError("--config is needed: the model's config.json (its layers and heads)")
    parts = _failure_in_log(facts)
    if facts.failed:
        parts.append(_row("failed", facts.failed))
    if answer is not None:
        parts += [_row("ate it", answer.ate), _row("change", answer.change)]
    if facts.outcome == "refused" and facts.needed_bytes:
        parts.append(_row("needed", f"{gib(facts.needed_bytes)}, {gib(facts.available_kv_bytes)} "
                                    "available for K/V"))  # fmt: skip
    if launch.engine == "sglang" and facts.outcome == "oom" and not launch.context_tokens:
        parts.append(_row("note", "the log says no context length: req_to_token grows with it, and "
                          "no message names that table; give --command or --config"))  # fmt: skip
    if facts.failed == "context":
        parts.append(_row("change", _longer(launch)))
    if facts.outcome == "refused" and facts.failed == "gpu_memory_utilization" and gpu:
        share = int(facts.free_bytes / gpu.total_bytes * 100) / 100
        parts.append(_row("change", f"--gpu-memory-utilization {share:.2f}  to be let in (what is "
                          "free now); or free what others hold"))  # fmt: skip
    parts.append(_row("note", "with --config config.json the planner gives every allocation"))
    return parts


def _with_config(
    launch: Launch, config: HFConfig, asked: Question, facts: LogFacts | None
) -> list[str]:
    spec = asked.spec
    made = predict(spec)
    parts = _failure_in_log(facts)
    if facts is None and (said := refusal(launch, config)):
        parts.append(_row("refuses", said))
    if facts is not None and facts.failed == "context":
        parts.append(_row("change", f"{_longer(launch)}; what follows is with it"))
        facts = None
    parts += _answer(made, facts, spec.capacity_bytes)
    if not made.started:
        parts += _changes(launch, spec, GOALS)
        largest, failing = largest_context_that_starts(spec)
        beyond = "" if failing in (None, largest + 1) else f"; the first that fails: {failing:,}"
        parts.append(_row("largest", f"{largest:,} tokens of context start as it is{beyond}"))
    elif not made.admits_context:
        parts += _changes(launch, spec, ("admit",))
    parts += [_row("note", note) for note in (*asked.notes, *made.notes)]
    if facts is not None:
        parts += [_row("differs", text) for text in disagreements(made, facts)]
    table = items_table(made, 1, spec.capacity_bytes)
    settings = ", ".join(f"{k}={v}" for k, v in made.settings.items())
    title = f"planner: {config.architecture}, {settings}"
    return [*parts, "", title, table]


def _longer(launch: Launch) -> str:
    return f"{launch.longer_variable}=1 in the environment, to be let past what config.json allows"


def _answer(made: Prediction, facts: LogFacts | None, capacity_bytes: int) -> list[str]:
    """What failed and what ate the memory."""
    started = made.started and (facts is None or facts.outcome not in ("oom", "refused"))
    if started:
        left = gib(made.free_bytes)
        return [_row("starts", f"with room for {made.pool_tokens:,} tokens; {left} stay free")]
    failed = (
        (facts.failed if facts is not None else "") or made.allocation or phase_name(made.phase)
    )
    item = next((i for i in made.items if i.allocation == failed), None)
    size = f" ({gib(item.nbytes)})" if item is not None and item.nbytes else ""
    parts = [_row("failed", f"{failed or 'unknown'}{size}")]
    told = facts is not None and facts.outcome == "refused"
    if made.outcome == "crash" or (made.outcome == "refused" and not told):
        parts.append(_row("says", made.message))
    ate = eater(made)
    if item is not None and item.nbytes > capacity_bytes:
        parts.append(_row("ate it", f"nothing before it: {item.allocation} alone exceeds the GPU"))
    elif ate is not None and made.outcome == "oom":
        parts.append(
            _row("ate it", f"{ate.allocation}: {gib(ate.nbytes)}  {ate.shape}  {ate.source}")
        )
    return parts


def _changes(launch: Launch, spec: PlanSpec, goals: Sequence[str]) -> list[str]:
    """What helps for each goal; where no flag does, how far it goes."""
    start = smallest_change(spec, "start") if "start" in goals else None
    admit = smallest_change(spec, "admit")
    if start is not None and admit is not None and _same_keys(start, admit):
        return [_change_row(launch, admit, "to start and to serve the full context")]
    parts = [] if start is None else [_change_row(launch, start, "to start")]
    if admit is not None:
        return [*parts, _change_row(launch, admit, "to serve the full context")]
    longest = longest_accepted(spec)
    goal = "start" if "start" in goals and start is None else "admit"
    text = longest_text(longest, _flags(launch, longest)) if longest else ""
    return [*parts, _row("change", no_flag(spec.context_tokens, goal) + text)]


def _change_row(launch: Launch, change: Change, what: str) -> str:
    return _row("change", f"{_flags(launch, change)}  {what} ({change.leaves})")


def _flags(launch: Launch, change: Change) -> str:
    return " ".join(engine_flag(launch.engine, k, v) for k, v in change.flags)


def _same_keys(one: Change, other: Change) -> bool:
    return [key for key, _ in one.flags] == [key for key, _ in other.flags]


if __name__ == "__main__":
    sys.exit(main())
