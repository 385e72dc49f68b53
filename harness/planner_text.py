"""The planner's answers as people read them: tables, the verdict, what ate the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from harness.phases import phase_name
from harness.planner_changes import Change
from harness.planner_spec import OomPoints, PlanItem, PlanSpec, Prediction
from harness.sizes import gib, tokens_text

SMALL_BYTES = 32 << 20
SMALL_NAME = "small buffers"


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """Lay out a table in plain text; columns in ``right`` are aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        cells = [
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
    out.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(out)


def items_table(made: Prediction, scale: int, capacity_bytes: int) -> str:
    """Every allocation in order, with what is held and what is free after it."""
    rows: list[list[str]] = []
    held = 0
    for item in _merged(made.items, SMALL_BYTES // scale):
        named = [phase_name(item.phase), item.allocation]
        size = gib(item.nbytes * scale)
        if item.location != "device":
            where = "pinned host memory" if item.location == "host_pinned" else "host memory"
            rows.append([*named, size, "", "", f"{where}  {item.shape}"])
        elif item.failed:
            end = "FAILS" if made.outcome == "oom" else "REFUSED"
            free = gib(made.free_bytes * scale)
            rows.append([*named, size, end, free, item.shape])
        else:
            held += item.nbytes
            free = gib((capacity_bytes - held) * scale)
            rows.append([*named, size, gib(held * scale), free, item.shape])
    header = ("phase", "allocation", "bytes", "held", "free", "shape")
    return aligned(header, rows, (2, 3, 4))


def _merged(items: Sequence[PlanItem], small_bytes: int) -> list[PlanItem]:
    """Items with neighbours of the workspace that are small added up."""
    out: list[PlanItem] = []
    for item in items:
        own = item.phase == "workspace" and item.nbytes < small_bytes and not item.failed
        if own and out and out[-1].allocation == SMALL_NAME:
            out[-1] = replace(out[-1], nbytes=out[-1].nbytes + item.nbytes)
        else:
            out.append(replace(item, allocation=SMALL_NAME, shape="") if own else item)
    return out


def points_table(points: OomPoints, context_tokens: int) -> str:
    """Lay out the three OOM points, which are looked for up to the configured context."""
    rows = []
    ends = {"sweep_end": f"no failure up to {tokens_text(context_tokens)}, the context asked for"}
    for name in ("startup", "admit", "resident"):
        point = getattr(points, name)
        where = f"{phase_name(point.phase)} {point.allocation}".strip()
        limit = ends.get(point.limited_by, point.limited_by)
        rows.append([name, _tokens(point.ok), _tokens(point.not_ok), f"{limit}  {where}".strip()])
    return aligned(("OOM point", "largest ok", "smallest not ok", "limited by"), rows, (1, 2))


def _tokens(tokens: int | None) -> str:
    return "-" if tokens is None else f"{tokens:,}"


def eater(made: Prediction) -> PlanItem | None:
    """Find what ate the memory of a failed start: the largest table, buffer or weight before it.

    The pool itself is sized by what is left, so it is never the answer; it is what fails.
    """
    taken = [
        i
        for i in made.items
        if i.location == "device" and not i.failed and i.phase in ("tables", "workspace", "weights")
    ]
    return max(taken, key=lambda i: i.nbytes, default=None)


def verdict(spec: PlanSpec, made: Prediction) -> str:
    """One line: whether it starts, and what it can then hold."""
    context = tokens_text(spec.context_tokens)
    scale = spec.scale
    if not made.started:
        return f"{spec.strategy} does not start at {context}: {_failure(made, scale)}"
    text = f"{spec.strategy} starts at {context}"
    if not made.admits_context:
        text += (
            f"; it accepts requests of up to {made.max_request_tokens:,} tokens, not of {context}"
        )
    if made.outcome != "ok":
        how = "is refused" if made.outcome == "refused" else "runs out of memory"
        text += f"; filling {how} at {made.resident_tokens:,} tokens"
    return f"{text}; {gib(made.held_bytes * scale)} held at the end"


def _failure(made: Prediction, scale: int) -> str:
    asked, free = gib(made.requested_bytes * scale), gib(made.free_bytes * scale)
    if made.outcome == "refused":
        return f"refused: {made.message or made.allocation}"
    if made.outcome == "crash":
        return f"it crashes: {made.message}"
    text = f"{made.allocation} ({phase_name(made.phase)}) asks {asked}, {free} are free"
    ate = eater(made)
    if ate is not None and ate.nbytes * 4 > made.requested_bytes:
        text += f"; {ate.allocation} took {gib(ate.nbytes * scale)} before it"
    return text


def change_lines(
    context_tokens: int, changes: Mapping[str, Change | None], longest: Change | None
) -> list[str]:
    """Say what the smallest changes are, what they cost and leave; else how far it goes."""
    start, admit = changes.get("start"), changes.get("admit")
    told = list(changes.items())
    if len(told) > 1:
        if start is None or (admit is not None and start.flags == admit.flags):
            told = told[:1]  # what does not start accepts nothing
        elif admit is not None and _keys(start) == _keys(admit):
            told = told[1:]
    return [_change_line(context_tokens, goal, change, longest) for goal, change in told]


def _keys(change: Change) -> list[str]:
    return [key for key, _ in change.flags]


def _change_line(
    context_tokens: int, goal: str, change: Change | None, longest: Change | None
) -> str:
    if change is None:
        text = longest_text(longest, longest.text) if longest else ""
        return no_flag(context_tokens, goal) + text
    what = "start" if goal == "start" else "accept a request of the full context"
    return f"smallest change that lets it {what}: {change.text}  ({change.leaves})"


def no_flag(context_tokens: int, goal: str) -> str:
    """Say that no change of flags does it."""
    what = "start at" if goal == "start" else "accept a request of"
    return f"no flag lets it {what} {tokens_text(context_tokens)}"


def longest_text(longest: Change, flags: str) -> str:
    """Go on with the longest context that is accepted, and the flags as they are typed."""
    tokens = longest.spec.context_tokens
    return f"; the longest that it accepts is {tokens:,} tokens: {flags}  ({longest.leaves})"
