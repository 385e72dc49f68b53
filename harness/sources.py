"""The rows that figures of summary.json come from: each can be followed to its trials."""

from __future__ import annotations

from typing import Any

import pandas as pd

from harness.ranks_summary import held_tokens, per_trial
from harness.rows import Row
from harness.summary import admitted, arms, filled, one_more, started

SHOWN = 3


def arms_of(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows of each arm by the name that summary.json gives it."""
    records = [row | {"_at": at} for at, row in zip(rows.index, as_written(rows), strict=True)]
    return {name: rows.loc[[r["_at"] for r in own]] for name, own in arms(records).items()}


def as_written(rows: pd.DataFrame) -> list[Row]:
    """Return rows as a run writes them: None for empty, whole numbers as int."""
    return [{k: _plain(v) for k, v in row.items()} for row in rows.to_dict("records")]


def _plain(value: Any) -> Any:  # noqa: ANN401
    """Return a value as the row was written: None for empty, whole numbers as int."""
    if value == "" or value != value:
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Sources:
    """Trials by what summary.json says of an arm.

    Parameters
    ----------
    rows : pandas.DataFrame
        Of the run; a figure that none of them gives has no trial.
    """

    def __init__(self, rows: pd.DataFrame) -> None:
        self.arms: dict[str, list[Row]] = {
            name: per_trial(r for r in own if r["trial_id"])
            for name, own in arms(as_written(rows)).items()
        }

    def end(self, arm: str, point: str, tokens: object, ok: bool) -> list[str]:
        """Trials of one end of an OOM point's bracket.

        Parameters
        ----------
        arm : str
            As summary.json names it.
        point : str
            ``startup``, ``admit`` or ``resident``.
        tokens : int
            The end's tokens.
        ok : bool
            Whether it is the largest that is ok, else the smallest that is not.
        """
        own = self.arms.get(arm, [])
        if point == "resident":
            full = [r for r in own if filled(r)]
            if ok:
                return _ids(r for r in full if held_tokens(r) == tokens)
            failed = [r for r in full if r["status"] in ("oom", "refused")]
            if failed:
                return _ids(r for r in failed if held_tokens(r) + one_more(r) == tokens)
        answer = admitted if point == "admit" else started
        asked = ((r, answer(r)) for r in own if r["context_tokens"] == tokens)
        return _ids(r for r, said in asked if said and (said == "ok") is ok)

    def bracket(self, arm: str, point: str, ok: object, not_ok: object) -> list[str]:
        """Trials of both ends of a bracket."""
        both = self.end(arm, point, ok, True) + self.end(arm, point, not_ok, False)
        return list(dict.fromkeys(both))

    def peak(self, arm: str, nbytes: object) -> list[str]:
        """Trials whose peak is an arm's largest."""
        return _ids(r for r in self.arms.get(arm, []) if r["peak_device_bytes"] == nbytes)

    def decode(self, arm: str, tokens: object) -> list[str]:
        """Trials that timed decode at so many resident tokens."""
        timed = (
            r
            for r in self.arms.get(arm, [])
            if r["status"] == "ok" and r["attention_decode_tokens_per_second"] is not None
        )
        return _ids(r for r in timed if held_tokens(r) == tokens)


def _ids(rows: Any) -> list[str]:  # noqa: ANN401
    return list(dict.fromkeys(str(r["trial_id"]) for r in rows))


def first_of(trials: list[str], most: int = SHOWN) -> str:
    """Name trials, the first few of them."""
    more = f" and {len(trials) - most} more" if len(trials) > most else ""
    return " ".join(trials[:most]) + more
