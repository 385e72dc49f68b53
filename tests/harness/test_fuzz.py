"""Whatever a user types is refused in one line, or is a configuration that the planner takes."""

from __future__ import annotations

import os
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness import forecast
from harness.arms import settings_of_command
from harness.compose import compose_config, expand, parse_overrides
from harness.sizes import BadValue, parse_bytes, parse_tokens
from harness.validate import settings_of
from tests.harness.somebody_else import somebody_else

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
STRATEGIES = ("static", "paged", "eager_pages", "sglang", "vllm")
# Not written: what would start other processes, write elsewhere, or judge a user's folders.
LEFT_OUT = ("hydra", "results", "claims")


def _leaves(node, prefix=""):
    for name in node:
        key = f"{prefix}{name}"
        child = node._get_node(name)
        if isinstance(child, DictConfig) and not child._is_none():
            yield from _leaves(child, f"{key}.")
        else:
            yield key


CONFIGS = {s: compose_config(["hardware=scale_model", f"strategy={s}"]) for s in STRATEGIES}
KEYS = {
    name: [k for k in _leaves(conf) if not k.startswith(LEFT_OUT) and not k.endswith(".name")]
    for name, conf in CONFIGS.items()
}

ODD = [
    *("", " ", "0", "-1", "1e999", "nan", "inf", "10Q", "1Ti", "999999999999999999999999999"),
    *("auto", "null", "true", "[]", "{}", "../..", "/etc/passwd", "a\nb", "\x1b[31m", "é", "1.5M"),
]
scalars = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(2**70), 2**70),
    st.integers(-2, 300),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=12),
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.text(max_size=3), scalars, max_size=2),
)


def refused_in_one_line(error):
    text = str(error)
    return error.key and text.isprintable() and len(text) < 2000


@st.composite
def changes(draw):
    strategy = draw(st.sampled_from(STRATEGIES))
    keys = draw(st.lists(st.sampled_from(KEYS[strategy]), min_size=1, max_size=2, unique=True))
    return strategy, {k: draw(values) for k in keys}


@settings(max_examples=80, deadline=None)
@given(change=changes())
def test_any_value_of_any_key(change):
    strategy, changed = change
    conf = CONFIGS[strategy].copy()
    try:
        for key, value in changed.items():
            OmegaConf.update(conf, key, value)
        OmegaConf.resolve(conf)
    except (OmegaConfBaseException, ValueError):
        return  # the schema's to refuse; Hydra's errors are put into one line elsewhere
    try:
        made = settings_of(conf, ())
        forecast.check(made)
    except BadValue as error:
        assert refused_in_one_line(error)


# No traces: a folder, devices, a pipe, holes, what /proc calls regular files, names that are none.
PATHS = [
    *("/", "/dev/zero", "/dev/tty", "/proc/self/mem", "/proc/self/pagemap", "/proc/self/environ"),
    *("{folder}/pipe", "{folder}/holes", "{folder}/header", "{folder}/unreadable", "{folder}/loop"),
    *("a" * 300, "a/" * 3000, "~nobody-of-this-name/trace", "~\0", "\ud800", "{folder}/pipe/trace"),
]


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    os.mkfifo(folder / "pipe")
    (folder / "loop").symlink_to(folder / "loop")
    for name, text in (("holes", ""), ("header", HEADER), ("unreadable", f"{HEADER}1.0,1,1\n")):
        (folder / name).write_text(text)
    for name in ("holes", "header"):
        os.truncate(folder / name, 1 << 40)
    (folder / "unreadable").chmod(0)
    return folder


def of_a_trace(path):
    conf = CONFIGS["paged"].copy()
    OmegaConf.update(conf, "workload.kind", "trace")
    OmegaConf.update(conf, "workload.path", path)
    return settings_of(conf, ())


@pytest.mark.parametrize("path", PATHS, ids=lambda p: ascii(p)[:40])
def test_a_path_of_no_trace_is_one_line(odd_files, path):
    path = path.replace("{folder}", str(odd_files))
    denied = path.endswith("unreadable") and os.geteuid() == 0
    me = somebody_else() if denied else nullcontext()  # root may read everything
    with me, pytest.raises(BadValue, match="allowed: a trace") as caught:
        of_a_trace(path)
    assert refused_in_one_line(caught.value) and caught.value.key == "workload.path"


@settings(max_examples=60, deadline=None)
@given(path=st.one_of(st.sampled_from(ODD), st.text(min_size=1), st.from_regex(r"[~/.\0]+\w*")))
def test_any_path_of_a_trace(path):
    try:
        of_a_trace(path)
    except BadValue as error:
        assert refused_in_one_line(error) and error.key == "workload.path"


@settings(max_examples=120, deadline=None)
@given(word=st.one_of(st.text(max_size=30), st.from_regex(r"[a-z.@/~+]{0,12}=.{0,20}")))
def test_any_word(word):
    try:
        parse_overrides([word])
        expand([word], multirun=True)
    except BadValue as error:
        assert refused_in_one_line(error)


@settings(max_examples=15, deadline=None)
@given(
    key=st.one_of(st.sampled_from(KEYS["paged"]), st.text("abc._@", min_size=1, max_size=8)),
    value=st.one_of(st.sampled_from(ODD), st.text(max_size=8), st.integers().map(str)),
    multirun=st.booleans(),
)
def test_any_word_through_composition(key, value, multirun):
    try:
        for made in settings_of_command(["hardware=scale_model", f"{key}={value}"], multirun)[:3]:
            forecast.check(made)
    except BadValue as error:
        assert refused_in_one_line(error)


@given(text=st.one_of(st.text(max_size=60), st.from_regex(r"\d{0,45}(\.\d*)?[KMGT]?i?B?")))
@pytest.mark.parametrize("parse", [parse_tokens, parse_bytes])
def test_any_size(parse, text):
    try:
        assert parse(text, "key") >= 1
    except BadValue as error:
        assert refused_in_one_line(error) and error.key == "key"
