"""The spec of a start, which an adapter waits for with the libraries of every engine loaded.

Loading them takes a third of a start, and no GPU: it can be done while another engine is measured.
Nothing of the engine itself is loaded before there is a spec, as that may open the device.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import time

LIBRARIES = (
    "torch",
    "torch._dynamo",
    "torchvision",
    "transformers.generation.candidate_generator",
    "scipy.stats",
    "openai",
    "fastapi",
)


def awaited_spec() -> tuple[str, float]:
    """Load the libraries, then read the spec's path, one line of standard input.

    Returns
    -------
    tuple of (str, float)
        The path, ``""`` when the input ends without one, and the seconds that loading took. The
        current folder is then the spec's.
    """
    began = time.monotonic()
    for library in LIBRARIES:
        with contextlib.suppress(Exception):  # the engine says which of them it misses
            importlib.import_module(library)
    seconds = time.monotonic() - began
    path = sys.stdin.readline().strip()
    if path:
        os.chdir(os.path.dirname(path))
    return path, seconds
