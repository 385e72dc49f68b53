"""An example of ``python -m harness.explain`` for a page: the error, the command, its answer."""

from __future__ import annotations

import contextlib
import io
import shlex
from pathlib import Path

from harness import explain
from harness.runs import RunError

FILES = ("error.log", "config.json", "command.txt")
SHOWN_LETTERS = 150  # of a line of the error


def explained(page_folder: Path, name: str) -> str:
    """Return a console's text: an error as it was printed, the command, and what it answers.

    Parameters
    ----------
    page_folder : Path
    name : str
        The example's folder, as seen from the page: ``error.log``, ``config.json`` and
        ``command.txt``, the command that gave the error.

    Raises
    ------
    RunError
        When a file is not there, or the command refuses them.
    """
    error, config, command = (page_folder / name / file for file in FILES)
    try:
        printed = error.read_text(encoding="utf-8").splitlines()
        started = command.read_text(encoding="utf-8").strip()
    except OSError as problem:
        raise RunError(f"{page_folder / name}: {problem.strerror}: {problem.filename}") from None
    words = [str(error), "--command", started, "--config", str(config)]
    out, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(said):
        code = explain.main(words)
    if code:
        raise RunError(f"{page_folder / name}: {said.getvalue().strip()}")
    typed = [
        f"$ tail -n {len(printed)} {name}/{FILES[0]}",
        *map(_shortened, printed),
        f"$ python -m harness.explain {name}/{FILES[0]} --config {name}/{FILES[1]} \\",
        f"    --command {shlex.quote(started)}",
    ]
    return "\n".join(["```console", *typed, out.getvalue().rstrip("\n"), "```"])


def _shortened(line: str) -> str:
    return line if len(line) <= SHOWN_LETTERS else f"{line[:SHOWN_LETTERS].rsplit(' ', 1)[0]} …"
