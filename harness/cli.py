"""The command: ``python -m harness [group=option] [key=value] [-m]``.

Exit 0 when every trial ended in a recorded status, 2 for bad input (one line, nothing written),
1 for a fault of the harness, 130 after Ctrl-C (the folder stays readable and is resumed by the
same command).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from harness import hydra_flags
from harness.closed_pipe import ends_quietly
from harness.compose import as_typed
from harness.folder import FolderError
from harness.lock import Busy
from harness.ranks import BadLaunch
from harness.ranks_meeting import Unmet
from harness.settings import Settings
from harness.sizes import BadValue, printable

MULTIRUN_FLAGS = ("-m", "--multirun")


@ends_quietly
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    shown = hydra_flags.asked(words)
    multirun = any(w in MULTIRUN_FLAGS for w in words)
    unknown = [w for w in words if w.startswith("-") and w not in MULTIRUN_FLAGS]
    if unknown and not shown:
        print(f"harness: {unknown[0]}: no such option; see --help", file=sys.stderr)
        return 2
    overrides = [w for w in words if w not in MULTIRUN_FLAGS]
    try:
        if shown:
            return hydra_flags.show(words)
        from harness.arms import settings_of_command
        from harness.cluster import launch, split_words
        from harness.engines.choose import chosen
        from harness.ranks_relay import joined_world, run_as

        overrides, launcher = split_words(overrides)
        if launcher:
            if not multirun:
                raise BadValue("hydra/launcher", " ".join(launcher), "only together with -m")
            return launch(overrides, launcher, words)
        settings, skipped = chosen(settings_of_command(overrides, multirun))
        for line in skipped:
            print(line, flush=True)
        with joined_world() as world:
            return run_as(world, settings, lambda: _run(settings, words))
    except (BadValue, FolderError, Busy) as refused:
        error = as_typed(refused, words) if isinstance(refused, BadValue) else refused
        _say(f"harness: {printable(error)}", own=isinstance(refused, (BadLaunch, Unmet)))
        return 2
    except KeyboardInterrupt:
        _say("\nharness: interrupted; the same command resumes this run")
        return 130


def _say(line: str, own: bool = False) -> None:
    """One line, however many ranks find the same fault or are interrupted together.

    ``own``: a fault that other ranks need not have.
    """
    if own or os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr)


def _run(settings: list[Settings], words: list[str]) -> int:
    from harness.session import run_session

    outcome = run_session(settings, words, Path(settings[0].results))
    return 0 if outcome else 1


if __name__ == "__main__":
    sys.exit(main())
