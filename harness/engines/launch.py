"""Starting an engine for a cell: its config.json, its spec, its keeper, and what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cell import Cell
from harness.engines.keeper import REAP_SECONDS
from harness.engines.protocol import BadRecord, Start, read_start
from harness.engines.rows import row_of, samples_of, timeline_of
from harness.engines.stand_in import stand_in
from harness.folder import FolderError, Outcome
from harness.launch import Job
from harness.lock import held_files
from harness.rows import Row

POLL_SECONDS = 0.05
LOG_BYTES = 60_000
ADAPTERS = Path(__file__).resolve().parent / "adapters"
# Ours, which would hide the engine's own packages from it.
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
# Options of a strategy -> the engine's own argument. `version` is checked, `usage` is a server's.
RENAMED = {"hybrid_kv_cache_manager": "disable_hybrid_kv_cache_manager"}
LEFT_OUT = ("version", "usage")
DEFAULTS = {"page_size": 1, "block_size": 16}


def run_engine(job: Job, scratch: Path, on_record: Callable[[Row], None] | None = None) -> Outcome:
    """Start the engine of a job's cell and wait for its end, its timeout, or an interrupt.

    Parameters
    ----------
    scratch : Path
        Folder for the model, the specs, the records and the log.
    on_record : callable, optional
        Told of each ledger event, once they are known.

    Raises
    ------
    FolderError
        When the scratch folder cannot be written.
    """
    (cell,) = job.cells
    began = time.monotonic()
    try:
        spec, records, log = _prepared(cell, scratch)
        with open(log, "wb") as out:
            keeper = subprocess.Popen(
                [sys.executable, "-m", "harness.engines.keeper", str(spec)],
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=held_files(),
                env=environment(cell),
            )
            _wait(keeper, cell.settings.trial.timeout_seconds)
        text = log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
    except OSError as error:
        raise FolderError(f"{scratch}: cannot be written ({error.strerror})") from None
    seconds = time.monotonic() - began
    fault = ""
    try:
        start = read_start(records)
    except BadRecord as error:
        start, fault = Start(), str(error)
    row = row_of(cell, job.extra, start, text, seconds, fault)
    timeline = timeline_of(cell, start)
    for event in timeline if on_record is not None else ():
        on_record({"type": "timeline", "row": event})  # type: ignore[misc]
    return Outcome([row], timeline, samples_of(cell, start), text)


def _prepared(cell: Cell, scratch: Path) -> tuple[Path, Path, Path]:
    """Write the model's config.json and both specs; returns the keeper's, the records, the log."""
    settings = cell.settings
    model = scratch / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = stand_in(settings, cell.context_tokens).config()
    (model / "config.json").write_text(json.dumps(config, indent=1))
    spec, keeper, records, log = (
        scratch / n for n in ("start.json", "keeper.json", "records.jsonl", "log.txt")
    )
    records.write_bytes(b"")
    start = {
        "engine": settings.strategy,
        "version": settings.options["version"],
        "model": str(model.resolve()),
        "flags": flags_of(cell),
        "gpu_uuid": settings.hardware.uuid,
        "records": str(records.resolve()),
    }
    spec.write_text(json.dumps(start, indent=1))
    adapter = ADAPTERS / f"start_{settings.strategy}.py"
    kept = {
        "parent": os.getpid(),
        "command": [settings.engine["python"], str(adapter), str(spec.resolve())],
        "folder": str(scratch.resolve()),
        "records": str(records.resolve()),
        "timeout_seconds": settings.trial.timeout_seconds,
    }
    keeper.write_text(json.dumps(kept))
    return keeper, records, log


def flags_of(cell: Cell) -> dict[str, Any]:
    """The engine's own arguments: the context, the K/V dtype, and every option that is set."""
    settings = cell.settings
    kv_dtype = settings.model.kv_dtype if settings.model.kv_dtype != "bf16" else "auto"
    flags: dict[str, Any] = {"kv_cache_dtype": kv_dtype}
    for key, value in settings.options.items():
        if key in LEFT_OUT or value is None or DEFAULTS.get(key) == value:
            continue
        if key in RENAMED:
            flags[RENAMED[key]] = not value
        elif value is not False:
            flags[key] = value
    if settings.strategy == "sglang":
        return flags | {"context_length": cell.context_tokens}
    length = flags.get("max_model_len")
    return flags | {"max_model_len": -1 if length == "auto" else length or cell.context_tokens}


def environment(cell: Cell) -> dict[str, str]:
    """The keeper's environment: ours, one GPU of it; the engine is not given our packages."""
    own = {k: v for k, v in os.environ.items() if k not in NOT_INHERITED}
    own |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ADAPTERS.parents[2])}
    index = cell.settings.hardware.index
    visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v.strip()]
    if index or len(visible) > 1:
        own["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    return own


def _wait(keeper: subprocess.Popen[bytes], limit_seconds: float) -> None:
    """Wait for the keeper, which ends the engine in time; end both when we are interrupted."""
    deadline = time.monotonic() + limit_seconds + 2 * REAP_SECONDS
    try:
        while keeper.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
    finally:
        if keeper.poll() is None:
            keeper.send_signal(signal.SIGTERM)
            try:
                keeper.wait(2 * REAP_SECONDS)
            except subprocess.TimeoutExpired:
                keeper.kill()
                keeper.wait()
