"""Growing a sequence: room from the strategy, tokens through the append kernel, stalls measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from harness.growth import Growth
from harness.ledger import Ledger
from harness.steps import Steps
from harness.synthetic import Content
from harness.workspace import BANK_TOKENS
from strategies.errors import OutOfMemory, Refused
from strategies.strategy import Strategy

EVENTS_PER_FILL = 100
PEAK_SHARE = 0.005  # by which memory may have grown since it was last read, when some is given back


def uncounted_bytes(strategy: Strategy, ledger: Ledger) -> int:
    """Committed K/V bytes that the ledger has not been told of yet; negative when given back."""
    held = sum(n for (_, a), n in ledger.bytes.items() if a.startswith("kv_"))
    return strategy.footprint().committed_bytes - held


@dataclass
class Filler:
    """Fills sequences one after another to a target, or until the strategy refuses.

    Parameters
    ----------
    contents : sequence of Content, or None
        None touches pages without writing tokens (bracket trials).
    grain_tokens : int
        The smallest step: what the strategy hands out at once.
    windows : sequence of int
        Tokens of the windows behind which pages are given back: memory is read before that.
    """

    strategy: Strategy
    grain_tokens: int
    ledger: Ledger
    contents: Sequence[Content] | None
    check: Callable[[int], None] = lambda tokens: None  # may end the fill: another rank failed
    growth: Growth = field(default_factory=Growth)
    windows: Sequence[int] = ()
    _pending_seconds: float = 0.0
    _reported_bytes: int = 0

    def fill(self, sequence: int, target_tokens: int) -> None:
        """Extend to ``target_tokens`` resident tokens.

        Raises
        ------
        OutOfMemory, Refused
            With as much resident as fits: a refused step is halved down to one grain.
        """
        began = time.perf_counter()
        steps = Steps(self.grain_tokens)
        report_every = max(BANK_TOKENS, target_tokens // EVENTS_PER_FILL)
        written = reported = before = self.strategy.resident_tokens(sequence)
        try:
            while (at := self.strategy.resident_tokens(sequence)) < target_tokens:
                self.check(self.ledger.resident_tokens)
                if any(at // w > before // w for w in self.windows) and self._grew():
                    self._report()
                before = at
                want = steps.next(at, target_tokens)
                try:
                    self._extend(sequence, want)
                except (OutOfMemory, Refused):
                    if not steps.halve():
                        raise
                    continue
                at += want
                if at - written >= BANK_TOKENS or at >= target_tokens:
                    self._write(sequence, written, at)
                    written = at
                if at - reported >= report_every:
                    self._report()
                    reported = at
        finally:
            if written < self.strategy.resident_tokens(sequence):
                self._write(sequence, written, self.strategy.resident_tokens(sequence))
            self._report()
            self.growth.seconds += time.perf_counter() - began

    def _extend(self, sequence: int, tokens: int) -> None:
        self._pending_seconds += self.growth.extend(self.strategy, sequence, tokens)
        self.ledger.resident_tokens += tokens

    def _grew(self) -> bool:
        """Whether more is committed than at any reading so far, by what a peak may miss."""
        committed = self.strategy.footprint().committed_bytes
        return committed > self._reported_bytes * (1 + PEAK_SHARE)

    def _report(self) -> None:
        """One ledger event for what was committed since the last one, in the background too."""
        self.strategy.settle()  # or the meters would see chunks that the ledger does not yet
        nbytes = uncounted_bytes(self.strategy, self.ledger)
        if nbytes:
            committed = self.strategy.footprint().committed_bytes
            self._reported_bytes = max(self._reported_bytes, committed)
            self.ledger.event("fill", "kv_pages", nbytes, self._pending_seconds)
            self._pending_seconds = 0.0

    def _write(self, sequence: int, lo: int, hi: int) -> None:
        if self.contents is None or hi <= lo:
            return
        from kernels import ops

        views = self.strategy.batch([sequence])
        for content, view in zip(self.contents, views, strict=True):
            # A window's pages may be gone: its tokens are no longer written nor read.
            first = max(lo, view.starts[0])
            codes = view.geometry.kv_dtype == "fp8_e4m3" and view.arena.device.type == "cpu"
            append = ops.append_codes_run if codes else ops.append_run
            for layer in range(view.geometry.layers):
                for piece in content.pieces(sequence, layer, first, hi):
                    append(view, layer, *content.stored(piece), 0, piece.start)


def plant_needles(
    strategy: Strategy,
    content: Content,
    group_index: int,
    sequence: int,
    layer: int,
    positions: Sequence[int],
) -> None:
    """Overwrite single tokens through the scattered append."""
    import torch

    from harness.synthetic import NEEDLE_AMPLITUDE
    from kernels import ops

    view = strategy.batch([sequence])[group_index]
    needles = [content.add_needle(sequence, layer, p) for p in positions]
    heads = view.geometry.kv_heads
    k = torch.stack([n.signs * NEEDLE_AMPLITUDE for n in needles])
    v = torch.stack([n.value for n in needles])
    device = view.arena.device
    ops.append(
        view,
        layer,
        k[:, None, :].expand(-1, heads, -1).to(device, torch.bfloat16).contiguous(),
        v[:, None, :].expand(-1, heads, -1).to(device, torch.bfloat16).contiguous(),
        torch.zeros(len(needles), dtype=torch.int32, device=device),
        torch.tensor(positions, dtype=torch.int64, device=device),
    )
