"""One set of functions for both machines: Triton on a GPU, torch in float32 on the host.

The device of ``view.arena`` decides. Arguments and results are those of :mod:`kernels.append`,
:mod:`kernels.decode` and :mod:`kernels.prefill`; every plan has a ``variant``, the name of the
kernel that will really run.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from kernels.view import View

Pair = tuple["torch.Tensor", "torch.Tensor"]


def _on_host(view: View) -> bool:
    return bool(view.arena.device.type == "cpu")


def _host() -> ModuleType:
    from kernels import host

    return host


def append(
    view: View,
    layer: int,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    """Quantise and store single tokens ``[T, kv_heads, D]`` at their rows and positions."""
    if _on_host(view):
        _host().append(view, layer, k, v, rows, positions)
        return
    from kernels.append import append as triton_append

    triton_append(view, layer, k, v, rows, positions)


def append_run(
    view: View, layer: int, k: torch.Tensor, v: torch.Tensor, row: int, start: int
) -> None:
    """Quantise and store consecutive tokens ``[T, kv_heads, D]`` of one sequence."""
    if _on_host(view):
        _host().append_run(view, layer, k, v, row, start)
        return
    from kernels.append import append_run as triton_append_run

    triton_append_run(view, layer, k, v, row, start)


def append_codes_run(
    view: View, layer: int, k_codes: torch.Tensor, v_codes: torch.Tensor, row: int, start: int
) -> None:
    """Store consecutive tokens that are quantised already; on the host only."""
    if not _on_host(view):
        raise ValueError(
            f"append_codes_run: device={view.arena.device}: ready codes are stored on cpu only"
        )
    _host().append_codes_run(view, layer, k_codes, v_codes, row, start)


def plan_decode(
    view: View,
    sm_count: int | None = None,
    scratch: torch.Tensor | None = None,
    unsettled_tokens: int | None = None,
) -> Any:  # noqa: ANN401
    """Plan one decode step of a batch; the plan serves every layer of the view's group."""
    if _on_host(view):
        return _host().plan_decode(view, sm_count, scratch)
    from kernels.decode_plan import plan_decode as plan

    return plan(view, sm_count, scratch, unsettled_tokens=unsettled_tokens)


def decode(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: Any,  # noqa: ANN401
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> Pair:
    """Attention of one query token a sequence: out float32 ``[S, Hq, D]``, lse ``[S, Hq]``."""
    if _on_host(view):
        found: Pair = _host().decode(view, layer, q, plan, out, lse, q_scale, sm_scale)
        return found
    from kernels.decode import decode as triton_decode

    return triton_decode(view, layer, q, plan, out, lse, q_scale, sm_scale)


def plan_prefill(
    view: View,
    row: int,
    start: int,
    tokens: int,
    sm_count: int | None = None,
    scratch: torch.Tensor | None = None,
) -> Any:  # noqa: ANN401
    """Plan the chunk of queries at positions [start, start + tokens) of one sequence."""
    if _on_host(view):
        return _host().plan_prefill(view, row, start, tokens, sm_count, scratch)
    from kernels.prefill import plan_prefill as plan

    return plan(view, row, start, tokens, sm_count, scratch)


def prefill(
    view: View,
    layer: int,
    q: torch.Tensor,
    plan: Any,  # noqa: ANN401
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    q_scale: float = 1.0,
    sm_scale: float | None = None,
) -> Pair:
    """Causal attention of the planned chunk: out bf16 ``[T, Hq, D]``, lse float32 ``[T, Hq]``."""
    if _on_host(view):
        found: Pair = _host().prefill(view, layer, q, plan, out, lse, q_scale, sm_scale)
        return found
    from kernels.prefill import prefill as triton_prefill

    pair: Pair = triton_prefill(view, layer, q, plan, out, lse, q_scale, sm_scale)
    return pair


def merge(
    outs: torch.Tensor,
    lses: torch.Tensor,
    out: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
) -> Pair:
    """Merge normalised partials ``[N, ..., D]`` by their base-2 log-sum-exp ``[N, ...]``."""
    if outs.device.type == "cpu":
        merged: Pair = _host().merge(outs, lses, out, lse)
        return merged
    from kernels.merge import merge as triton_merge

    return triton_merge(outs, lses, out, lse)
