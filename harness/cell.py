"""One cell of a sweep: what is run, and the identity that its row carries."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from harness.ranks import share_tokens
from harness.settings import Settings, from_json, to_json


@dataclass(frozen=True)
class Cell:
    """One strategy, one configuration, one context, one fill, one repeat.

    ``purpose`` is ``point`` (a cell of the sweep, written through the append kernel and timed
    when ``timing``), ``bracket`` (start-up and admission only) or ``resident`` (one sequence grows
    until it is refused; pages are touched, not written).
    """

    settings: Settings
    context_tokens: int
    fill: float = 1.0
    purpose: str = "point"
    timing: bool = True
    histories: bool = False  # also time prefill at several histories
    repeat: int = 0
    real: bool = False  # the engine itself is started, not its emulation
    context_index: int = 0  # which share of each sequence this rank has; no part of the identity

    @property
    def local_context_tokens(self) -> int:
        """Tokens of one sequence of full context that this rank keeps."""
        return self.settings.local_tokens(self.context_tokens, self.context_index)

    @property
    def target_tokens(self) -> int:
        """Tokens of each sequence that are to be resident on this rank."""
        return self.settings.local_tokens(self.filled_tokens, self.context_index)

    @property
    def filled_tokens(self) -> int:
        """Tokens of each sequence that are to be resident over all ranks."""
        return math.floor(self.context_tokens * self.fill + 1e-9)

    @property
    def every_rank_sees(self) -> bool:
        """Whether the last token sees tokens of every rank's share, in every layer group."""
        tokens, ranks = self.filled_tokens, self.settings.parallel.context_ranks
        for group in self.settings.full_model().groups:
            window = group.window_tokens * ranks
            visible = tokens - ((tokens - 1) // window * window if window and tokens else 0)
            if not share_tokens(visible, group.geometry.page_tokens, ranks, ranks - 1):
                return False
        return True

    def content(self, with_strategy: bool = True) -> dict[str, Any]:
        """Everything that decides what is measured, and nothing else."""
        data = to_json(self.settings)
        keep = ("model", "workload", "parallel", "trial", "sequences", "one_process", "seed")
        out = {k: data[k] for k in (*keep, "fault")}
        described = ("kind", "device_name", "total_bytes", "context_bytes", "sm_count")
        out["hardware"] = {k: data["hardware"][k] for k in described}
        out["hardware"]["asked_bytes"] = self.settings.hardware.asked_bytes
        if self.settings.engine:  # the model is then one rank's stand-in
            out["stand_in"] = True
        if with_strategy:
            out |= {"strategy": data["strategy"], "options": data["options"]}
            out |= {"real": True} if self.real else {}
        return out | {
            "context_tokens": self.context_tokens,
            "fill": self.fill,
            "purpose": self.purpose,
            "timing": self.timing,
            "histories": self.histories,
            "repeat": self.repeat,
        }

    @property
    def trial_id(self) -> str:
        """Hash of the content; a changed configuration is another cell."""
        return _hash(self.content())

    @property
    def pair_id(self) -> str:
        """The same for every strategy that is given the same question."""
        return _hash(self.content(with_strategy=False))

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary for a trial's process."""
        own = (
            "context_tokens",
            "fill",
            "purpose",
            "timing",
            "histories",
            "repeat",
            "real",
            "context_index",
        )
        return {"settings": to_json(self.settings), **{k: getattr(self, k) for k in own}}


def cell_from_json(data: dict[str, Any]) -> Cell:
    """The inverse of :meth:`Cell.to_json`."""
    return Cell(**{**data, "settings": from_json(data["settings"])})


def _hash(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
