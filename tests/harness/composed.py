"""Settings of words, for tests that make many: Hydra composes each choice of groups once."""

from __future__ import annotations

import functools

from omegaconf import DictConfig, OmegaConf

from harness.compose import GROUPS, compose_config
from harness.settings import Settings
from harness.validate import settings_of


@functools.cache
def _of_groups(*groups: str) -> DictConfig:
    return compose_config(groups)


def made(*words: str) -> Settings:
    """Validated settings; other words than groups are merged in, checked by the same schema."""
    words = ("hardware=scale_model", *words)
    groups = [w for w in words if w.partition("=")[0] in GROUPS]
    rest = OmegaConf.from_dotlist([w for w in words if w not in groups])
    conf = OmegaConf.merge(_of_groups(*groups), rest)
    assert isinstance(conf, DictConfig)
    return settings_of(conf, words)
