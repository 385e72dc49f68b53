"""Checks of where a folder's rows come from: which commit, which configuration, which GPU."""

from __future__ import annotations

import re
from typing import Any

import pandas as pd

from harness.check_rules import Result, failed, named, not_applicable, passed
from harness.provenance import hash_in
from harness.runs import Run, clean, dicts, lookup
from harness.sources import arms_of

# As harness.folder names a run: when it began, the first digits of its hash, a number if taken.
RUN_ID = re.compile(r"\d{8}-\d{6}-(?P<hash>[0-9a-f]{6})(-\d+)?")
# Ends of a process that could not say any more which GPU it had.
DIED = ("crash", "timeout", "oom_host")
PAIR = ["pair_id", "strategy", "strategy_options"]  # an engine's start and its emulation have alike


def tree(run: Run) -> Result:
    """Check that the code that ran is a commit, without local changes."""
    dirty: Any = lookup(run.manifest, "git", "dirty")
    if not isinstance(dirty, bool):
        return not_applicable("no commit in the manifest")
    if dirty:
        return failed("uncommitted changes; the manifest holds their hash")
    return passed(f"commit {str(lookup(run.manifest, 'git', 'commit', default=''))[:12]}, clean")


def identity(run: Run) -> Result:
    """Check a run's id, that it ends in its configuration's hash, and that rows have such ids.

    The hash of config.yaml itself may be another one: rules of what is part of it change.
    """
    digest = lookup(run.manifest, "config_hash")
    if not isinstance(digest, str) or not digest:
        return not_applicable("no hash of the configuration in the manifest")
    match = RUN_ID.fullmatch(run.run_id)
    if match is None:
        return failed(f"run id {run.run_id!r:.60} is not of the form DATE-TIME-HASH")
    if not digest.startswith(match["hash"]):
        return failed(f"run id ends in {match['hash']}, the configuration's hash is {digest:.16}")
    if not hash_in(run.folder):
        return failed("config.yaml holds no settings of a run")
    strange = sorted({r for r in run.rows["run_id"] if not RUN_ID.fullmatch(str(r))})
    if strange:
        return failed(f"rows of a run {clean(strange[0])!r:.60}: not of the form DATE-TIME-HASH")
    return passed(f"configuration {match['hash']}")


def one_gpu(run: Run) -> Result:
    """Check that each rank's trials, of all attempts of a run, ran on one GPU, and name it.

    Jobs of a cluster's sweep have a GPU each: there it is asked of each arm. Starts of engines take
    a minute each, and what is compared is an engine and its emulation: there it is asked of each
    such pair, so that a run may be taken up on another machine.
    """
    measured = run.rows[run.rows["basis"] == "measured"]
    own = measured[measured["run_id"] == run.run_id]
    if not own.empty and not own["gpu_uuid"].any():
        return _named_once(run)
    if own.empty:
        why = "rows of earlier runs" if len(measured) else "no row was measured on a GPU"
        return not_applicable(why)
    parts: list[pd.DataFrame] = [own]
    if dicts(run.manifest, "jobs"):
        parts = list(arms_of(own).values())
    elif (own["engine_version"] != "").any():
        parts = [pair for _, pair in own.groupby(PAIR, dropna=False)]
    every: set[str] = set()
    for part in parts:
        for rank, rows in part.groupby("rank", dropna=False):
            fault = _fault(rows)
            if fault:
                return failed(fault if rank == 0 else f"rank {rank:g}: {fault}")
            every |= set(rows["gpu_uuid"]) - {""}
    return _attempts(run, every)


def _named_once(run: Run) -> Result:
    """Judge rows from before they named their GPU, by what the manifest read before and after."""
    before, after = (
        {clean(g["uuid"]) for g in dicts(run.manifest, key) if g.get("uuid")}
        for key in ("gpus", "gpus_after")
    )
    attempts = len(dicts(run.manifest, "attempts"))
    # The GPU was read before the first attempt and after the last: two have one each.
    if attempts <= 2 and len(before) == 1 and before == after:
        return passed(f"{before.pop()} (rows do not name their GPU)")
    return failed(f"rows do not name their GPU; {attempts} attempts")


def _fault(rows: pd.DataFrame) -> str:
    """Return what is wrong with the GPUs that one rank's rows name; empty when they name one."""
    reached = rows[~rows["status"].isin(DIED)]
    silent = reached[reached["gpu_uuid"] == ""]
    if not silent.empty:
        return f"{len(silent)} of {len(reached)} rows do not name their GPU: {named(silent)}"
    found = sorted(set(rows["gpu_uuid"]) - {""})
    return f"{len(found)} GPUs: {', '.join(found)}" if len(found) > 1 else ""


def _attempts(run: Run, rows: set[str]) -> Result:
    """Compare the GPU that each attempt began on with those that the rows name."""
    if not rows:
        return not_applicable("no trial reached its GPU")
    named_rows = ", ".join(sorted(rows))
    if dicts(run.manifest, "jobs"):  # the process that hands them out needs no GPU of its own
        return passed(f"jobs of a cluster, a GPU each: {named_rows}")
    attempts = dicts(run.manifest, "attempts")
    began = [_texts(one.get("gpu_uuids")) for one in attempts]
    silent = sum(not one for one in began)
    if silent:
        return failed(f"{silent} of {len(attempts)} attempts do not name their GPU")
    odd = sorted({u for one in began for u in one} - rows)
    # An instance of a GPU (MIG) has an identity of its own.
    if odd and not any(u.startswith("MIG-") for u in (*odd, *rows)):
        return failed(f"an attempt began on {', '.join(odd)}; the rows name {named_rows}")
    return passed(f"{len(attempts)} attempt{'s' * (len(attempts) != 1)}, {named_rows}")


def _texts(value: object) -> list[str]:
    return [clean(v) for v in value] if isinstance(value, list) else []
