"""The planner's command: tables, JSON, exit codes, and that it needs neither torch nor a GPU."""

import json
import subprocess
import sys

import pytest

from harness.plan import main


def ask(capsys, *words):
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_a_start_that_fails_is_an_answer(capsys):
    code, out, err = ask(capsys, "strategy=sglang", "hardware=h200", "model=qwen3_30b_a3b")
    assert (code, err) == (0, "")
    assert "does not start at 10M" in out
    assert "76.33 GiB" in out and "req_to_token took 76.33 GiB" in out
    assert "smallest change that lets it start: max_running_requests=" in out
    assert "largest context that starts, looked for up to 160M: " in out
    for point in ("startup", "admit", "resident"):
        assert f"\n{point}" in out


def test_how_far_each_answer_was_looked_for_stands_beside_it(capsys):
    words = ["strategy=vllm", "strategy.max_num_seqs=16", "hardware=h200", "model=qwen3_30b_a3b"]
    _, out, _ = ask(capsys, *words)
    rows = {line.split()[0]: line for line in out.splitlines() if line}
    assert rows["startup"].endswith("no failure up to 10M, the context asked for")
    further = int(rows["largest"].split()[-2].replace(",", ""))
    assert "looked for up to 160M" in rows["largest"] and 10_000_000 < further < 160_000_000
    _, out, _ = ask(capsys, *words, f"context={further + 1}")
    assert f"vllm does not start at {further + 1:,}" in out


@pytest.mark.parametrize(
    ("words", "said", "unsaid"),
    [
        (
            ["strategy=static", "strategy.mem_fraction=0.65", "hardware=h200"],
            "no flag lets it accept a request of 10M; the longest that it accepts is ",
            "context=2 ",
        ),
        (
            ["strategy=vllm", "hardware=h200"],
            "no flag lets it start at 10M; the longest that it accepts is ",
            "smallest change",
        ),
        (
            ["strategy=sglang", "strategy.max_running_requests=16", "hardware=h200"],
            "filling is refused at ",
            "accepts requests of up to 4,998,519",
        ),
    ],
)
def test_a_shorter_context_is_called_one(capsys, words, said, unsaid):
    _, out, _ = ask(capsys, *words)
    assert said in out and unsaid not in out and "(a shorter context" not in out
    advice = out[out.index("\nno flag") :].splitlines()[1]
    assert advice.count("no flag lets it") == 1
    _, out, _ = ask(capsys, *words, "json=true")
    (entry,) = json.loads(out)["strategies"].values()
    assert entry["smallest_change"]["admit"] is None
    tokens = [v for k, v in entry["longest_accepted"].items() if k.startswith(("cont", "max_mod"))]
    assert f"{int(tokens[0]):,} tokens" in advice


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        (["strategy=vllm", "strategy.max_num_seqs=16"], "kv_cache_memory_bytes=100000000000"),
        (["strategy=vllm", "strategy.max_num_seqs=16"], "gpu_memory_utilization=1"),
        (["strategy=sglang", "context=131072"], "mem_fraction_static=0.02"),
        (["strategy=sglang", "strategy.max_running_requests=16"], "max_total_tokens=5000000"),
    ],
)
def test_a_given_flag_that_stands_in_the_way_is_taken_back(capsys, words, flag):
    words = [*words, "hardware=h200", "model=qwen3_30b_a3b"]
    assert "smallest change" not in ask(capsys, *words)[1]  # the engine's own default does it
    _, out, _ = ask(capsys, *words, f"strategy.{flag}")
    (line,) = [x for x in out.splitlines() if x.startswith("smallest change that lets it")]
    assert f": {flag.partition('=')[0]}=null  (the engine's own default; " in line


@pytest.mark.parametrize("fraction", ["0.995", "1"])
def test_no_context_starts_beside_too_large_a_pool(capsys, fraction):
    words = ("strategy=sglang", f"strategy.mem_fraction_static={fraction}", "hardware=h200")
    code, out, err = ask(capsys, *words)
    assert (code, err) == (0, "")
    assert "largest context that starts, looked for up to 160M: none does" in out


@pytest.mark.parametrize(
    "flag",
    ["chunked_prefill_size", "cuda_graph_max_bs", "max_running_requests", "max_total_tokens"],
)
def test_flags_end_where_the_engines_integers_do(capsys, flag):
    words = ("strategy=sglang", "hardware=h200")
    assert ask(capsys, *words, f"strategy.{flag}={2**31 - 1}")[0] == 0
    code, _, err = ask(capsys, *words, f"strategy.{flag}={2**31}")
    assert code != 0 and err.startswith(f"harness.plan: strategy.{flag}={2**31}: ")


def test_json_has_the_shape_of_a_summary(capsys):
    words = ("-m", "strategy=static,paged,eager_pages,sglang,vllm", "hardware=h200", "json=true")
    code, out, _ = ask(capsys, *words)
    made = json.loads(out)
    assert (code, made["schema"], made["claims"]) == (0, 1, [])
    assert sorted(made["strategies"]) == ["eager_pages", "paged", "sglang", "static", "vllm"]
    for entry in made["strategies"].values():
        for point in ("startup", "admit", "resident"):
            assert entry[point]["limited_by"] in ("oom", "refused", "crash", "sweep_end")
            assert entry[point]["ok"] >= 1
        assert entry["peak_device_bytes"] > 0
        assert entry["decode"] == []
    static = made["strategies"]["static"]["startup"]
    assert static["limited_by"] == "oom" and static["not_ok"] == static["ok"] + 1
    assert made["strategies"]["paged"]["startup"]["ok"] == 10_000_000


def test_the_scale_model_has_the_device_points(capsys):
    points = []
    for hardware in ("h200", "scale_model"):
        _, out, _ = ask(capsys, "strategy=static", f"hardware={hardware}", "json=true")
        points.append(json.loads(out)["strategies"]["static"]["startup"]["ok"])
    assert abs(points[0] - points[1]) <= 2 * 22 * 128


def test_a_smaller_device_moves_the_points(capsys):
    ok = []
    for capacity in ("60GiB", "120GiB"):
        words = ("strategy=paged", "hardware=h200", f"hardware.capacity={capacity}", "json=true")
        ok.append(json.loads(ask(capsys, *words)[1])["strategies"]["paged"]["resident"]["ok"])
    assert ok[1] > 2 * ok[0]


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("json=maybe", "json=maybe"),
        ("strategy=magic", "strategy=magic"),
        ("strategy.version=9", "version"),
        ("context=ten", "context=ten"),
        ("nonsense", "nonsense"),
        ("context=10M,20M", "add -m"),
        ("strategy.mem_fraction_static=1e400", "mem_fraction_static=1e400"),
        ("strategy.page_size=0", "strategy.page_size=0"),
        ("context=${oc.env:HOME}", "not looked up"),
        ("k" * 5000 + "=1", "keys of up to"),
    ],
)
def test_bad_input_is_one_line(capsys, word, named):
    words = [word] if word.startswith("strategy=") else ["strategy=sglang", word]
    code, out, err = ask(capsys, *words)
    assert (code, out) == (2, "")
    assert named in err and err.count("\n") == 1


SCALING = ("experiment=scaling", "model=report", "parallel=context", "hardware=scale_model")


def test_every_arm_of_an_experiment_is_planned(capsys):
    code, out, err = ask(capsys, *SCALING)
    assert (code, err) == (0, "")
    lines = out[out.index("\nplanned ") :].splitlines()[3:]
    for ranks, line in zip((2, 4, 8, 16, 32, 64), lines, strict=True):
        assert line.startswith(f"paged, emulated_ranks {ranks} ")
    assert "1 of 6: paged, emulated_ranks 2\npaged at 10M: " in out
    made = json.loads(ask(capsys, *SCALING, "json=true")[1])["strategies"]
    held = [one["resident"]["ok"] for one in made.values()]
    assert len(held) == 6 and held == sorted(held) and held[-1] == 10_000_000
    assert all(f"  {tokens:,}  " in line for tokens, line in zip(held, lines, strict=True))


def test_contexts_of_one_arm_are_told_apart(capsys):
    _, out, _ = ask(capsys, "-m", "context=1M,2M", "hardware=h200", "json=true")
    assert list(json.loads(out)["strategies"]) == ["paged, context 1M", "paged, context 2M"]


def test_context_ranks_are_planned_in_tokens_of_whole_sequences(capsys):
    words = ("parallel=context", "parallel.ranks=4", "hardware=h200")
    _, out, _ = ask(capsys, *words, "json=true")
    (entry,) = json.loads(out)["strategies"].values()
    assert entry["startup"]["ok"] == 10_000_000
    ok, not_ok = entry["admit"]["ok"], entry["admit"]["not_ok"]
    assert 1_000_000 < ok == not_ok - 1
    _, out, _ = ask(capsys, *words)
    assert f"context={ok}" in out and "paged starts at 10M; " in out
    for context, admitted in ((ok, True), (not_ok, False)):
        _, out, _ = ask(capsys, *words, f"context={context}")
        assert ("accepts requests of up to" not in out) == admitted


def test_the_command_imports_nothing_that_it_does_not_need():
    """What takes long to import, numpy included: a prediction takes under a second."""
    script = (
        "import sys; from harness.plan import main; "
        "main(['-m', 'strategy=static,paged,sglang,vllm', 'workload=trace', 'hardware=h200']); "
        "large = {'torch', 'pandas', 'triton', 'matplotlib', 'numpy', 'scipy', 'pynvml'}; "
        "found = large & set(sys.modules); "
        "sys.exit(str(found) if found else 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vllm" in done.stdout


@pytest.mark.parametrize("strategy", ["static", "sglang", "vllm"])
def test_a_plan_takes_few_enough_calls_to_be_told_in_a_second(strategy):
    """Calls are the same on every machine, seconds are not: a million takes about half of one."""
    script = (
        "import cProfile, pstats, sys; from harness.plan import main; p = cProfile.Profile(); "
        f"p.runcall(main, ['strategy={strategy}', 'context=10M', 'hardware=h200']); "
        "print(pstats.Stats(p).total_calls, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0 and " at 10M" in done.stdout
    assert 10_000 < int(done.stderr) < 1_500_000
