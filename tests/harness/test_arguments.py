"""Words that argparse refuses: one line, whichever command reads them."""

from __future__ import annotations

import pytest

from harness import check, compare, explain, report

COMMANDS = {"check": check, "compare": compare, "explain": explain, "report": report}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((name, ["RUN", "--nonsense"]) for name in COMMANDS),
        *((name, []) for name in ("check", "compare", "report")),
        ("compare", ["RUN", "--strategies", "static"]),
        ("compare", ["RUN", "--seed", "many\nlines"]),
        ("explain", ["LOG", "--gpu"]),
        ("explain", ["a", "b\x1b[31m"]),
    ],
)
def test_a_complaint_is_one_line(command, words, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command].main(words)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith(f"harness.{command}: ") and line.isprintable() and "--help" in line


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_printed_whole(command, capsys):
    with pytest.raises(SystemExit) as ended:
        COMMANDS[command].main(["--help"])
    said = capsys.readouterr()
    assert ended.value.code == 0 and said.err == "" and "usage: python -m harness." in said.out
