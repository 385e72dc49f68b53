"""Starting an engine for a cell: its config.json, its spec, its keeper, and what became of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.cell import Cell
from harness.engines.keepers import Keepers, keeper_for
from harness.engines.protocol import BadRecord, Start, read_start
from harness.engines.rows import row_of, samples_of, timeline_of
from harness.engines.stand_in import stand_in
from harness.folder import FolderError, Outcome
from harness.launch import Job
from harness.rows import Row

LOG_BYTES = 60_000
# Options of a strategy -> the engine's own argument. `version` is checked, `usage` is a server's.
RENAMED = {"hybrid_kv_cache_manager": "disable_hybrid_kv_cache_manager"}
LEFT_OUT = ("version", "usage")
DEFAULTS = {"page_size": 1, "block_size": 16}


def run_engine(
    job: Job,
    scratch: Path,
    on_record: Callable[[Row], None] | None = None,
    keepers: Keepers | None = None,
) -> Outcome:
    """Start the engine of a job's cell and wait for its end, its timeout, or an interrupt.

    Parameters
    ----------
    scratch : Path
        Folder for the model, the specs and the records.
    on_record : callable, optional
        Told of each ledger event, once they are known.
    keepers : Keepers, optional
        An engine that is ready takes the start, and another is made ready beside it.

    Raises
    ------
    FolderError
        When the scratch folder cannot be written.
    """
    (cell,) = job.cells
    began = time.monotonic()
    try:
        keeper = keepers.take(cell) if keepers else keeper_for(cell)
        try:
            spec, records = _prepared(cell, scratch)
            keeper.hand_over(spec)
            keeper.wait(cell.settings.trial.timeout_seconds)
        finally:
            keeper.end()
        text = keeper.text(LOG_BYTES)
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


def _prepared(cell: Cell, scratch: Path) -> tuple[Path, Path]:
    """Write the model's config.json and both specs; returns the keeper's, and the records."""
    settings = cell.settings
    model = scratch / "model"
    model.mkdir(parents=True, exist_ok=True)
    config = stand_in(settings, cell.context_tokens).config()
    (model / "config.json").write_text(json.dumps(config, indent=1))
    spec, keeper, records = (scratch / n for n in ("start.json", "keeper.json", "records.jsonl"))
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
    kept = {
        "start": str(spec.resolve()),
        "records": str(records.resolve()),
        "timeout_seconds": settings.trial.timeout_seconds,
    }
    keeper.write_text(json.dumps(kept))
    return keeper, records


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
