"""From a command line to the settings of every arm that it asks for.

An experiment's file names its arms: lists of overrides, or a matrix of them. Each arm is composed
on its own, the command line's words last, so that a user's word always wins.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from harness.compose import GROUPS, compose_config, expand
from harness.settings import Settings
from harness.sizes import BadValue
from harness.validate import settings_of

MAX_ARMS = 200


def settings_of_command(
    overrides: Sequence[str], multirun: bool, planning: bool = False
) -> list[Settings]:
    """Every arm's settings, in order, none twice; raises :class:`BadValue`."""
    found: list[Settings] = []
    for job in expand(overrides, multirun):
        config = compose_config(job)
        # Rows of earlier runs need no arms.
        for words in [job] if config.claims["from"] is not None else arms_of(config, job):
            composed = config if words == job else compose_config(words)
            settings = settings_of(composed, words, planning)
            if settings not in found:
                found.append(settings)
    if len(found) > 1 and any(s.claims_from for s in found):
        raise BadValue("claims.from", list(found[0].claims_from), "one list of runs, without -m")
    results = {s.results for s in found}
    if len(results) > 1:
        raise BadValue("results", ", ".join(sorted(results)), "one folder for all jobs")
    return found


def arms_of(config: DictConfig, job: Sequence[str]) -> list[list[str]]:
    """The override lists of a job: its own, or one for each arm of its experiment."""
    matrix, listed = _plain(config.experiment.matrix) or {}, _plain(config.experiment.arms) or []
    if not isinstance(matrix, dict) or not all(isinstance(v, list) for v in matrix.values()):
        raise BadValue("experiment.matrix", matrix, "a mapping of keys to lists of values")
    if not isinstance(listed, list) or not all(isinstance(a, list) for a in listed):
        raise BadValue("experiment.arms", listed, "a list of lists of overrides")
    axes = [[f"{key!s}={_word(v)}" for v in values] for key, values in matrix.items()]
    arms = [
        [*point, *map(str, arm)] for arm in listed or [[]] for point in itertools.product(*axes)
    ]
    if len(arms) > MAX_ARMS:
        raise BadValue("experiment", config.experiment.name, f"at most {MAX_ARMS} arms")
    return [_with_user_words(arm, job) for arm in _chosen(arms, job)]


def _plain(node: Any) -> Any:  # noqa: ANN401
    return OmegaConf.to_container(node) if OmegaConf.is_config(node) else node


def _chosen(arms: list[list[str]], job: Sequence[str]) -> list[list[str]]:
    """The arms of the strategy, model, … that the user names; all when none is named."""
    for word in job:
        key = word.partition("=")[0]
        rivals = {w for arm in arms for w in arm if w.partition("=")[0] == key}
        if key in GROUPS and rivals:
            arms = [arm for arm in arms if word in arm]
            if not arms:
                values = sorted(r.partition("=")[2] for r in rivals)
                raise BadValue(key, word.partition("=")[2], ", ".join(values))
    return arms


def _word(value: Any) -> str:  # noqa: ANN401
    return (
        str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)
    )


def _with_user_words(arm: Sequence[str], job: Sequence[str]) -> list[str]:
    """An arm's words, less those whose key the user set, then the user's."""
    own = {w.partition("=")[0] for w in job}
    return [w for w in arm if w.partition("=")[0] not in own] + list(job)
