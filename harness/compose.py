"""From a command line to composed configurations, with one clear line for a wrong one.

Hydra composes; this module finds ``conf/`` in a checkout or in a wheel, expands ``-m`` sweeps, and
turns each of Hydra's errors into the line that a user needs: key, value, what is allowed.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import itertools
import math
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, RangeSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from harness.schema import register
from harness.sizes import BadValue

GROUPS = ("strategy", "model", "hardware", "workload", "parallel", "experiment")
MAX_JOBS = 1000
MAX_KEY_CHARACTERS = 200  # Hydra looks for files of a key's name


def conf_dir() -> Path:
    """``conf/`` beside the package in a checkout, ``harness/_conf`` in a wheel."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "_conf", here.parent / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no configuration beside {here}: reinstall the package")


def options(group: str) -> list[str]:
    """The names that a group offers, e.g. ``static, paged, …`` for ``strategy``."""
    return sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Parse ``key=value`` words.

    Raises
    ------
    BadValue
        For a word that is no override, or an option that a group does not have.
    """
    parser = OverridesParser.create()
    parsed = []
    for word in arguments:
        key, equals, value = word.partition("=")
        if word.startswith(("+", "~")):
            raise BadValue(key, value, "keys that exist, without + or ~ (see --help)")
        if not equals or not key.strip():
            raise BadValue(word.strip() or "''", ..., "words of the form key=value (see --help)")
        if value == "":
            raise BadValue(key, "", "a value after '='")
        if len(key) > MAX_KEY_CHARACTERS:
            allowed = f"keys of up to {MAX_KEY_CHARACTERS} characters (see --help)"
            raise BadValue(f"{key[:40]}…", f"{value[:40]}", allowed)
        # A reference could read the environment, and a run must not depend on what it does not say.
        if "${" in value:
            raise BadValue(key, value, "a value itself: ${...} is not looked up")
        try:
            override = parser.parse_overrides([word])[0]
        except HydraException:
            raise BadValue(key, value, "a value of Hydra's grammar; quote odd characters") from None
        if re.fullmatch(r"hydra([./@].*)?", override.get_key_element()):
            raise BadValue(key, value, "the harness's own keys, not Hydra's")
        _check_group(override)
        _check_name(override)
        parsed.append(override)
    return parsed


def _check_group(override: Override) -> None:
    group = override.get_key_element()
    if group not in GROUPS:
        return
    known = options(group)
    values: list[Any] = [override.value()]
    if override.is_sweep_override():
        values = swept(override)
    for value in values:
        if str(value) not in known:
            raise BadValue(group, value, ", ".join(known))


def _check_name(override: Override) -> None:
    """A group's name is what chose its file, and stands in every row: it cannot be another."""
    group, _, leaf = override.get_key_element().partition(".")
    if leaf == "name" and group in ("strategy", "hardware", "workload", "parallel"):
        known = ", ".join(f"{group}={option}" for option in options(group))
        raise BadValue(override.get_key_element(), override.get_value_string(), known)


def as_typed(error: BadValue, arguments: Sequence[str]) -> BadValue:
    """The same complaint with the number as it was typed: 1e400 is read as ``inf``."""
    if str(error.value) not in ("inf", "-inf", "nan"):
        return error
    for word in reversed(arguments):
        key, _, value = word.partition("=")
        for item in re.split(r"[][,\s]+", value) if key == error.key else ():
            with contextlib.suppress(ValueError):
                if not math.isfinite(float(item)):
                    return BadValue(key, item, error.allowed)
    return error


def swept(override: Override) -> list[str]:
    """The values of a sweep, up to one more than a run may have jobs."""
    key, text = override.get_key_element(), override.get_value_string()
    lists = "a,b,c or choice(a,b,c) or range(first,end,step), of one value or more"
    sweep = override.value()
    if isinstance(sweep, RangeSweep):
        span = float(sweep.stop or 0) - float(sweep.start or 0)
        if not sweep.step or not span / sweep.step <= MAX_JOBS:
            raise BadValue(key, text, f"up to {MAX_JOBS} jobs in one sweep")
    elif not isinstance(sweep, ChoiceSweep):
        raise BadValue(key, text, lists)
    try:
        found = list(itertools.islice(override.sweep_string_iterator(), MAX_JOBS + 1))
    except (HydraException, ValueError, TypeError, ArithmeticError):
        found = []
    if not found:
        raise BadValue(key, text, lists)
    return found


def expand(arguments: Sequence[str], multirun: bool) -> list[list[str]]:
    """The override lists of every job: one, or the product of all sweeps with ``-m``."""
    axes: list[list[str]] = []
    for override in parse_overrides(arguments):
        if override.is_sweep_override():
            key = override.get_key_element()
            if not multirun:
                raise BadValue(key, override.get_value_string(), "one value, or add -m to sweep")
            axes.append([f"{key}={v}" for v in swept(override)])
        else:
            axes.append([override.input_line or ""])
    jobs = [list(job) for job in itertools.islice(itertools.product(*axes), MAX_JOBS + 1)]
    if len(jobs) > MAX_JOBS:
        raise BadValue("-m", f"more than {MAX_JOBS} jobs", f"up to {MAX_JOBS} jobs in one sweep")
    return jobs


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """One resolved configuration.

    Raises
    ------
    BadValue
        For a misspelt key, a wrong type or an unknown option.
    """
    register()
    parsed = parse_overrides(overrides)
    try:
        return _composed(overrides)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        raise _one_line(error, parsed) from None


def _composed(overrides: Sequence[str]) -> DictConfig:
    return copy.deepcopy(_composed_once(tuple(overrides)))


_COMPOSING = threading.Lock()  # Hydra's session is the process's: one thread at a time


@functools.lru_cache(maxsize=256)
def _composed_once(overrides: tuple[str, ...]) -> DictConfig:
    """What these words mean; they alone decide it, and Hydra takes a tenth of a second to say."""
    with _COMPOSING:
        running = GlobalHydra.instance().is_initialized()
        session = (
            contextlib.nullcontext()
            if running
            else initialize_config_dir(str(conf_dir()), version_base="1.3", job_name="harness")
        )
        with session:
            config = compose("config", overrides=list(overrides))
    OmegaConf.resolve(config)
    return config


def _one_line(error: Exception, parsed: Sequence[Override]) -> BadValue:
    """The override that Hydra complains of, as one line."""
    text = re.sub(r"\s+", " ", f"{error} {error.__cause__ or ''}").strip()
    guilty = _guilty(text, parsed)
    if guilty is None:
        return BadValue("configuration", "", text[:300])
    key, value = guilty.get_key_element(), guilty.get_value_string()
    groups = [o.input_line or "" for o in parsed if o.get_key_element() in GROUPS]
    full = re.search(r"full_key: (\S+)", text)
    return BadValue(key, value, _allowed(full[1] if full else key, text, groups))


def _guilty(text: str, parsed: Sequence[Override]) -> Override | None:
    """The override that an error of Hydra's names."""
    named = re.search(r"(?:merging override (.+?)=|override '(.+?)')", text)
    key = named and (named[1] or named[2])
    return next((o for o in reversed(parsed) if o.get_key_element() == key), None)


KINDS = {
    r"to Integer": "a whole number",
    r"to Float": "a number",
    r"not a valid bool|to Boolean": "true or false",
    r"to string": "text",
}
# Of a value that may not be null, by the type that its key has.
KINDS_OF_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def _allowed(key: str, text: str, groups: Sequence[str]) -> str:
    """What a key may be, read off the configuration of the chosen groups."""
    conf = _composed(groups)
    known = _keys(conf)
    children = [k for k in known if k.startswith(f"{key}.")]
    if children:
        return "its keys: " + ", ".join(children)
    if key in known and "not Optional" in text:
        return KINDS_OF_TYPES.get(_type_of(conf, key), "not null")
    if key in known:
        return next((kind for what, kind in KINDS.items() if re.search(what, text)), "another type")
    parent = key.rpartition(".")[0]
    siblings = [k for k in known if k.rpartition(".")[0] == parent]
    elsewhere = _keys_of_other_strategies(known)
    if key in elsewhere:
        such = ", ".join(_nearest(key, known) or siblings[:12])
        return f"with {' or '.join(elsewhere[key])}, which has this key; else keys such as {such}"
    near = [
        f"{k} (with {' or '.join(elsewhere[k])})" if k in elsewhere else k
        for k in _nearest(key, [*known, *elsewhere])
    ]
    return "keys such as " + ", ".join(near or siblings[:12] or sorted(GROUPS))


def _type_of(conf: DictConfig, key: str) -> Any:  # noqa: ANN401
    node: Any = conf
    for name in key.split("."):
        node = node._get_node(name)
    return node._metadata.ref_type


def _keys_of_other_strategies(known: Sequence[str]) -> dict[str, list[str]]:
    """Keys that the chosen strategy has not, and who has them: ``strategy=sglang``."""
    owners: dict[str, list[str]] = {}
    for word in (f"strategy={name}" for name in options("strategy")):
        for key in set(_keys(_composed([word]))) - set(known):
            owners.setdefault(key, []).append(word)
    return owners


def _nearest(key: str, known: Sequence[str], most: int = 3) -> list[str]:
    """Return the keys that one was most likely meant to be, the likeliest first.

    A section may have been left out, or be another: then the last word tells.
    """

    def likeness(other: str) -> float:
        whole = difflib.SequenceMatcher(None, other, key).ratio()
        words = other.rpartition(".")[2], key.rpartition(".")[2]
        leaf = difflib.SequenceMatcher(None, *words).ratio()
        return max(whole if whole >= 0.6 else 0.0, 0.9 * leaf if leaf >= 0.8 else 0.0)

    found = sorted(((likeness(k), k) for k in known), key=lambda pair: (-pair[0], pair[1]))
    return [k for score, k in found[:most] if score]


def _keys(node: Any, prefix: str = "") -> list[str]:  # noqa: ANN401
    if not isinstance(node, DictConfig):
        return [prefix]
    out = [prefix] if prefix else []
    for name in node:
        child = node._get_node(name)
        out += _keys(child, f"{prefix}.{name!s}" if prefix else str(name))
    return out
