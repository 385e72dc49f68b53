"""The workspace of a rank: what a prefill chunk and a decode step need beside weights and K/V.

Formulas first, so that the planner and the scale model know the same bytes that a GPU allocates.
The model's own activations are left out: throughput here is attention only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from harness.planner_engines import ENGINES
from harness.planner_spec import HOST_GRANULARITY_BYTES
from harness.ranks_group import collective_workspace
from harness.settings import Settings
from harness.torch_segments import taken_bytes
from kernels.view import PAGE_TOKENS, Geometry
from strategies.device import Allocation, Device

if TYPE_CHECKING:
    import torch

BANK_TOKENS = 16384  # tokens of synthetic K/V that a fill is made of
BANK_SPARE_COLUMNS = 64  # by which a token's values are shifted, block by block
MODELLED_PREFILL_CHUNK_TOKENS = 2048  # of the device that the scale model models
GATE_QUERY_ROWS = 32
FLOAT64 = 8


def workspace_items(settings: Settings) -> list[tuple[str, int]]:
    """Name and bytes of every buffer of a rank's workspace, on the (modelled) device.

    An engine brings its own buffers (its strategy allocates them), and none of ours.
    """
    if settings.strategy in ENGINES:
        return []
    from kernels.config import decode_scratch_bytes

    groups = _geometries(settings)
    g, sequences, sms = groups[0], settings.sequences, settings.hardware.sm_count
    rows = _prefill_tokens(settings) * g.q_heads
    return [
        ("synthetic_kv", 2 * BANK_TOKENS * (g.kv_heads * g.head_dim + BANK_SPARE_COLUMNS) * 2),
        ("prefill_queries", rows * g.head_dim * g.itemsize),
        ("prefill_outputs", rows * (g.head_dim * 2 + 4)),
        ("decode_outputs", sequences * g.q_heads * (g.head_dim * (4 + g.itemsize) + 4)),
        ("decode_partials", max(decode_scratch_bytes(x, sequences, sms) for x in groups)),
        ("prefill_partials", sum(prefill_scratch_sizes(settings))),
        ("gate", gate_bytes(g)),
        *collective_workspace(settings),
    ]


def prefill_scratch_sizes(settings: Settings) -> list[int]:
    """Bytes of each layer group's share of ``prefill_partials``, in the order in which they lie."""
    from kernels.prefill_scratch import prefill_scratch_bytes

    tokens, sms = _prefill_tokens(settings), settings.hardware.sm_count
    return [prefill_scratch_bytes(g, tokens, sms) for g in _geometries(settings)]


def _prefill_tokens(settings: Settings) -> int:
    """Tokens of a prefill chunk on the (modelled) device."""
    if settings.on_host:
        return MODELLED_PREFILL_CHUNK_TOKENS
    return settings.trial.prefill_chunk_tokens


def _geometries(settings: Settings) -> list[Geometry]:
    """Each layer group's geometry; pages of a size that no kernel reads count as whole tiles."""
    groups = [g.geometry for g in settings.full_model().groups]
    if settings.accounts_only:
        return [replace(g, page_tokens=PAGE_TOKENS) for g in groups]
    return groups


def gate_bytes(geometry: Geometry) -> int:
    """Float64 K and V of one bank of one head, and the scores of the gate's query rows, thrice."""
    rows = GATE_QUERY_ROWS * geometry.group
    columns = 2 * (2 * geometry.head_dim + BANK_SPARE_COLUMNS)
    return BANK_TOKENS * FLOAT64 * (columns + 3 * rows)


def workspace_reserve_bytes(settings: Settings) -> int:
    """What a pool must leave for the workspace: every buffer as this device rounds it."""
    unit = HOST_GRANULARITY_BYTES if settings.on_host else 0
    return sum(taken_bytes((-(-n // settings.scale) for _, n in workspace_items(settings)), unit))


@dataclass
class Workspace:
    """The allocated buffers, by name."""

    buffers: dict[str, Allocation]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The front of a buffer as a tensor of this shape and dtype."""
        import math

        nbytes = math.prod(shape) * dtype.itemsize
        return self.buffers[name].u8[:nbytes].view(dtype).view(shape)


def allocate_workspace(settings: Settings, device: Device) -> Workspace:
    """Allocate every buffer; on the scale model, the modelled bytes divided by the scale."""
    return Workspace(
        {
            name: device.allocate("workspace", name, -(-nbytes // device.scale))
            for name, nbytes in workspace_items(settings)
        }
    )
