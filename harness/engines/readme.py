"""Starts of the engines as a section of a page: ``python -m harness.engines.readme RUN PAGE``.

What lies between two marker lines of the page is replaced; a page without them gets them before the
heading that ``--before`` names, or at its end::

    <!-- real_engines: begin -->
    <!-- real_engines: end -->

Every figure comes from the run's summary.json (``pairs``, ``engine_brackets``), none from a hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from harness.arguments import OneLineParser
from harness.engines.tables import brackets, engine_name, flags, item, number, text
from harness.plots import FIGURES_FOLDER
from harness.runs import Run, RunError, clean, dicts, load_run, lookup, write_file
from harness.sizes import GIB
from harness.tabular import EMPTY, Table, markdown_text, tokens

BEGIN, END = "<!-- real_engines: begin -->", "<!-- real_engines: end -->"
HEADING = "### We started the real engines"
FIGURE = "real_engines.png"
LONG_CONTEXT = 10_000_000


def section(run: Run, page: Path) -> str:
    """The section for a page: a sentence, the figure, a table, what fails and what helps.

    Raises
    ------
    RunError
        When no engine was started in the run.
    """
    pairs = [p for p in dicts(run.summary, "pairs") if lookup(p, "engine_version")]
    if not pairs:
        raise RunError(f"{run.folder}: no engine was started; allowed: a run of real_engines")
    folder = os.path.relpath(run.folder, page.resolve().parent)
    lines = [BEGIN, "", HEADING, "", _sentence(run, pairs, folder)]
    if (run.folder / FIGURES_FOLDER / FIGURE).is_file():
        alt = "What each engine holds at start-up, itself and emulated"
        lines += ["", f"![{alt}]({folder}/{FIGURES_FOLDER}/{FIGURE})"]
    lines += ["", _table(pairs).markdown()]
    closed = brackets(run.summary)
    if closed.rows:
        lines += ["", closed.markdown()]
    lines += [line for said in (*_failures(pairs), *_helping(pairs)) for line in ("", said)]
    return "\n".join([*lines, "", END])


def _sentence(run: Run, pairs: list[dict[str, Any]], folder: str) -> str:
    names = list(dict.fromkeys(engine_name(p) for p in pairs))
    devices = run.rows.loc[run.rows["engine_version"] != "", "device_name"]
    device = ", ".join(dict.fromkeys(clean(d) for d in devices))
    agreed = sum(lookup(p, "agree") is True for p in pairs)
    ended = sum(_ended_alike(p) for p in pairs)
    return (
        f"{' and '.join(markdown_text(n) for n in names)}, started on one {markdown_text(device)} "
        f"with dummy weights, FP8 K/V and a model shaped like one rank "
        f"([`{Path(folder).name}`]({folder})). In {ended} of {len(pairs)} starts the engine, its "
        f"emulation and the planner end alike; in {agreed} every figure agrees within 1 % as well."
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
                "yes" if lookup(pair, "agree") is True else "no",
            )
        )
    columns = ("engine", "model", ">context", "flags", "ended", ">pool, tokens",
               ">held at ready, GiB", "emulation agrees")  # fmt: skip
    return Table("", columns, tuple(lines))


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
    """The flags with which an engine starts a context that it does not start without."""
    out = []
    for pair in pairs:
        if lookup(pair, "status", "real") != "ok" or flags(pair) == "defaults":
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


def placed(page: str, made: str, before: str = "") -> str:
    """The page with the section in it: between its markers, before a heading, or at the end."""
    start, end = page.find(BEGIN), page.find(END)
    if 0 <= start < end:
        return page[:start] + made + page[end + len(END) :]
    at = page.find(f"\n{before}\n") if before else -1
    if at < 0:
        return page.rstrip("\n") + f"\n\n{made}\n"
    return f"{page[: at + 1]}{made}\n\n{page[at + 1 :]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the section; 0, or 2 for bad input."""
    parser = OneLineParser(
        prog="python -m harness.engines.readme",
        description="Write what starts of the engines showed into a Markdown page.",
        epilog="Exit status: 0, or 2 for bad input.",
    )
    parser.add_argument("run", metavar="RUN", help="the folder of an experiment=real_engines")
    parser.add_argument("page", metavar="PAGE", type=Path, help="a Markdown page, README.md say")
    parser.add_argument("--before", default="", help="a heading's line, for a page without markers")
    options = parser.parse_args(arguments)
    try:
        run = load_run(options.run)
        page = options.page.read_text(encoding="utf-8")
        made = section(run, options.page)
        write_file(options.page, placed(page, made, options.before))
    except (RunError, OSError) as error:
        print(f"harness.engines.readme: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
