"""The planner against the strategies themselves: what it predicts is what happens."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.planner import (
    admits,
    largest_context_that_starts,
    oom_points,
    predict,
    starts,
)
from harness.planner_changes import longest_accepted, smallest_change
from harness.planner_spec import PlanSpec
from kernels.view import Geometry
from strategies.device_host import HostDevice
from strategies.engine_model import GIB, MIB
from strategies.errors import EngineCrash, OutOfMemory, Refused
from strategies.model import KVModel, LayerGroup
from strategies.registry import build
from strategies.sizing import page_table_bytes
from tests.strategies.engine_models import H200_BYTES, ONE_RANK, TWO_HEADS

# One layer, one head of 64 in FP8: 128 bytes a token, 16 KiB a page, 4 pages a chunk.
PLAIN = KVModel("plain", (LayerGroup("full", Geometry(1, 1, 8, 64), 4),))
HYBRID = KVModel(
    "hybrid",
    (
        LayerGroup("full", Geometry(1, 1, 8, 16), 4),
        LayerGroup("local", Geometry(1, 1, 8, 48), 4, window_tokens=1024),
    ),
)
ENGINE_SCALE = 192 * 64


def pool_spec(strategy, context, **known):
    """A device of 4 MiB with 1 MiB taken by context, weights and workspace."""
    known = {"model": PLAIN, "fill": 1.0} | known
    return PlanSpec(
        strategy,
        context_tokens=context,
        capacity_bytes=4 * MIB,
        context_bytes=MIB // 4,
        weights_bytes=MIB // 2,
        workspace_items=(("partials", MIB // 8), ("gate", MIB // 8)),
        **known,
    )


def engine_spec(strategy, context=10_000_000, model=ONE_RANK, scale=ENGINE_SCALE, **options):
    return PlanSpec(
        strategy,
        options,
        model=KVModel("one", (LayerGroup("full", Geometry(1, 1, 8, 1), 64),)),
        engine_model=model,
        context_tokens=context,
        capacity_bytes=H200_BYTES // scale,
        context_bytes=round(1.68 * GIB) // scale,
        weights_bytes=model.weights_bytes // scale,
        scale=scale,
        device_total_bytes=H200_BYTES,
    )


class Happened:
    """A trial of a spec, run for real on host memory."""

    def __init__(self, spec):
        self.device = device = HostDevice(spec.capacity_bytes, spec.scale)
        self.outcome, self.phase, self.allocation = "ok", "", ""
        self.started, self.admitted, self.resident_tokens = False, False, 0
        self.strategy = None
        try:
            self._run(spec)
        except (OutOfMemory, Refused) as end:
            self.outcome = "oom" if isinstance(end, OutOfMemory) else "refused"
            self.phase, self.allocation = end.phase, end.allocation
        except EngineCrash:
            self.outcome, self.phase = "crash", "workspace"
        if self.strategy is not None:
            self.footprint = self.strategy.footprint()
        self.free_bytes = device.free_bytes()
        device.close()

    def _run(self, spec):
        device = self.device
        device.allocate("context", "cuda_context", spec.context_bytes)
        device.allocate("weights", "weights", spec.weights_bytes)
        options = dict(spec.options)
        if spec.engine_model is not None:
            options["engine_model"] = spec.engine_model
            options["device_total_bytes"] = spec.device_total_bytes
        elif spec.strategy == "eager_pages" or options.get("mem_fraction_of") == "device":
            options["workspace_reserve_bytes"] = spec.workspace_bytes
        made = build(
            spec.strategy, device, spec.model, spec.context_tokens, spec.sequences, **options
        )
        made.start()
        self.strategy = made
        for name, nbytes in spec.workspace_items:
            device.allocate("workspace", name, nbytes)
        self.started = True
        self.admitted = made.can_admit(spec.context_tokens)
        for sequence in range(spec.sequences):
            made.open(sequence, spec.context_tokens)
        targets = [tokens for tokens, count in spec.targets for _ in range(count)]
        for sequence, tokens in enumerate(targets):
            self._fill(made, sequence, tokens)

    def _fill(self, made, sequence, target):
        step, page = 2048, made.model.groups[0].geometry.page_tokens
        while (at := made.resident_tokens(sequence)) < target:
            want = min(step - at % page, target - at)
            try:
                made.extend(sequence, want)
            except (OutOfMemory, Refused):
                if step <= page:
                    raise
                step //= 2
                continue
            self.resident_tokens += want


def check(spec):
    happened, made = Happened(spec), predict(spec)
    end = (happened.outcome, happened.phase, happened.allocation)
    assert (made.outcome, made.phase, made.allocation) == end
    assert (made.started, made.admits_context) == (happened.started, happened.admitted)
    assert abs(made.resident_tokens - happened.resident_tokens) <= 128 * spec.sequences
    held = 0 if happened.strategy is None else happened.footprint.committed_bytes
    assert made.predicted_kv_bytes == held
    if made.outcome == "ok":
        assert made.free_bytes == happened.free_bytes
    return made


FRACTIONS = st.sampled_from([0.3, 0.5, 0.65, 0.8, 1.0])


@settings(max_examples=70, deadline=None)
@given(
    st.sampled_from(["static", "paged", "eager_pages"]),
    st.integers(1, 60_000),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    FRACTIONS,
)
def test_a_trial_goes_as_predicted(strategy, context, sequences, fill, fraction):
    options = {} if strategy == "paged" else {"mem_fraction": fraction}
    check(pool_spec(strategy, context, sequences=sequences, fill=fill, options=options))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["static", "paged", "eager_pages"]),
    st.lists(st.integers(0, 12_000), min_size=1, max_size=6),
    FRACTIONS,
)
def test_a_batch_of_mixed_lengths_goes_as_predicted(strategy, lengths, fraction):
    options = {} if strategy == "paged" else {"mem_fraction": fraction}
    known = {"sequences": len(lengths), "lengths": tuple(lengths), "options": options}
    check(pool_spec(strategy, max(1, *lengths, 1), **known))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60_000), st.integers(1, 3), FRACTIONS)
def test_static_by_a_fraction_of_the_device_goes_as_predicted(context, sequences, fraction):
    options = {"mem_fraction": fraction, "mem_fraction_of": "device"}
    check(pool_spec("static", context, sequences=sequences, options=options))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["static", "paged"]), st.integers(1, 120_000), st.sampled_from([0.1, 1.0]))
def test_a_hybrid_model_goes_as_predicted(strategy, context, fill):
    spec = pool_spec(strategy, context, model=HYBRID, fill=fill)
    happened, made = Happened(spec), predict(spec)
    # The formula keeps a whole window at every moment; right behind a window's end a sequence holds
    # less, so that the two may differ by a chunk.
    assert abs(made.resident_tokens - happened.resident_tokens) <= 4 * 4 * 128
    if happened.resident_tokens < context * fill - 2048:
        assert made.outcome == happened.outcome == "oom"


def hybrid(page_tokens, window_pages, full_pages=4, local_pages=4):
    """Chunks of so many times the pages that fill whole pages of the host; 128 bytes a token."""
    unit = max(1, 128 // page_tokens)
    full, local = (Geometry(1, 1, 8, d, page_tokens=page_tokens) for d in (16, 48))
    groups = (
        LayerGroup("full", full, unit * full_pages),
        LayerGroup("local", local, unit * local_pages, window_pages * page_tokens),
    )
    return KVModel("hybrid", groups)


@settings(max_examples=50, deadline=None)
@given(
    st.builds(hybrid, st.sampled_from([16, 128]), st.integers(1, 40)),
    st.integers(1, 30_000),
    st.integers(1, 4),
    st.sampled_from([0.3, 1.0]),
    FRACTIONS,
)
def test_steps_are_halved_until_a_windows_pages_do(model, context, sequences, fill, fraction):
    known = {"sequences": sequences, "fill": fill, "options": {"mem_fraction": fraction}}
    spec = pool_spec("eager_pages", context, model=model, **known)
    assert check(spec).resident_tokens == Happened(spec).resident_tokens


def test_a_step_into_the_next_window_finds_the_last_ones_chunks_still_held():
    """Two windows of 128 pages each: the full layers need a chunk more where the second begins."""
    spec = pool_spec("paged", 35_000, model=hybrid(128, 128, full_pages=8, local_pages=42))
    assert check(spec).resident_tokens == Happened(spec).resident_tokens == 2 * 128 * 128


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(
        [
            ("sglang", {}),
            ("sglang", {"max_running_requests": 16}),
            ("sglang", {"version": "0.5.2", "disable_cuda_graph": True}),
            ("sglang", {"version": "0.5.2"}),
            ("sglang", {"mem_fraction_static": 0.5, "page_size": 64}),
            ("sglang", {"attention_backend": "triton", "max_running_requests": 64}),
            ("vllm", {}),
            ("vllm", {"gpu_memory_utilization": 0.95, "max_num_seqs": 16, "enforce_eager": True}),
            ("vllm", {"version": "0.33.0", "max_model_len": "auto"}),
        ]
    ),
    st.sampled_from([ONE_RANK, TWO_HEADS]),
    st.sampled_from([1000, 131_072, 700_000, 1_000_000, 2_500_000, 5_000_000, 10_000_000]),
)
def test_an_emulated_start_goes_as_predicted(which, model, context):
    strategy, options = which
    made = check(engine_spec(strategy, context, model, **options))
    assert made.items[-1].failed == (made.outcome not in ("ok", "crash"))


@pytest.mark.parametrize("strategy", ["sglang", "vllm"])
@pytest.mark.parametrize("lengths", [(3, 9, 1000), (20_000, 70_000, 90_000, 131_072)])
def test_an_engines_batch_goes_as_predicted(strategy, lengths):
    spec = engine_spec(strategy, 131_072)
    check(replace(spec, sequences=len(lengths), lengths=lengths))


@pytest.mark.parametrize("strategy", ["static", "paged", "eager_pages"])
def test_oom_points_are_where_trials_turn(strategy):
    spec = pool_spec(strategy, 60_000)
    points = oom_points(spec)
    if points.startup.not_ok is not None:
        assert Happened(spec.at(points.startup.ok).filled(0.0)).started
        assert not Happened(spec.at(points.startup.not_ok).filled(0.0)).started
    assert Happened(spec.at(points.admit.ok)).admitted
    assert not Happened(spec.at(points.admit.not_ok)).admitted
    held = Happened(spec.at(points.startup.ok))
    assert abs(held.resident_tokens - points.resident.ok) <= 128


def test_static_ends_at_start_up_and_paged_while_it_grows():
    static, paged = (oom_points(pool_spec(s, 60_000)) for s in ("static", "paged"))
    assert static.startup.limited_by == "oom"
    assert paged.startup.limited_by == "sweep_end"
    assert paged.resident.limited_by == "oom"
    assert abs(static.resident.ok - paged.resident.ok) <= 4 * 128


def test_the_page_table_is_predicted():
    spec = pool_spec("paged", 10_000)
    assert predict(spec).predicted_tables_bytes == page_table_bytes(PLAIN, 10_000, 1)


def test_sglang_with_default_flags_fails_well_below_ten_million():
    spec = engine_spec("sglang")
    made = predict(spec)
    assert (made.outcome, made.phase, made.allocation) == ("oom", "pool", "kv_pool")
    largest, failing = largest_context_that_starts(spec)
    assert failing < 1_000_000  # 4096 rows still: the limit falls only from an eighth of the pool
    assert largest == failing - 1
    assert starts(spec, largest) and not starts(spec, failing)


def test_a_failure_between_contexts_that_start_is_found():
    # With M = 10,000,000 tokens the request limit is 2560 at 2,000,000 tokens and 2559 right
    # above: the table is 8 MB smaller there. A device that lacks 1 MB of the former fails at that
    # context alone and starts on both sides.
    options = {"max_total_tokens": 10_000_000, "disable_cuda_graph": True}
    options |= {"mem_fraction_static": 0.999, "disable_piecewise_cuda_graph": True}
    spec = engine_spec("sglang", 2_000_000, scale=1, **options)
    spec = replace(spec, capacity_bytes=200 * GIB, device_total_bytes=0)
    needed = predict(spec.filled(0.0)).predicted_peak_bytes
    tight = replace(spec, capacity_bytes=needed - MIB, context_tokens=2_000_100)
    assert not starts(tight, 2_000_000)
    assert starts(tight, 2_000_001)
    largest, failing = largest_context_that_starts(tight)
    assert largest == 2_000_100
    assert failing <= 2_000_000
    assert starts(tight, failing - 1) and not starts(tight, failing)


def test_the_pool_of_an_engine_may_be_smaller_than_its_context():
    spec = engine_spec("sglang", model=TWO_HEADS, max_running_requests=16)
    made = predict(spec)
    assert made.started and not made.admits_context
    points = oom_points(spec)
    assert points.startup.limited_by == "sweep_end"
    assert points.admit.ok == made.pool_tokens == points.resident.ok
    assert (points.admit.limited_by, points.resident.limited_by) == ("refused", "refused")


def test_vllm_refuses_at_start_up():
    flags = {"gpu_memory_utilization": 0.95, "enforce_eager": True, "max_num_seqs": 16}
    spec = engine_spec("vllm", model=TWO_HEADS, **flags)
    points = oom_points(spec)
    assert points.startup.limited_by == "refused"
    assert points.startup.ok == largest_context_that_starts(spec)[0]
    assert "estimated maximum model length" in predict(spec).message


def test_the_smallest_change_of_sglang_is_fewer_requests():
    change = smallest_change(engine_spec("sglang"))
    assert [key for key, _ in change.flags] == ["max_running_requests"]
    rows = int(change.flags[0][1])
    assert predict(engine_spec("sglang", max_running_requests=rows)).started
    assert rows >= 16
    doubled = engine_spec("sglang", max_running_requests=2 * rows)
    assert not predict(doubled).started or predict(doubled).free_bytes * ENGINE_SCALE < GIB


def test_a_shorter_context_is_no_way_to_accept_the_full_one():
    spec = engine_spec("sglang", model=TWO_HEADS)
    start, admit = smallest_change(spec, "start"), smallest_change(spec, "admit")
    assert not start.prediction.admits_context
    assert admit is None
    longest = longest_accepted(spec)
    assert longest.prediction.admits_context
    assert dict(longest.flags)["max_running_requests"] == "16"
    tokens = int(dict(longest.flags)["context_length"])
    few = spec.with_options(max_running_requests=16)
    assert admits(few, tokens) and not admits(few, tokens + 1)
    assert tokens > largest_context_that_starts(spec)[0]


def test_a_slot_of_a_share_accepts_no_full_context_of_a_handful_of_tokens():
    spec = pool_spec("static", 60_000).with_options(mem_fraction=0.5)
    assert oom_points(spec).admit.ok < 128
    assert smallest_change(spec, "admit") is None
    longest = longest_accepted(spec)
    assert dict(longest.flags)["mem_fraction"] == "1.0"
    whole = spec.with_options(mem_fraction=1.0)
    tokens = longest.spec.context_tokens
    assert admits(whole, tokens) and not admits(whole, tokens + 1)
    short = replace(spec, context_tokens=tokens // 2)
    assert smallest_change(short, "admit").flags == (("mem_fraction", "1.0"),)
    assert longest_accepted(replace(spec, context_tokens=100)) is None


def test_bf16_is_told_to_use_fp8():
    wide = replace(ONE_RANK, kv_itemsize=2)
    spec = engine_spec("vllm", model=wide, max_num_seqs=16, enforce_eager=True)
    change = smallest_change(spec)
    assert dict(change.flags) == {"kv_cache_dtype": "fp8_e4m3"}
    assert change.prediction.started


def test_nothing_is_changed_that_works_and_every_change_works():
    assert smallest_change(engine_spec("sglang", max_running_requests=16)) is None
    for spec in (pool_spec("static", 60_000), pool_spec("paged", 60_000)):
        for goal in ("start", "admit"):
            change = smallest_change(spec, goal)
            if change is None:
                assert starts(spec, 60_000) if goal == "start" else not admits(spec, 60_000)
                longest = longest_accepted(spec).spec.context_tokens
                assert admits(spec, longest) and not admits(spec, longest + 1)
            else:
                again = predict(change.spec.filled(0.0))
                assert again.started and (goal == "start" or again.admits_context)


def test_an_unknown_strategy_or_flag_is_one_line():
    with pytest.raises(ValueError, match="strategy=magic: allowed are"):
        predict(PlanSpec("magic"))
    with pytest.raises(ValueError, match="page_size=0: not allowed"):
        predict(engine_spec("sglang", page_size=0))


def test_the_longest_context_of_vllm_is_looked_for_with_fewer_requests_too():
    spec = engine_spec("vllm", model=TWO_HEADS)
    found = longest_accepted(spec)
    assert [key for key, _ in found.flags] == ["max_num_seqs", "max_model_len"]
    assert found.spec.context_tokens > 2 * largest_context_that_starts(spec)[0]
    assert predict(found.spec.filled(0.0)).admits_context
