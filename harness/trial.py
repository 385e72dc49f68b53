"""One trial: the phases of a rank's life, from the context to the last timed step.

Phases: context, (nccl), weights, tables, pool, workspace = ready; then fill, decode,
prefill. A trial ends in a status; running out of memory is one of them, not an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from harness.cell import Cell
from harness.devices import open_device
from harness.ends import crash_end, memory_end, oom_end, refused_end
from harness.faults import strike
from harness.fill import Filler
from harness.ledger import Ledger, tolerance_bytes
from harness.lengths import filled_tokens, targets
from harness.offload import device_weights
from harness.phases import SIZED_PHASES
from harness.planner_engines import ENGINES
from harness.ranks_control import Alone, EndedByPeer, Team
from harness.ranks_group import Collectives, connect
from harness.rows import Row, identity
from harness.settings import Settings
from harness.workload import account
from harness.workspace import Workspace, allocate_workspace
from strategies.device import Device
from strategies.errors import EngineCrash, OutOfMemory, Refused
from strategies.registry import build
from strategies.strategy import Strategy

Emit = Callable[[dict[str, Any]], None]
ENDED_BY_PEER = "ended by another rank"  # for the moment: the trial's own end replaces it
TIMED_STRATEGIES = ("static", "paged", "eager_pages")


class Trial:
    """Runs cells that differ only in their fill, in one process; a row for each.

    Parameters
    ----------
    cells : list of Cell
        In rising order of fill.
    emit : callable
        Takes each record (``timeline``, ``sample``, ``row``) as a dictionary.
    team : Team, optional
        The ranks that this one runs with.
    """

    def __init__(
        self,
        cells: list[Cell],
        emit: Emit,
        identity_extra: dict[str, Any],
        team: Team | None = None,
    ) -> None:
        self.team: Team = team or Alone()
        self.group: Collectives | None = None
        self.cells, self.emit, self.extra = cells, emit, identity_extra
        self.settings: Settings = cells[0].settings
        self.ledger = Ledger(self._timeline)
        self.device: Device | None = None
        self.strategy: Strategy | None = None
        self.workspace: Workspace | None = None
        self.began = time.perf_counter()
        self.startup_seconds: float | None = None
        self.admitted: bool | None = None
        self.cell = cells[0]
        self.phase = "context"
        self.filler: Filler | None = None

    def run(self) -> None:
        """Emit a row for every cell, whatever happens short of the process's death."""
        pending = list(self.cells)
        try:
            self._start()
            self.filler = self._filler()
            while pending:
                self.cell = pending[0]
                ended = self._fill_and_time(self.filler)
                if ended["status"] == "ok":
                    self.team.join("cell")
                self._finish(ended)
                pending.pop(0)
            self._part()
        except OutOfMemory as refused:
            self.ledger.note(refused.phase, f"refused {refused.refused_bytes} bytes")
            self._end_all(pending, oom_end(refused))
        except Refused as refused:
            self._end_all(pending, refused_end(refused, self.settings.strategy))
        except EngineCrash as crash:
            self._end_all(pending, crash_end(crash))
        except EndedByPeer:
            self._end_all(pending, {"status": ENDED_BY_PEER})
        except Exception as error:
            found = memory_end(error, self.phase, self.device)
            if found is None and self.group is not None and self.team.broken():
                found = {"status": ENDED_BY_PEER}
            if found is None:
                raise
            self._end_all(pending, found)

    def _start(self) -> None:
        self._phase("context")
        # A bracket's trial loads the same kernels as a timed one, so that both start alike.
        ours = self.settings.strategy not in ENGINES and not self.settings.accounts_only
        self.device = open_device(self.settings, self.ledger, loads_kernels=ours)
        self._phase("nccl")
        timed = any(c.timing for c in self.cells)
        self.group = connect(self.settings, self.team, self.device, self.ledger, timed)
        self._phase("weights")
        self.weights = self.device.allocate("weights", *device_weights(self.settings))
        self._phase("tables")
        self.strategy = self._build()
        self.ledger.strategy = self.strategy
        self._phase("pool")
        self.strategy.start()
        self._phase("workspace")
        self.workspace = allocate_workspace(self.settings, self.device)
        self.ledger.note("workspace", "ready")
        self.startup_seconds = time.perf_counter() - self.began
        self.admitted = self.strategy.can_admit(self.cell.local_context_tokens)
        self.team.join("ready")

    def _part(self) -> None:
        """Leave the process group together, rank 0, whose store it is, last."""
        if self.group is not None:
            self.team.join("end")
            self.group.close()
            self.team.join("closed")

    def _phase(self, name: str) -> None:
        self.phase = name
        self.team.stage(name)
        strike(self.settings.fault, name, self.device, self.team.place.rank)

    def _build(self) -> Strategy:
        from harness.options import strategy_options

        assert self.device is not None
        return build(
            self.settings.strategy,
            self.device,
            self.settings.kv_model(),
            self.cell.local_context_tokens,
            self.settings.sequences,
            **strategy_options(self.settings),
        )

    @property
    def _writes(self) -> bool:
        """Whether tokens are written through the append kernel."""
        return (
            self.cells[0].purpose == "point"
            and self.settings.strategy in TIMED_STRATEGIES
            and not self.settings.accounts_only
        )

    def _filler(self) -> Filler:
        assert self.strategy is not None and self.workspace is not None
        contents = None
        if self._writes and any(map(filled_tokens, self.cells)):
            from harness.synthetic import make_content

            contents = [
                make_content(g, self._content_seed, self.workspace, self.settings.on_host)
                for g in self.settings.kv_model().groups
            ]
        self.contents = contents
        if self.cells[0].purpose != "bracket" and not self.settings.accounts_only:
            for sequence in range(len(targets(self.cell))):
                self.strategy.open(sequence, self.cell.local_context_tokens)
        groups = self.settings.kv_model().groups
        return Filler(
            self.strategy,
            self.settings.grain_tokens,
            self.ledger,
            contents,
            self.team.check,
            windows=[g.window_tokens for g in groups if g.window_tokens],
        )

    @property
    def _content_seed(self) -> int:
        """Ranks hold different tokens and different KV heads, but for copies of a head."""
        place, total = self.team.place, self.settings.model.kv_heads_total
        share = place.kv_heads(total).start + total * place.context_index
        return (self.settings.seed + 7919 * share) % (1 << 32)

    def _fill_and_time(self, filler: Filler) -> dict[str, Any]:
        """Fill to the cell's target, time it, and say how it ended."""
        if self.cell.purpose == "bracket":
            return {"status": "ok"}  # nothing was filled, so nothing limited it
        ended: dict[str, Any] = {"status": "ok", "resident_limited_by": "target"}
        self._phase("fill")
        assert self.strategy is not None and self.workspace is not None and self.device is not None
        if self.settings.accounts_only:
            return account(self.cell, self.strategy, self.device, self.ledger, self._sample)
        for sequence, tokens in enumerate(targets(self.cell)):
            filler.fill(sequence, tokens)
        if self.cell.timing and self._writes and self.cell.every_rank_sees:
            from harness.measure import measure

            assert self.contents is not None
            self._phase("decode")
            ended |= measure(
                self.cell,
                self.strategy,
                self.contents,
                self.workspace,
                self.ledger,
                self._sample,
                self.team,
                self.group,
                self.weights,
                last=len(self.cells) == 1,
            )
        return ended

    def _end_all(self, pending: list[Cell], ended: dict[str, Any]) -> None:
        for cell in pending:
            self.cell = cell
            self._finish(ended)

    def _finish(self, ended: dict[str, Any]) -> None:
        row: Row = identity(self.cell, self.extra)
        row |= {
            "startup_seconds": self.startup_seconds,
            "admitted": None if self.admitted is None else str(self.admitted).lower(),
            "resident_tokens": self.ledger.resident_tokens,
            "resident_tokens_all_ranks": self._tokens_of_all_ranks(ended),
            "wall_seconds": round(time.perf_counter() - self.began, 3),
        }
        row |= self._memory_columns()
        row |= self._growth_columns()
        row |= ended
        self.emit({"type": "row", "row": row})

    def _tokens_of_all_ranks(self, ended: dict[str, Any]) -> int:
        """Tokens of the sequences, of which this rank holds its share."""
        if ended.get("resident_limited_by") == "target":
            return filled_tokens(self.cell)
        return self.ledger.resident_tokens * self.settings.parallel.context_ranks

    def _memory_columns(self) -> Row:
        ledger = self.ledger
        row: Row = {f"{p}_bytes": ledger.phase_peak_bytes.get(p, 0) for p in SIZED_PHASES}
        row |= {
            "peak_ledger_bytes": ledger.peak_ledger_bytes,
            "peak_device_bytes": ledger.peak_device_bytes,
            "peak_torch_bytes": ledger.peak_torch_bytes or None,
            "unexplained_bytes": ledger.unexplained_bytes,
            "unexplained_phase": ledger.unexplained_phase or None,
        }
        if self.device is not None:
            chunk = max(g.chunk_bytes for g in self.settings.kv_model().groups)
            row["tolerance_bytes"] = tolerance_bytes(self.device.kind, chunk)
            row["gpu_uuid"] = self.device.uuid or None
        if self.strategy is not None:
            held = self.strategy.footprint()
            row |= {
                "kv_reserved_bytes": held.reserved_bytes,
                "kv_committed_bytes": held.committed_bytes,
                "kv_live_bytes": held.live_bytes,
            }
        return row

    def _growth_columns(self) -> Row:
        filler: Filler | None = getattr(self, "filler", None)
        if filler is None:
            return {}
        return filler.growth.columns()

    def _timeline(self, row: dict[str, Any]) -> None:
        self.emit({"type": "timeline", "row": row | {"trial_id": self.cell.trial_id}})

    def _sample(self, what: str, values: dict[str, Any]) -> None:
        self.emit({"type": "sample", "trial_id": self.cell.trial_id, "what": what, **values})
