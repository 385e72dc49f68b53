"""A run's folder as a sweep would leave it, made from arithmetic: an input of tests, no result."""

from __future__ import annotations

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from harness.claims import decide
from harness.columns import COLUMNS, TIMELINE_COLUMNS, ordered
from harness.ranks_summary import per_trial
from harness.sizes import GIB
from harness.summary import summarise

GPU_UUID = "GPU-00000000-0000-4000-8000-000000000000"
DEVICE_BYTES = 149_557_477_376
CHUNK_BYTES = 66 * 2**20
CONTEXTS = (100_000, 1_000_000, 5_000_000, 10_000_000)
SAMPLED = {
    "decode": "attention_decode_step_ms",
    "prefill": "attention_prefill_chunk_ms",
    "decode_all_ranks": "parallel_decode_step_ms",
    "collectives": "collective_ms",
}
SUMMARY: dict[str, Any] = {
    "schema": 1,
    "strategies": {
        "static": {
            "startup": {"ok": 5_800_000, "not_ok": 5_802_816, "limited_by": "oom"},
            "admit": {"ok": 5_800_000, "not_ok": 5_802_816, "limited_by": "oom"},
            "resident": {"ok": 5_800_000, "not_ok": 5_802_816, "limited_by": "oom"},
            "peak_device_bytes": 149_000_000_000,
            "decode": [{"resident_tokens": 100_000, "attention_decode_tokens_per_second": 1790.0}],
        },
        "paged": {
            "startup": {"ok": 10_000_000, "not_ok": None, "limited_by": "sweep_end"},
            "admit": {"ok": 10_000_000, "not_ok": None, "limited_by": "sweep_end"},
            "resident": {"ok": 5_800_000, "not_ok": 5_802_816, "limited_by": "oom"},
            "peak_device_bytes": 149_500_000_000,
            "decode": [],
        },
    },
    "claims": [
        {
            "id": "C1",
            "verdict": "conditional",
            "condition": "at 24 KiB a token it cannot start; at 12 KiB it starts",
            "basis": "measured",
            "measured": 228.88,
            "reported": 182,
            "trials": ["abc"],
        }
    ],
}
MANIFEST: dict[str, Any] = {
    "schema": 1,
    "run_id": "20261124-000000-012345",
    "experiment": "sweep",
    "started_utc": "2026-11-24T00:00:00+00:00",
    "finished_utc": "2026-11-24T00:06:00+00:00",
    "argv": ["-m", "strategy=static,paged", "context=10M"],
    "command": "python -m harness -m strategy=static,paged context=10M",
    "config_hash": "0123456789abcdef",
    "git": {"commit": "c" * 40, "dirty": False, "diff_sha": ""},
    "versions": {"torch": "2.13.0"},
    "hardware": {"kind": "cuda", "device_name": "NVIDIA H200", "uuid": GPU_UUID},
    "gpus": [{"name": "NVIDIA H200", "uuid": GPU_UUID, "throttle_reasons": "0x0"}],
    "attempts": [{"pid": 1, "commit": "c" * 40, "gpu_uuids": [GPU_UUID]}],
    "environment": {},
    "seeds": [0],
}


def cell(strategy: str, context: int, fill: float, **given: Any) -> dict[str, Any]:
    """One row; ``given`` overrides any column. ``scale`` divides every byte."""
    scale = given.get("scale", 1)
    repeat = given.get("repeat", 0)
    token = 24_576 // scale
    chunk = CHUNK_BYTES if scale == 1 else 352 * 1024
    rest = {k: n * GIB // scale for k, n in (("context", 1), ("weights", 4), ("workspace", 2))}
    capacity = DEVICE_BYTES // scale
    wanted = -(-context * token // chunk) * chunk
    live = int(context * fill) * token
    need = wanted if strategy == "static" else -(-live // chunk) * chunk
    name = f"{strategy} {context} {fill} {repeat} {sorted(given.items())}"
    row: dict[str, Any] = {
        "run_id": MANIFEST["run_id"],
        "trial_id": hashlib.sha256(name.encode()).hexdigest()[:12],
        "pair_id": hashlib.sha256(f"{context} {fill} {repeat}".encode()).hexdigest()[:12],
        "experiment": "sweep",
        "strategy": strategy,
        "model": "report",
        "hardware": "h200" if scale == 1 else "scale_model",
        "device_name": "NVIDIA H200",
        "scale": scale,
        "workload": "single",
        "repeat": repeat,
        "seed": 0,
        "rank": 0,
        "world_size": 1,
        "emulated_ranks": 8,
        "basis": "measured" if scale == 1 else "scale_model",
        "gpu_uuid": GPU_UUID if scale == 1 else None,
        "context_tokens": context,
        "fill": fill,
        "sequences": 1,
        "kv_dtype": "fp8_e4m3",
        "page_tokens": 128,
        "chunk_bytes": chunk,
        "kv_bytes_per_token": token,
        "capacity_bytes": capacity,
        "strategy_options": json.dumps({"growth": "sync"} if strategy == "paged" else {}),
        "purpose": "point",
        "context_bytes": rest["context"],
        "weights_bytes": rest["weights"],
        "tables_bytes": 0,
        "tolerance_bytes": chunk,
        "unexplained_bytes": 4096,
        "status": "ok",
        "kv_committed_bytes": need,
        "kv_live_bytes": live,
        "resident_tokens": int(context * fill),
        "workspace_bytes": rest["workspace"],
        "peak_device_bytes": sum(rest.values()) + need,
        "predicted_peak_bytes": sum(rest.values()) + need,
    }
    free = capacity - rest["context"] - rest["weights"]
    if sum(rest.values()) + need > capacity:
        row |= _oom(strategy, row, need, free, chunk, token)
    elif given.get("purpose", "point") == "point":
        step_ms = 1e3 * max(live, 1) * scale / 4.4e12 * (1 + 0.001 * repeat)
        row |= {
            "attention_decode_step_ms": step_ms,
            "attention_decode_step_ms_iqr": step_ms / 500,
            "attention_decode_tokens_per_second": 1e3 / step_ms,
            "attention_prefill_chunk_ms": step_ms * 100,
            "attention_prefill_tokens_per_second": 2048e1 / step_ms,
            "prefill_chunk_tokens": 2048,
            "decode_samples": 10,
            "gate_error": 0.01,
            "gate_lse_error": 1e-4,
            "startup_seconds": 0.4,
        }
    return ordered(row | given)


def _oom(
    strategy: str, row: dict[str, Any], need: int, free: int, chunk: int, token: int
) -> dict[str, Any]:
    if strategy == "static":
        return {
            "status": "oom",
            "oom_phase": "pool",
            "oom_allocation": "kv_pool",
            "oom_source": "driver",
            "oom_requested_bytes": need,
            "oom_free_bytes": free,
            "resident_tokens": 0,
            "kv_committed_bytes": 0,
            "workspace_bytes": 0,
            "peak_device_bytes": row["capacity_bytes"] - free,
        }
    room = (free - row["workspace_bytes"]) // chunk * chunk
    return {
        "status": "oom",
        "oom_phase": "fill",
        "oom_allocation": "kv_pages",
        "oom_source": "driver",
        "oom_requested_bytes": chunk,
        "oom_free_bytes": free - row["workspace_bytes"] - room,
        "resident_tokens": room // token,
        "resident_limited_by": "oom",
        "kv_committed_bytes": room,
        "peak_device_bytes": row["capacity_bytes"] - free + row["workspace_bytes"] + room,
    }


def sweep(repeats: int = 2, **given: Any) -> list[dict[str, Any]]:
    """Rows of a sweep of static and paged to 10M, the top context also filled to 10 %."""
    return [
        cell(strategy, context, fill, repeat=repeat, **given)
        for repeat in range(repeats)
        for context in CONTEXTS
        for fill in ((0.1, 1.0) if context == CONTEXTS[-1] else (1.0,))
        for strategy in ("static", "paged")
    ]


def bracket() -> list[dict[str, Any]]:
    """The trials that close static's brackets: two fill it, then each end of start-up twice."""
    pool = -(-5_800_000 * 24_576 // CHUNK_BYTES) * CHUNK_BYTES
    good = {
        "status": "ok",
        "oom_phase": None,
        "oom_allocation": None,
        "kv_committed_bytes": pool,
        "peak_device_bytes": 5 * GIB + pool,
        "admitted": "true",
    }
    held = good | {"purpose": "resident", "resident_tokens": 5_800_000}
    full = [cell("static", 5_800_000, 1.0, repeat=n, **held) for n in range(2)]
    starts = [
        cell("static", context, 1.0, repeat=repeat, purpose="bracket", **end)
        for repeat in range(2)
        for context, end in (
            (5_800_000, good),
            (5_802_816, {"status": "oom", "oom_phase": "pool", "oom_allocation": "kv_pool"}),
        )
    ]
    return [r | {"predicted_peak_bytes": r["peak_device_bytes"]} for r in full + starts]


def events(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The ledger events of a row, in its phases' order."""
    steps = [("context", row["context_bytes"]), ("weights", row["weights_bytes"])]
    if row["oom_phase"] != "pool":
        pool = row["kv_committed_bytes"] if row["strategy"] == "static" else 0
        grown = row["kv_committed_bytes"] - pool
        steps += [("pool", pool), ("workspace", row["workspace_bytes"])]
        steps += [("fill", grown // 2), ("fill", grown - grown // 2)]
    out, held = [], 0
    for n, (phase, nbytes) in enumerate(steps):
        held += nbytes
        event = dict.fromkeys(TIMELINE_COLUMNS) | {
            "run_id": row["run_id"],
            "trial_id": row["trial_id"],
            "rank": 0,
            "seconds": 0.1 * n,
            "phase": phase,
            "allocation": {"pool": "kv_pool", "fill": "kv_pages"}.get(phase, phase),
            "event_bytes": nbytes,
            "ledger_bytes": held - (row["unexplained_bytes"] or 0),
            "device_used_bytes": held,
        }
        out.append(event)
    return out


def write_run(
    folder: Path,
    rows: list[dict[str, Any]] | None = None,
    summary: dict[str, Any] | None = None,
    **manifest: Any,
) -> Path:
    """Write a run's folder; keywords override the manifest's keys."""
    rows = sweep() + bracket() if rows is None else rows
    folder.mkdir(parents=True)
    _csv(folder / "trials.csv", COLUMNS, rows)
    _csv(folder / "timeline.csv", TIMELINE_COLUMNS, [e for r in rows for e in events(r)])
    raw = [
        {"trial_id": r["trial_id"], "rank": r["rank"], "what": what, "ms": _ten(r, column)}
        for r in rows
        for what, column in SAMPLED.items()
        if r[column]
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in raw))
    (folder / "summary.json").write_text(json.dumps(SUMMARY if summary is None else summary))
    (folder / "manifest.json").write_text(json.dumps(MANIFEST | manifest))
    (folder / "config.yaml").write_text("model:\n  name: report\nseed: 0\n")
    return folder


def of_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a run sums up of its rows."""
    return summarise(rows, decide(per_trial(rows)))


def _ten(row: dict[str, Any], column: str) -> list[float]:
    """Ten timings of a row's median and interquartile range."""
    half = (row.get(f"{column}_iqr") or 0.0) / 2
    return [row[column] - half] * 5 + [row[column] + half] * 5


def _csv(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def texts(figure: Figure) -> list[str]:
    """Every text of a figure: titles, labels, legend, annotations."""
    return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text"))]


def legend(figure: Figure) -> list[str]:
    """Return the texts of a figure's legend."""
    return [t.get_text() for t in figure.legends[0].get_texts()]
