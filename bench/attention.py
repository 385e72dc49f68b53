"""Time decode, prefill and append beside their peers: ``python -m bench.attention --out DIR``.

``DIR/attention.csv`` has the rows, ``DIR/manifest.json`` says what they were made by and on.
"""

from __future__ import annotations

import argparse
import gc
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import work_append, work_decode, work_prefill, work_rates
from bench.manifest import Manifest
from bench.peers import Peers
from bench.rows import Rows

GROUPS = {
    "rates": work_rates.jobs,
    "decode": work_decode.jobs,
    "prefill": work_prefill.jobs,
    "append": work_append.jobs,
}


SEED = 0


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of attention.csv")
    parser.add_argument("--only", default=",".join(GROUPS), help="groups, by commas")
    parser.add_argument("--peers", type=Path, help="folder of the peers (bench/README.md)")
    parser.add_argument("--budget-s", type=float, default=270.0, help="stop starting jobs after")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on any machine")
    parsed = parser.parse_args(words)
    unknown = set(parsed.only.split(",")) - set(GROUPS)
    if unknown:
        parser.error(f"--only={parsed.only}: allowed are {', '.join(GROUPS)}")
    if not parsed.dry_run and not torch.cuda.is_available():
        parser.error("no GPU: only --dry-run works here")
    return parsed


def run(rows: Rows, name: str, job: Callable[[], None]) -> None:
    """One job; what goes wrong in it is a row, and the next one runs."""
    if rows.spent():
        rows.add(None, None, work=name, gate=f"not run: {rows.budget_s:g} s were used up")
        return
    try:
        job()
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.add(None, None, work=name, gate=f"failed: {reason}")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(words: Sequence[str] | None = None) -> None:
    """Run the groups, the most telling jobs of all of them first."""
    argv = sys.argv[1:] if words is None else list(words)
    parsed = arguments(argv)
    torch.manual_seed(SEED)
    results = parsed.out / "attention.csv"
    rows = Rows(results, parsed.budget_s)
    manifest = Manifest(results, argv, SEED)
    peers = Peers(parsed.peers)
    for name, reason in peers.absent.items():
        rows.add(None, None, work="peers", kernel=name, gate=f"absent: {reason}")
    jobs = [
        (rank, job_name, job)
        for group in parsed.only.split(",")
        for rank, job_name, job in GROUPS[group](rows, peers, parsed.dry_run)
    ]
    for _, name, job in sorted(jobs, key=lambda item: item[0]):
        run(rows, name, job)
    manifest.finish(peers.described)


if __name__ == "__main__":
    main()
