"""The columns of trials.csv and of timeline.csv: their names, order and kinds are a contract.

``None`` is written as an empty field. Byte columns of the scale model are its own bytes; ``scale``
converts them to those of the modelled device.
"""

from __future__ import annotations

from collections.abc import Mapping

IDENTITY = (
    "run_id trial_id pair_id experiment strategy model hardware device_name scale workload "
    "repeat seed rank world_size emulated_ranks basis engine_version emulated_version"
).split()
CONFIGURATION = (
    "context_tokens fill sequences kv_dtype page_tokens block_tokens chunk_bytes arena layout "
    "table_order kernel_variant mem_fraction slot_policy kv_bytes_per_token capacity_bytes"
).split()
END = (
    "status signal oom_phase oom_allocation oom_source oom_requested_bytes oom_free_bytes "
    "resident_tokens resident_limited_by gate_error"
).split()
MEMORY = (
    "context_bytes nccl_bytes weights_bytes tables_bytes workspace_bytes kv_reserved_bytes "
    "kv_committed_bytes kv_live_bytes peak_ledger_bytes peak_torch_bytes peak_device_bytes "
    "unexplained_bytes predicted_tables_bytes predicted_kv_bytes predicted_peak_bytes"
).split()
TIME = (
    "startup_seconds fill_seconds grow_bytes_per_second grow_stall_us_p50 grow_stall_us_p99 "
    "grow_events attention_decode_step_ms attention_decode_step_ms_iqr "
    "attention_decode_tokens_per_second attention_decode_bytes_per_second "
    "prefill_chunk_tokens attention_prefill_chunk_ms attention_prefill_tokens_per_second "
    "attention_prefill_flops_per_second wall_seconds"
).split()
# A growth event (`grow_*`) is an extension into chunks that no sequence used before, whoever mapped
# them (harness.growth).
# `fill` is what a trial was to fill: 0 for a bracket's. Rows of earlier versions say 1 there, of as
# many `resident_tokens`: none.
# Ours beside the contract: what a trial was for, its options, its samples and how it differs from
# the plan. `purpose` is point, bracket or resident (one sequence is filled, of however many);
# `admitted` says what can_admit(context) said.
EXTRA = (
    "purpose hybrid read_weights strategy_options growth release admitted decode_samples "
    "prefill_samples gate_lse_error kv_scales prefill_kernel_variant prefill_modelled_seconds "
    "prefill_model_residual predicted_status predicted_off_by tolerance_bytes "
    "unexplained_phase sequences_admitted sequences_refused sequences_preempted "
    "reserved_share internal_share external_share live_share fault error started_utc "
    # Several ranks: `resident_tokens` is the rank's own share of what all of them hold together;
    # a decode step with its collectives, and these alone; who ended the trial.
    "parallel context_ranks resident_tokens_all_ranks parallel_decode_step_ms "
    "parallel_decode_step_ms_iqr parallel_decode_samples collective_ms collective_ms_iqr "
    "collective_samples collective_bytes merged_gate_error failed_rank "
    # Which of an experiment's arms a row belongs to. Many sequences: bytes and shares are means
    # while a request waited for memory; `sequences_admitted` is how many then ran at once; tokens
    # are those of finished requests; the end is when every sequence is closed again.
    "arm trace_file trace_requests trace_input_tokens trace_output_tokens prefix_hashes "
    "prefix_hashes_repeated workload_steps admission_limited_share peak_sequences "
    "refused_while_free largest_admissible_tokens admissible_of_free admissible_of_free_min "
    "kv_end_committed_bytes pinned_host_bytes decode_while_growing_ms "
    # What a trace or churn stands for, were a decode step of every open sequence to take step_ms.
    "step_ms simulated_hours "
    # Decode's own part of gate_error, in which rounding K and V has none; and its error against the
    # K/V as they were before that.
    "decode_gate_error unrounded_decode_error "
    # The GPU that the trial ran on, as NVML writes its UUID; empty on the scale model.
    "gpu_uuid"
).split()

# What folders of earlier versions may lack.
ADDED_LATER = (
    "gpu_uuid",
    "torch_requested_bytes",
    "parallel_decode_step_ms_iqr",
    "parallel_decode_samples",
    "collective_ms_iqr",
    "collective_samples",
    "step_ms",
    "simulated_hours",
    "decode_gate_error",
    "unrounded_decode_error",
)

COLUMNS: tuple[str, ...] = tuple(IDENTITY + CONFIGURATION + END + MEMORY + TIME + EXTRA)
TIMELINE_COLUMNS: tuple[str, ...] = tuple(
    (
        "run_id trial_id rank seconds phase allocation event_bytes event_seconds ledger_bytes "
        "torch_reserved_bytes torch_allocated_bytes nvml_used_bytes device_used_bytes "
        "device_free_bytes resident_tokens kv_committed_bytes torch_requested_bytes"
    ).split()
)

STATUSES = ("ok", "oom", "refused", "oom_host", "invalid", "timeout", "crash")
BASES = ("measured", "scale_model", "planned")

# Times that every rank takes of the same work, with what is told of their samples.
OF_ALL_RANKS = {
    "parallel_decode_step_ms": ("parallel_decode_step_ms_iqr", "parallel_decode_samples"),
    "collective_ms": ("collective_ms_iqr", "collective_samples"),
}
# Figures of speed: a row that is not ok, or whose gate did not pass, must not carry them.
PERFORMANCE: frozenset[str] = frozenset(c for c in TIME if c.startswith("attention_")) | {
    "decode_samples",
    "prefill_samples",
    "prefill_modelled_seconds",
    "prefill_model_residual",
    *(c for time, told in OF_ALL_RANKS.items() for c in (time, *told)),
    "decode_while_growing_ms",
}

_TEXT = frozenset(
    (
        "run_id trial_id pair_id experiment strategy model hardware device_name workload basis "
        "engine_version emulated_version kv_dtype arena layout table_order kernel_variant "
        "slot_policy status signal oom_phase oom_allocation oom_source resident_limited_by "
        "purpose strategy_options growth release kv_scales prefill_kernel_variant "
        "predicted_status read_weights predicted_off_by unexplained_phase fault error "
        "started_utc phase allocation admitted parallel arm trace_file gpu_uuid"
    ).split()
)


def is_text(column: str) -> bool:
    """Whether a column holds text; every other one holds a number."""
    return column in _TEXT


def ordered(row: Mapping[str, object]) -> dict[str, object]:
    """One row with every column, in order; unknown keys are an error, missing ones empty.

    Raises
    ------
    KeyError
        When ``row`` has a key that is no column: a misspelt column would be lost silently.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise KeyError(f"not columns of trials.csv: {', '.join(unknown)}")
    out = {c: row.get(c) for c in COLUMNS}
    if out["status"] != "ok":
        out.update(dict.fromkeys(PERFORMANCE))
    return out
