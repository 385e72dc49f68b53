"""The correctness gate: sampled heads at the very length that is timed, against float64.

The reference is computed from the synthetic content, quantised by torch, not from the arena.
Random queries test the arithmetic and that every token is read once: where a share f of what is
read is wrong, the relative error is about the root of 2 f, 0.05 for one token in 800. Needle
queries test that planted tokens are found where they belong. Decode and prefill, random and needle
queries are judged apart, by the worst of them.

What rounding K and V to the K/V dtype costs is no fault of a kernel, and no part of that error. It
is told beside decode's: the error of the same answers against the bf16 values that were rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from harness.buffers import StepBuffers, query_dtype
from harness.fill import plant_needles
from harness.settings import Settings
from harness.synthetic import NEEDLE_AMPLITUDE, Content, Needle, Piece
from harness.workspace import BANK_SPARE_COLUMNS, BANK_TOKENS, Workspace
from strategies.strategy import Strategy

if TYPE_CHECKING:
    import torch

    from kernels.view import View

# FP8 P alone costs 2.7e-2 relative RMS; the gate leaves room for Q and a sharp distribution.
MAX_RELATIVE_RMS = 5e-2
MAX_LSE_ERROR = 5e-3
NEEDLES = 6


@dataclass(frozen=True)
class GateResult:
    """Errors of the kernels at the timed length, and the kernels that ran.

    ``relative_rms`` is the worst of decode, prefill and needles; ``decode_rms`` that of decode with
    random queries, ``unrounded_rms`` the same against K/V as they were before they were rounded.
    """

    relative_rms: float
    lse_error: float
    decode_variant: str
    prefill_variant: str
    decode_rms: float = math.nan
    unrounded_rms: float = math.nan

    @property
    def passed(self) -> bool:
        """Whether a figure of speed may be reported; NaN never passes."""
        return self.relative_rms < MAX_RELATIVE_RMS and self.lse_error < MAX_LSE_ERROR


class Asked(NamedTuple):
    """Rows of one step, float64: queries ``[R, D]`` that see tokens up to ``position``, answers."""

    what: str
    position: int
    queries: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor


class Gate:
    """Checks decode and prefill of one trial's strategy."""

    def __init__(
        self,
        settings: Settings,
        strategy: Strategy,
        contents: list[Content],
        workspace: Workspace,
    ) -> None:
        self.settings, self.strategy, self.contents = settings, strategy, contents
        self.workspace = workspace
        self.steps = StepBuffers(settings, workspace)
        self._squares: dict[str, list[float]] = {}
        self._unrounded = [0.0, 0.0]
        self._lse = 0.0

    def check(self, sequence: int, tokens: int) -> GateResult:
        """Compare first and last layer of every group at ``tokens`` resident tokens."""
        variants = ("", "")
        for index, content in enumerate(self.contents):
            layers = content.group.geometry.layers
            for layer in sorted({0, layers - 1}):
                self._plant(index, content, sequence, layer, tokens)
                variants = self._layer(index, content, sequence, layer, tokens)
        errors = [_relative(sums) for sums in self._squares.values()]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors, default=math.nan)
        decode = _relative(self._squares["decode"])
        return GateResult(worst, self._lse, *variants, decode, _relative(self._unrounded))

    def _plant(self, index: int, content: Content, sequence: int, layer: int, tokens: int) -> None:
        first = content.group.window_start(tokens)
        span = tokens - first
        spots = {first + span * i // NEEDLES for i in range(NEEDLES)} | {tokens - 1}
        have = content.needles.get((sequence, layer), {})
        fresh = sorted(p for p in spots if p not in have)
        if fresh:
            plant_needles(self.strategy, content, index, sequence, layer, fresh)

    def _layer(
        self, index: int, content: Content, sequence: int, layer: int, tokens: int
    ) -> tuple[str, str]:
        from kernels import ops

        view = self.strategy.batch([sequence])[index]
        g = view.geometry
        head = layer % g.kv_heads
        mine = slice(head * g.group, (head + 1) * g.group)
        asked: list[Asked] = []
        sms = self.settings.hardware.sm_count
        plan = ops.plan_decode(view, sms, self.steps.decode_scratch(), unsettled_tokens=1)
        needles = content.needles[(sequence, layer)]
        for what, queries in (
            ("decode", self._random_queries(view, 1, needles)),
            ("needles", self._needle_queries(view, needles)),
        ):
            q, out, lse = self.steps.decode(view, queries)
            ops.decode(view, layer, q, plan, out.fill_(math.nan), lse.fill_(math.nan))
            got = (x[0, mine].double() for x in (q, out, lse))
            asked.append(Asked(what, tokens - 1, *got))
        chunk = min(self.settings.trial.prefill_chunk_tokens, tokens - view.starts[0])
        q, out, lse = self.steps.prefill(view, self._random_queries(view, chunk, needles))
        scratch = self.steps.prefill_scratch(index)
        prefill = ops.plan_prefill(view, 0, tokens - chunk, chunk, sms, scratch)
        ops.prefill(view, layer, q, prefill, out.fill_(math.nan), lse.fill_(math.nan))
        for t in sorted({0, chunk // 2, chunk - 1}):
            got = (x[t, mine].double() for x in (q, out, lse))
            asked.append(Asked("prefill", tokens - chunk + t, *got))
        buffers = self._buffers(g.head_dim, g.group * len(asked))
        self._compare(_Reference(content, sequence, layer, head, buffers), asked)
        if g.kv_dtype == "fp8_e4m3":
            exact = _Reference(content, sequence, layer, head, buffers, rounded=False)
            right, _ = exact.attention(asked[0].queries, [asked[0].position] * g.group)
            _add(self._unrounded, asked[0].out, right)
        else:  # nothing was rounded
            self._unrounded = self._squares["decode"]
        return plan.variant, prefill.variant

    def exact(
        self,
        content: Content,
        sequence: int,
        layer: int,
        head: int,
        q: torch.Tensor,
        tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Float64 output and base-2 LSE of queries ``[R, D]`` of one KV head over ``tokens``."""
        buffers = self._buffers(content.group.geometry.head_dim, len(q))
        reference = _Reference(content, sequence, layer, head, buffers)
        return reference.attention(q.double(), [tokens - 1] * len(q))

    def _buffers(self, head_dim: int, rows: int) -> dict[str, torch.Tensor]:
        import torch

        bank, block = (BANK_TOKENS, head_dim + BANK_SPARE_COLUMNS), (BANK_TOKENS, head_dim)
        shapes = {"k": bank, "v": bank, "k2": block, "v2": block, "s": (rows, BANK_TOKENS)}
        if self.settings.on_host:
            return {n: torch.empty(s, dtype=torch.float64) for n, s in shapes.items()}
        flat = self.workspace.buffers["gate"].u8.view(torch.float64)
        out, at = {}, 0
        for name, shape in shapes.items():
            out[name] = flat[at : at + math.prod(shape)].view(shape)
            at += math.prod(shape)
        return out

    def _random_queries(self, view: View, tokens: int, planted: dict[int, Needle]) -> torch.Tensor:
        """Queries that the needles' loud keys leave alone: they would outshout all other tokens."""
        import torch

        queries = self.steps.random_queries(view, tokens, self.settings.seed + tokens)
        loud = torch.stack(_seen(view, planted)[-view.geometry.head_dim // 2 :]).cpu()
        basis = torch.linalg.qr(loud.T).Q
        plain = queries.float()
        return (plain - plain @ basis @ basis.T).to(queries.dtype)

    def _needle_queries(self, view: View, planted: dict[int, Needle]) -> torch.Tensor:
        import torch

        g = view.geometry
        signs = _seen(view, planted)
        rows = [signs[-1 - h % len(signs)] * NEEDLE_AMPLITUDE for h in range(g.q_heads)]
        return torch.stack(rows)[None].to(query_dtype(g.kv_dtype))

    def _compare(
        self,
        reference: _Reference,
        asked: list[Asked],
    ) -> None:
        """Compare several steps' answers in one pass of float64."""
        import torch

        queries = torch.cat([a.queries for a in asked])
        positions = [a.position for a in asked for _ in a.queries]
        want, want_lse = reference.attention(queries, positions)
        rows = [len(a.queries) for a in asked]
        for a, right, right_lse in zip(asked, want.split(rows), want_lse.split(rows), strict=True):
            _add(self._squares.setdefault(a.what, [0.0, 0.0]), a.out, right)
            worst = (a.lse - right_lse).abs().max().item()
            self._lse = max(self._lse, worst) if worst == worst else math.nan


def _add(sums: list[float], found: torch.Tensor, right: torch.Tensor) -> None:
    """Add the squares of what is off, and of what is right."""
    sums[0] += (found - right).square().sum().item()
    sums[1] += right.square().sum().item()


def _relative(sums: list[float]) -> float:
    off, right = sums
    return math.sqrt(off / right) if right else math.nan


def _seen(view: View, planted: dict[int, Needle]) -> list[torch.Tensor]:
    """Sign patterns ``[D]`` of the needles that are not behind the window, by position."""
    return [n.signs for p, n in sorted(planted.items()) if p >= view.starts[0]]


class _Reference:
    """Float64 attention over the synthetic content of one layer and KV head, block by block.

    ``rounded``: over what the K/V dtype keeps of it; else over the bf16 values themselves.
    """

    def __init__(
        self,
        content: Content,
        sequence: int,
        layer: int,
        head: int,
        buffers: dict[str, torch.Tensor],
        rounded: bool = True,
    ) -> None:
        self.content, self.sequence, self.layer = content, sequence, layer
        self.buffers = buffers
        g = content.group.geometry
        at = head * g.head_dim
        banks = (content.k_bank, content.v_bank) if rounded else content.values
        for name, bank in zip("kv", banks, strict=True):
            columns = bank[:, at : at + g.head_dim + BANK_SPARE_COLUMNS]
            buffers[name].copy_(stored_values(columns, g.kv_dtype) if rounded else columns)

    def attention(self, q: torch.Tensor, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Output ``[R, D]`` and base-2 LSE ``[R]`` of rows that see tokens up to ``positions``."""
        import torch

        last = max(positions)
        first = self.content.group.window_start(last + 1)
        scale = q.shape[1] ** -0.5 * math.log2(math.e)
        upto = torch.tensor(positions, device=q.device)
        top = torch.full((len(positions),), -math.inf, dtype=torch.float64, device=q.device)
        total = torch.zeros_like(top)
        acc = torch.zeros_like(q)
        for piece in self.content.pieces(self.sequence, self.layer, first, last + 1):
            k, v = self._block(piece)
            start, count = piece.start, len(k)
            s = self.buffers["s"].view(-1)[: len(positions) * count].view(len(positions), -1)
            torch.mm(q, k.T, out=s)
            s.mul_(scale)
            if start + count > min(positions):
                tokens = torch.arange(start, start + count, device=q.device)
                s.masked_fill_(tokens[None] > upto[:, None], -math.inf)
            new = torch.maximum(top, s.max(1).values)
            old = torch.exp2(top - new)
            s.sub_(new[:, None]).exp2_()
            total = total * old + s.sum(1)
            acc = acc * old[:, None] + s @ v
            top = new
        return acc / total[:, None], top + torch.log2(total)

    def _block(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of a piece ``[T, D]``, with the needles that lie among them."""
        dim = self.content.group.geometry.head_dim
        k = self.buffers["k"][piece.lo : piece.hi, piece.k_shift : piece.k_shift + dim]
        v = self.buffers["v"][piece.lo : piece.hi, piece.v_shift : piece.v_shift + dim]
        planted = self.content.needles.get((self.sequence, self.layer), {})
        inside = [n for p, n in planted.items() if 0 <= p - piece.start < len(k)]
        if inside:
            k, v = self.buffers["k2"][: len(k)].copy_(k), self.buffers["v2"][: len(v)].copy_(v)
            for n in inside:
                k[n.position - piece.start] = n.signs.double() * NEEDLE_AMPLITUDE
                v[n.position - piece.start] = n.value.double()
        return k, v


def stored_values(bank: torch.Tensor, kv_dtype: str) -> torch.Tensor:
    """What the K/V dtype keeps of a bank (bf16 values, or on the host its FP8 codes)."""
    import torch

    if bank.dtype == torch.uint8:
        return bank.contiguous().view(torch.float8_e4m3fn).double()
    if kv_dtype == "fp8_e4m3":
        return bank.to(torch.float8_e4m3fn).double()
    return bank.double()


def load_arithmetic(device: str) -> None:
    """Load what the reference uses (cuBLAS in float64, reductions), before memory is measured."""
    import torch

    rows = torch.ones((64, 128), dtype=torch.float64, device=device)
    scores = torch.empty((64, 64), dtype=torch.float64, device=device)
    torch.mm(rows, rows.T, out=scores)
    top = scores.max(1).values
    hidden = torch.arange(64, device=device)[None] > torch.arange(64, device=device)[:, None]
    scores.masked_fill_(hidden, -math.inf).sub_(top[:, None]).exp2_()
    total = torch.log2(scores.sum(1) + 1.0)
    float((scores @ rows / total[:, None]).square().sum())
