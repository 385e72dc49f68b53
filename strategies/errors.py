"""The ways in which a strategy says no, and how an engine that it emulates would end."""

from __future__ import annotations


class OutOfMemory(Exception):
    """An allocation did not fit; the state is as it was before the call.

    Parameters
    ----------
    phase : str
        Phase of the trial: ``context, weights, tables, pool, workspace, fill``.
    allocation : str
        Name of the strategy's allocation, e.g. ``kv_pool`` or ``req_to_token``.
    requested_bytes : int
        The whole allocation, not the piece that the driver refused.
    free_bytes : int
        What was free before its first byte.
    tokens : int
        Tokens resident when it happened.
    source : str
        Who refused: ``driver`` (CUDA), ``torch`` (its allocator) or ``budget`` (the scale model).
    refused_bytes : int
        The piece that was refused; goes to the timeline.
    """

    def __init__(
        self,
        phase: str,
        allocation: str,
        requested_bytes: int,
        free_bytes: int,
        tokens: int = 0,
        source: str = "driver",
        refused_bytes: int = 0,
    ) -> None:
        self.phase, self.allocation = phase, allocation
        self.requested_bytes, self.free_bytes = requested_bytes, free_bytes
        self.tokens, self.source = tokens, source
        self.refused_bytes = refused_bytes or requested_bytes
        super().__init__(
            f"{allocation} ({phase}): asked {requested_bytes} bytes, {free_bytes} free ({source})"
        )


class Refused(Exception):
    """A strategy declined by its own rule, before memory ran out (vLLM's start-up check, say).

    Parameters
    ----------
    phase, allocation : str
        As in :class:`OutOfMemory`.
    requested_bytes, free_bytes : int
        What was needed and what the rule allowed.
    message : str
        The rule's own words.
    """

    def __init__(
        self, phase: str, allocation: str, requested_bytes: int, free_bytes: int, message: str
    ) -> None:
        self.phase, self.allocation = phase, allocation
        self.requested_bytes, self.free_bytes = requested_bytes, free_bytes
        super().__init__(message)


class EngineCrash(Exception):
    """The engine that is emulated crashes at start-up, by a fault of its own and not for memory."""
