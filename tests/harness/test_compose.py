"""From words to configurations: sweeps, arms of experiments, and what Hydra complains of."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
from omegaconf import OmegaConf

from harness.arms import arms_of, settings_of_command
from harness.compose import as_typed, compose_config, expand, options
from harness.sizes import BadValue

HOST = "hardware=scale_model"


def test_groups_offer_their_files():
    assert options("strategy") == ["eager_pages", "paged", "sglang", "static", "vllm"]
    assert {"report", "qwen3_30b_a3b", "llama4_scout", "qwen3_next_80b"} <= set(options("model"))


def test_a_sweep_is_the_product_of_its_lists():
    jobs = expand(["strategy=static,paged", "context=1M,2M", "seed=3"], multirun=True)
    assert jobs == [
        ["strategy=static", "context=1M", "seed=3"],
        ["strategy=static", "context=2M", "seed=3"],
        ["strategy=paged", "context=1M", "seed=3"],
        ["strategy=paged", "context=2M", "seed=3"],
    ]
    assert [j[0] for j in expand(["seed=range(0,3)"], True)] == ["seed=0", "seed=1", "seed=2"]


def test_a_list_needs_multirun():
    with pytest.raises(BadValue, match="add -m"):
        expand(["strategy=static,paged"], multirun=False)
    with pytest.raises(BadValue, match="up to 1000 jobs"):
        expand(["seed=range(0,1001)"], multirun=True)


def test_equal_jobs_are_run_once():
    assert len(settings_of_command([HOST, "strategy=paged,paged"], True)) == 1
    assert len(settings_of_command([HOST, "strategy=paged,static"], True)) == 2


def test_an_experiment_has_arms_and_the_user_the_last_word():
    words = [HOST, "experiment=root_cause", "strategy=vllm", "context=2M"]
    found = settings_of_command(words, False)
    assert len(found) > 2 and {s.strategy for s in found} == {"vllm"}
    assert {s.experiment for s in found} == {"root_cause"}
    assert {s.contexts[-1] for s in found} == {2_000_000}
    with pytest.raises(BadValue, match="sglang, vllm"):
        settings_of_command([HOST, "experiment=root_cause", "strategy=paged"], False)


def test_a_matrix_is_multiplied_with_the_arms():
    arms = OmegaConf.create(
        {
            "experiment": {
                "name": "x",
                "matrix": {"strategy": ["static", "paged"]},
                "arms": [["seed=1"], []],
            }
        }
    )
    assert arms_of(arms, ["context=1M"]) == [
        ["strategy=static", "seed=1", "context=1M"],
        ["strategy=paged", "seed=1", "context=1M"],
        ["strategy=static", "context=1M"],
        ["strategy=paged", "context=1M"],
    ]
    assert arms_of(arms, ["strategy=paged", "seed=5"]) == [["strategy=paged", "seed=5"]] * 2


def test_verdicts_on_earlier_runs_need_no_arms():
    found = settings_of_command([HOST, "experiment=claims", "claims.from=[a,b]"], False)
    assert len(found) == 1 and found[0].claims_from == ("a", "b")
    with pytest.raises(BadValue, match="without -m"):
        settings_of_command(["claims.from=[a]", "strategy=paged,static"], True)


def test_all_jobs_write_to_one_folder():
    with pytest.raises(BadValue, match="one folder"):
        settings_of_command([HOST, "results=a,b"], True)


@pytest.mark.parametrize(
    ("word", "nearest"),
    [
        ("contxt=1M", "context"),
        ("models=report", "model"),
        ("sed=1", "seed"),
        ("hardware.capacty=80GiB", "hardware.capacity"),
        ("sweep.contxts=[1]", "sweep.contexts"),
        ("engine.sglang.pyton=x", "engine.sglang.python"),
        ("fault.knd=hang", "fault.kind"),
        # In another section, or in none; of a strategy that was not chosen.
        ("page_tokens=16", "trial.page_tokens"),
        ("model.page_tokens=16", "trial.page_tokens"),
        ("strategy.mem_fractoin=0.5", "strategy.mem_fraction (with strategy=eager_pages or "),
        ("max_runing_requests=16", "strategy.max_running_requests (with strategy=sglang)"),
        (
            "strategy.gpu_memory_utilisation=0.9",
            "strategy.gpu_memory_utilization (with strategy=vllm)",
        ),
    ],
)
def test_a_mistyped_key_is_answered_with_the_nearest_one(word, nearest):
    with pytest.raises(BadValue, match=r"keys such as (.*)$") as refused:
        compose_config([word])
    assert str(refused.value).partition("keys such as ")[2].startswith(nearest)
    assert refused.value.key == word.partition("=")[0] and "\n" not in str(refused.value)


def test_what_is_like_no_key_is_answered_with_the_first_words():
    with pytest.raises(BadValue, match="keys such as strategy, model, hardware"):
        compose_config(["zzzz=1"])


@pytest.mark.parametrize(
    ("words", "key", "allowed"),
    [
        (["trial.timng=false"], "trial.timng", "trial.timing"),
        (["trial={timng: false}"], "trial", "trial.timing"),
        (["strategy=static", "strategy.growth=sync"], "strategy.growth", "strategy.slot_policy"),
        (["strategy.max_running_requests=16"], "strategy.max_running_requests", "strategy=sglang"),
        (
            ["strategy=vllm", "strategy.growth=sync"],
            "strategy.growth",
            "with strategy=paged, which",
        ),
        (["sweep.brackets=maybe"], "sweep.brackets", "true or false"),
        (["sweep.repeats=1.5"], "sweep.repeats", "a whole number"),
        (["trial.timeout_seconds=soon"], "trial.timeout_seconds", "a number"),
        (["results=null"], "results", "text"),
        (["parallel.ranks=null"], "parallel.ranks", "a whole number"),
        (["parallel=context", "parallel.ranks=null"], "parallel.ranks", "a whole number"),
        (["parallel.context_ranks=null"], "parallel.context_ranks", "a whole number"),
        (["trial.timing=null"], "trial.timing", "true or false"),
        (["sweep=null"], "sweep", "sweep.points"),
        (["context=${nope}"], "context", "not looked up"),
        (["results=runs/${oc.env:HOME}"], "results", "not looked up"),
        (["sweep.contexts=[1M,'${context}']"], "sweep.contexts", "not looked up"),
        (["experiment.arms=[['seed=${oc.env:USER}']]"], "experiment.arms", "not looked up"),
        (["strategy.name=static"], "strategy.name", "strategy=static"),
        (["+new=1"], "+new", "keys that exist"),
        (["~context"], "~context", "keys that exist"),
        (["hydra.run.dir=/tmp/x"], "hydra.run.dir", "not Hydra's"),
        (["model@elsewhere=report"], "model@elsewhere", "model"),
        (["context='10M"], "context", "grammar"),
        ([""], "''", "key=value"),
        (["context"], "context", "key=value"),
    ],
)
def test_what_hydra_complains_of_is_said_in_one_line(words, key, allowed):
    with pytest.raises(BadValue) as refused:
        compose_config(words)
    assert refused.value.key == key
    assert allowed in refused.value.allowed and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "word",
    ["k" * 5000 + "=1", "k." * 2500 + "k=1", "strategy@" + "k" * 5000 + "=static", "k" * 5000],
    ids=["name", "path", "package", "word"],
)
@pytest.mark.parametrize("multirun", [False, True])
def test_a_long_key_is_said_in_one_short_line(word, multirun):
    with pytest.raises(BadValue) as refused:
        settings_of_command([HOST, word], multirun)
    assert len(str(refused.value)) < 400 and "see --help" in str(refused.value)


@pytest.mark.parametrize("word", ["workload.path=", "results=", "experiment.name=", "model.name="])
def test_a_long_value_is_said_in_one_line_or_is_a_name(word):
    try:
        settings_of_command([HOST, word + "v" * 5000], False)
    except BadValue as refused:
        assert len(str(refused)) < 400


@pytest.mark.parametrize(
    ("error", "words", "value"),
    [
        (BadValue("fill", math.inf, "to 1"), ["fill=0.5", "fill=1e400"], "1e400"),
        (BadValue("fill", math.inf, "to 1"), ["fill=[0.5, 1E999]", "seed=1e400"], "1E999"),
        (BadValue("fill", "-inf", "to 1"), ["-m", "fill=0.1,-1e400"], "-1e400"),
        (BadValue("fill", math.inf, "to 1"), ["seed=1e400"], math.inf),
        (BadValue("fill", 2.0, "to 1"), ["fill=1e400"], 2.0),
    ],
)
def test_a_number_is_repeated_as_it_was_typed(error, words, value):
    found = as_typed(error, words)
    assert (found.key, found.value, found.allowed) == ("fill", value, "to 1")


@pytest.mark.parametrize(
    "word",
    [
        "experiment.arms=3",
        "experiment.arms=[1]",
        "experiment.arms=[[nonsense]]",
        "experiment.matrix=3",
        "experiment.matrix={strategy: static}",
        "experiment.matrix={strategy: [nonsense]}",
    ],
)
def test_arms_that_are_none(word):
    with pytest.raises(BadValue):
        settings_of_command([HOST, word], False)


def test_threads_may_compose_at_once():
    words = [[f"context={n}K"] for n in range(1, 9)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(compose_config, words))
    assert [c.context for c in found] == [f"{n}K" for n in range(1, 9)]


@pytest.mark.parametrize(
    "word",
    [
        "strategy=glob(*)",
        "seed=glob(*)",
        "seed=interval(0,1)",
        "seed=range(5,0)",
        "seed=range(0,5,0)",
        "seed=range(0,100000000)",
        "seed=range(0,10,1e-9)",
        "seed=tag(x,range(0,100000000))",
    ],
)
def test_a_sweep_without_an_end_or_a_value_is_refused(word):
    with pytest.raises(BadValue) as refused:
        expand([word], multirun=True)
    assert str(refused.value).startswith(f"{word.partition('=')[0]}=")


def test_a_range_counts_up_or_down():
    assert expand(["seed=range(0,6,2)"], multirun=True) == [["seed=0"], ["seed=2"], ["seed=4"]]
    assert expand(["seed=range(2,0,-1)"], multirun=True) == [["seed=2"], ["seed=1"]]
