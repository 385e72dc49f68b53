"""The timed part of a trial: first the gate, then decode, then prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from harness.cell import Cell
from harness.faults import flip_signs
from harness.gate import MAX_LSE_ERROR, MAX_RELATIVE_RMS, Gate
from harness.ledger import Ledger
from harness.offload import make_reader
from harness.ranks_control import Alone, EndedByPeer, Team
from harness.ranks_group import Collectives
from harness.settings import Settings
from harness.synthetic import Content
from harness.timing import Samples, Stopwatch, prefill_flops
from harness.workspace import Workspace
from strategies.device import Allocation
from strategies.strategy import Strategy

Note = Callable[[str, dict[str, Any]], None]


def measure(
    cell: Cell,
    strategy: Strategy,
    contents: list[Content],
    workspace: Workspace,
    ledger: Ledger,
    note: Note,
    team: Team | None = None,
    group: Collectives | None = None,
    weights: Allocation | None = None,
    last: bool = False,
) -> dict[str, Any]:
    """Columns of speed at the resident length; ``status=invalid`` when the gate fails.

    Parameters
    ----------
    weights : Allocation, optional
        What the weights have on the device, for ``trial.read_weights``.
    last : bool
        Nothing follows in this process, so that a sequence may be grown without being filled.

    Raises
    ------
    EndedByPeer
        The gate failed on another rank.
    """
    team = team or Alone()
    settings = cell.settings
    sequences = list(range(settings.sequences))
    tokens = strategy.resident_tokens(sequences[-1])
    checker = Gate(settings, strategy, contents, workspace)
    gate = checker.check(sequences[-1], tokens)
    ledger.note("decode", "gate")
    row: dict[str, Any] = {
        "gate_error": gate.relative_rms,
        "gate_lse_error": gate.lse_error,
        "decode_gate_error": gate.decode_rms,
        "unrounded_decode_error": gate.unrounded_rms,
        "kernel_variant": gate.decode_variant,
        "prefill_kernel_variant": gate.prefill_variant,
    }
    passed = team.join("gate", gate.passed)
    if not gate.passed:
        return row | {
            "status": "invalid",
            "error": f"gate: relative RMS {gate.relative_rms:.3g} (allowed {MAX_RELATIVE_RMS}), "
            f"LSE {gate.lse_error:.3g} (allowed {MAX_LSE_ERROR})",
        }
    if not all(passed):
        raise EndedByPeer
    flip_signs(settings.fault, strategy, sequences[-1], team.place.rank)
    if group is not None:
        from harness.ranks_gate import check_merged, merged_columns

        merged = check_merged(checker, group, strategy, sequences[-1], tokens)
        row |= merged_columns(merged)
        if not all(team.join("merged gate", merged.passed)):
            return row
    reader = None if weights is None else make_reader(settings, weights.u8)
    watch = Stopwatch(settings, strategy, workspace, reader, ledger.driver_took)
    decode = watch.decode(sequences)
    note("decode", _raw(decode))
    row |= _decode_columns(strategy, sequences, decode)
    if reader is not None:
        wrong = reader.wrong_layer()
        reader.close()
        row["pinned_host_bytes"] = reader.pinned_bytes
        if wrong is not None:
            return row | {"status": "invalid", "error": f"layer {wrong}: weights of another one"}
    if group is not None:
        from harness.ranks_step import time_columns, time_step

        step, collectives = time_step(watch, team, group, sequences)
        note("decode_all_ranks", _raw(step.samples))
        note("collectives", _raw(collectives.samples))
        row |= time_columns(step, collectives)
        if not all(team.join("timed step", step.gate.passed and collectives.gate.passed)):
            return row
    ledger.note("decode", "timed")
    if settings.trial.prefill_histories:
        row |= _prefill(cell, strategy, watch, sequences[-1], tokens, note)
        ledger.note("prefill", "timed")
    if last and group is None and settings.strategy == "paged":
        row |= _growing_columns(settings, strategy, watch, sequences, note)
    return row


def _prefill(
    cell: Cell, strategy: Strategy, watch: Stopwatch, sequence: int, tokens: int, note: Note
) -> dict[str, Any]:
    """Columns of the chunk that ends a sequence, and of a whole prompt where the cell asks."""
    # Behind a window the pages are gone, and with them what earlier queries would see.
    first = max(view.starts[0] for view in strategy.batch([sequence]))
    chunk = min(cell.settings.trial.prefill_chunk_tokens, tokens - first)
    # The gate ran the same chunk: nothing is left to warm up.
    prefill = watch.prefill(sequence, tokens - chunk, chunk, warm=True)
    note("prefill", _raw(prefill) | {"history_tokens": tokens - chunk, "chunk_tokens": chunk})
    row = _prefill_columns(strategy, sequence, tokens, chunk, prefill)
    if cell.histories and first == 0 and tokens > 4 * chunk:
        model = watch.prefill_model(sequence, tokens, chunk, prefill.median_ms)
        note("prefill_model", {"histories": model.histories, "chunk_ms": model.chunk_ms})
        row["prefill_modelled_seconds"] = model.total_seconds
        row["prefill_model_residual"] = model.relative_residual
    return row


def _growing_columns(
    settings: Settings, strategy: Strategy, watch: Stopwatch, sequences: list[int], note: Note
) -> dict[str, Any]:
    """Decode beside growth, a chunk a step; the row's K/V bytes are those from before."""
    held = strategy.footprint()
    before = {"kv_committed_bytes": held.committed_bytes, "kv_live_bytes": held.live_bytes}
    groups = settings.kv_model().groups
    chunk_tokens = max(g.pages_per_chunk * g.geometry.page_tokens for g in groups)
    growing = watch.decode_while_growing(sequences, chunk_tokens)
    if growing is None:  # too few steps, which grew it all the same
        return before
    note("decode_while_growing", _raw(growing) | {"tokens": chunk_tokens})
    return before | {"decode_while_growing_ms": growing.median_ms}


def _raw(samples: Samples) -> dict[str, Any]:
    return {"ms": list(samples.ms), "warmup_ms": samples.warmup_ms}


def _decode_columns(strategy: Strategy, sequences: list[int], decode: Samples) -> dict[str, Any]:
    seconds = decode.median_ms / 1e3
    read = sum(
        v.geometry.token_bytes * (length - start)
        for v in strategy.batch(sequences)
        for length, start in zip(v.lengths_host, v.starts, strict=True)
    )
    return {
        "attention_decode_step_ms": decode.median_ms,
        "attention_decode_step_ms_iqr": decode.iqr_ms,
        "attention_decode_tokens_per_second": len(sequences) / seconds,
        "attention_decode_bytes_per_second": read / seconds,
        "decode_samples": len(decode.ms),
    }


def _prefill_columns(
    strategy: Strategy, sequence: int, tokens: int, chunk: int, prefill: Samples
) -> dict[str, Any]:
    seconds = prefill.median_ms / 1e3
    flops = sum(
        v.geometry.layers
        * prefill_flops(v.geometry.q_heads, v.geometry.head_dim, tokens - chunk, chunk, v.starts[0])
        for v in strategy.batch([sequence])
    )
    return {
        "prefill_chunk_tokens": chunk,
        "attention_prefill_chunk_ms": prefill.median_ms,
        "attention_prefill_tokens_per_second": chunk / seconds,
        "attention_prefill_flops_per_second": flops / seconds,
        "prefill_samples": len(prefill.ms),
    }
