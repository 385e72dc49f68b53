"""Command lines that argparse reads: a complaint is one line, as everywhere in the harness."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harness.sizes import printable


class OneLineParser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that names what is wrong without its usage; exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line to stderr and exit."""
        name = (self.prog or "").removeprefix("python -m ")
        self.exit(2, f"{name}: {printable(message)[:300]}; see --help\n")
