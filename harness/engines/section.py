"""Starts of the engines as a section of a page (:mod:`harness.pages`).

Every figure comes from the run's summary.json (``pairs``, ``engine_brackets``), none from a hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.engines.stand_in import ARCHITECTURE
from harness.engines.tables import brackets, engine_name, flags, item, number, text
from harness.plots import FIGURES_FOLDER
from harness.runs import Run, RunError, clean, dicts, lookup
from harness.sizes import GIB
from harness.tabular import EMPTY, Table, markdown_text, tokens

FIGURE = "real_engines.png"


def engines(runs: list[Run], folders: list[str]) -> str:
    """Of each run a sentence, the figure, a table of the starts, what fails and what helps.

    Parameters
    ----------
    runs : list of Run
        Of ``experiment=real_engines``.
    folders : list of str
        Their folders as seen from the page.

    Raises
    ------
    RunError
        When no engine was started in a run.
    """
    return "\n\n".join(_started(*pair) for pair in zip(runs, folders, strict=True))


def _started(run: Run, folder: str) -> str:
    pairs = [p for p in dicts(run.summary, "pairs") if lookup(p, "engine_version")]
    if not pairs:
        raise RunError(f"{run.folder}: no engine was started; allowed: a run of real_engines")
    parts = [_sentence(run, pairs, folder)]
    if (run.folder / FIGURES_FOLDER / FIGURE).is_file():
        alt = "What each engine holds at start-up"
        parts.append(f"![{alt}]({folder}/{FIGURES_FOLDER}/{FIGURE})")
    parts.append(_table(pairs).markdown())
    closed = brackets(run.summary)
    if closed.rows:
        parts.append(closed.markdown())
    return "\n\n".join([*parts, *_failures(pairs), *_helping(pairs)])


def _sentence(run: Run, pairs: list[dict[str, Any]], folder: str) -> str:
    names = list(dict.fromkeys(engine_name(p) for p in pairs))
    devices = run.rows.loc[run.rows["engine_version"] != "", "device_name"]
    device = ", ".join(dict.fromkeys(clean(d) for d in devices))
    agreed = sum(lookup(p, "agree") is True for p in pairs)
    ended = sum(_ended_alike(p) for p in pairs)
    emulated = any(lookup(p, "emulated_trial") for p in pairs)
    three = (
        "the engine, its emulation and the planner" if emulated else "the engine and the planner"
    )
    return (
        f"{' and '.join(markdown_text(n) for n in names)}, started on one {markdown_text(device)} "
        f"with dummy weights, FP8 K/V and a dense `{ARCHITECTURE}` shaped like one rank of the "
        f"model ([`{Path(folder).name}`]({folder})). In {ended} of {len(pairs)} starts {three} "
        f"end alike; in {agreed} every figure agrees within 1 % as well."
    )


def _ended_alike(pair: dict[str, Any]) -> bool:
    said = {lookup(pair, "status", who) for who in ("real", "emulated", "planned")}
    return len(said - {None}) == 1


def _table(pairs: list[dict[str, Any]]) -> Table:
    lines = []
    for pair in pairs:
        if lookup(pair, "purpose") == "bracket":
            continue
        status, failing = lookup(pair, "status", "real"), lookup(pair, "failing", "real")
        lines.append(
            (
                engine_name(pair),
                text(pair, "model"),
                _tokens(lookup(pair, "context_tokens")),
                flags(pair),
                clean(status) + (f": {clean(failing)}" if failing else ""),
                _count(item(pair, "pool tokens")),
                _gib(item(pair, "whole at ready")),
                ", ".join(_off(pair)) or EMPTY,
            )
        )
    columns = ("engine", "model", ">context", "flags", "ended", ">pool, tokens",
               ">held at ready, GiB", "off by more than 1 %")  # fmt: skip
    return Table("", columns, tuple(lines))


def _off(pair: dict[str, Any]) -> list[str]:
    """Names of the figures that do not agree; how it ended, where that does not."""
    items = [i for i in dicts(pair, "items") if lookup(i, "agree") is not True]
    return [text(i, "item") for i in items] + ([] if _ended_alike(pair) else ["how it ended"])


def _failures(pairs: list[dict[str, Any]]) -> list[str]:
    """Each engine's and model's failure with default flags: its line, and what held most."""
    out: dict[tuple[str, str], str] = {}
    for pair in pairs:
        key = (engine_name(pair), text(pair, "model"))
        if lookup(pair, "status", "real") != "oom" or flags(pair) != "defaults" or key in out:
            continue
        largest = max(
            (i for i in dicts(pair, "items") if _is_table(i)),
            key=lambda i: number(lookup(i, "real")) or 0.0,
            default={},
        )
        held = ""
        if largest:
            held = f"; `{text(largest, 'item')}` held {_gib(lookup(largest, 'real'))} GiB"
        out[key] = (
            f"{markdown_text(key[0])}, {markdown_text(key[1])}, at "
            f"{_tokens(lookup(pair, 'context_tokens'))} with default flags fails at "
            f"`{text(pair, 'where')}`: {_gib(item(pair, 'asked for'))} GiB asked for by "
            f"`{clean(lookup(pair, 'failing', 'real'))}`, {_gib(item(pair, 'free before it'))} GiB "
            f"free before it{held}."
        )
    return list(out.values())


def _is_table(one: dict[str, Any]) -> bool:
    named = text(one, "item")
    return named not in ("weights", "kv_pool", "asked for", "free before it", "whole at ready")


def _helping(pairs: list[dict[str, Any]]) -> list[str]:
    """The fewest flags with which an engine starts a context that it does not start without."""
    out = []
    good = [p for p in pairs if lookup(p, "status", "real") == "ok" and flags(p) != "defaults"]
    for pair in good:
        mine = lookup(pair, "flags").items()
        if any(lookup(p, "flags").items() < mine for p in good if _same(p, pair)):
            continue
        without = [p for p in pairs if flags(p) == "defaults" and _same(p, pair)]
        if without and all(lookup(p, "status", "real") != "ok" for p in without):
            context = _tokens(lookup(pair, "context_tokens"))
            out.append(
                f"With `{flags(pair)}` {markdown_text(engine_name(pair))} starts "
                f"{markdown_text(text(pair, 'model'))} at {context}: "
                f"room for {_count(item(pair, 'pool tokens'))} tokens, "
                f"{_gib(item(pair, 'whole at ready'))} GiB held."
            )
    return out


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    keys = ("strategy", "model", "context_tokens")
    return all(one.get(k) == other.get(k) for k in keys)


def _tokens(value: object) -> str:
    found = number(value)
    return EMPTY if found is None else tokens(found)


def _count(value: object) -> str:
    found = number(value)
    return EMPTY if found is None else f"{found:,.0f}"


def _gib(value: object) -> str:
    found = number(value)
    return EMPTY if found is None else f"{found / GIB:.2f}"
