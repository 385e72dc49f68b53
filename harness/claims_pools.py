"""Rules about the report's two ideas: the static pool and the pool paged on demand."""

from __future__ import annotations

from collections.abc import Iterable

from harness.engine_rows import flags_of
from harness.evidence import (
    CONDITIONAL,
    MILLIONS_10,
    REFUTED,
    SUPPORTED,
    Evidence,
    Verdict,
    admits,
    gib_of,
    option,
    scale,
    starts,
    token_kib,
    undecided,
    whole_context,
)
from harness.rows import Row
from harness.summary import ARM_KEYS

REPORTED_GB_FOR_10M = 182.0
GB = 1e9
REPORTED_GB = 1000 * 2**20  # the report reads 0.0234 MiB as MB, and a thousand of them as a GB
REPORTED_FRACTION = 0.78  # of the context, with which the report counts
SAME_FIGURE = 0.02
PROPORTIONAL = 1.2  # bytes grow no more than so much above the tokens: whole chunks
LITTLE = 0.05  # of what a static pool holds
RUN_CLAIMS = "experiment=claims"


def _by_token_cost(rows: list[Row]) -> dict[float, list[Row]]:
    out: dict[float, list[Row]] = {}
    for row in rows:
        out.setdefault(token_kib(row), []).append(row)
    return dict(sorted(out.items()))


def _costs(costs: list[float]) -> str:
    return " and ".join(f"{c:g} KiB a token" for c in costs)


def static_cannot_start(evidence: Evidence) -> Verdict:
    """C1: static at 10M, split by the K/V cost of a token."""
    rows = evidence.of("static", whole_context, context_tokens=MILLIONS_10)
    by_cost = _by_token_cost(rows)
    bad = [c for c, own in by_cost.items() if not any(map(starts, own))]
    good = [c for c, own in by_cost.items() if all(map(starts, own))]
    if not rows:
        return undecided(f"{RUN_CLAIMS} (10M static at 24 and at 12 KiB a token)")
    asked = max(gib_of(r, "oom_requested_bytes") for r in rows)
    measured = "starts" if len(good) == len(by_cost) else f"asks {asked:.2f} GiB"
    if len(by_cost) > 1 and len(bad) == len(by_cost):
        return Verdict(SUPPORTED, f"at {_costs(bad)}", tuple(rows), measured)
    if len(by_cost) > 1 and len(good) == len(by_cost):
        return Verdict(REFUTED, f"it starts at {_costs(good)}", tuple(rows), measured)
    mixed = [c for c in by_cost if c not in good + bad]
    said = [f"at {_costs(bad)} it asks {asked:.1f} GiB and cannot"] if bad else []
    said += [f"at {_costs(good)} it starts"] if good else []
    said += [f"at {_costs(mixed)} some trials start and some do not"] if mixed else []
    said += [f"at other costs of a token: run {RUN_CLAIMS}"] if len(by_cost) == 1 else []
    return Verdict(CONDITIONAL, "; ".join(said), tuple(rows), measured)


def paged_starts(evidence: Evidence) -> Verdict:
    """C2: paged at 10M reaches ready."""
    rows = evidence.of("paged", context_tokens=MILLIONS_10)
    if not rows:
        return undecided("strategy=paged context=10M")
    good = [r for r in rows if starts(r)]
    if len(good) == len(rows):
        whole = [r for r in rows if admits(r)]
        cannot = sorted({token_kib(r) for r in rows} - {token_kib(r) for r in whole})
        note = f"; a full 10M request is not admitted at {_costs(cannot)}" if cannot else ""
        return Verdict(SUPPORTED, f"for start-up{note}", tuple(rows), "starts")
    return Verdict(REFUTED if not good else CONDITIONAL, "not in every trial", tuple(rows))


def _empty(evidence: Evidence, strategy: str) -> list[Row]:
    """Trials that started and were not to fill; a bracket's row may be old, and say ``fill`` 1."""

    def empty(row: Row) -> bool:
        return starts(row) and row.get("resident_tokens") == 0 and row["purpose"] != "bracket"

    return evidence.of(strategy, empty, fill=0.0) + evidence.of(strategy, starts, purpose="bracket")


def held_at_startup(evidence: Evidence) -> Verdict:
    """C3: bytes at ready, nothing filled."""
    paged = [r for r in _empty(evidence, "paged") if r["context_tokens"] == MILLIONS_10]
    static = [r for r in _empty(evidence, "static") if whole_context(r)]
    if not paged or not static:
        return undecided(f"{RUN_CLAIMS} (both strategies with fill=0)")
    lazy = all(r["kv_committed_bytes"] == 0 for r in paged)
    eager = all(
        r["kv_committed_bytes"] >= r["context_tokens"] * r["kv_bytes_per_token"] for r in static
    )
    most = max(paged, key=lambda r: gib_of(r, "peak_device_bytes") - gib_of(r, "weights_bytes"))
    held, weights = gib_of(most, "peak_device_bytes"), gib_of(most, "weights_bytes")
    pool = min(gib_of(r, "kv_committed_bytes") for r in static)
    if lazy and eager and held - weights < LITTLE * pool:
        verdict = SUPPORTED
        text = (
            f"paged holds {held:.2f} GiB at ready: {weights:.2f} of weights, the rest CUDA "
            "context, page table and workspace; static holds its whole pool besides"
        )
    else:
        verdict = REFUTED
        text = (
            f"at ready paged holds {held - weights:.2f} GiB beside its weights, static at least "
            f"{pool:.2f} GiB of K/V"
        )
    return Verdict(verdict, text, tuple(paged + static), round(held, 2))


def growth_with_length(evidence: Evidence) -> Verdict:
    """C4: committed bytes at two fills of one context.

    10 and 100 % where both were filled, else the least and the most that a context held.
    """
    ratios: dict[str, list[float]] = {"paged": [], "static": []}
    used: list[Row] = []
    for strategy, own in ratios.items():
        rows = evidence.of(strategy, lambda r: r["status"] == "ok" and r["purpose"] == "point")
        full = {_same_bytes(r): r for r in rows if r["fill"] == 1.0}
        for row in rows:
            whole = full.get(_same_bytes(row))
            if row["fill"] == 0.1 and whole is not None and row["sequences"] == 1:
                own.append(row["kv_committed_bytes"] / whole["kv_committed_bytes"])
                used += [row, whole]
    if not ratios["paged"] or not ratios["static"]:
        return _growth_of_any(evidence)
    paged, static = max(ratios["paged"]), min(ratios["static"])
    holds = paged < PROPORTIONAL * 0.1 and static == 1.0
    return Verdict(
        SUPPORTED if holds else REFUTED,
        f"at 10 % of the length paged commits {paged:.1%} of what it commits at 100 %, "
        f"static {static:.0%}",
        tuple(used),
        round(paged, 4),
    )


def _growth_of_any(evidence: Evidence) -> Verdict:
    """C4 from contexts that were filled to other lengths, or until they were refused."""
    paged = _least_and_most(r for r in evidence.of("paged", starts) if r["resident_tokens"])
    static = _least_and_most(evidence.of("static", starts))
    if paged is None or static is None:
        return undecided(f"{RUN_CLAIMS} (one context filled to 10 and to 100 %, both strategies)")
    (few, many), (empty, whole) = paged, static
    length = few["resident_tokens"] / many["resident_tokens"]
    grown = few["kv_committed_bytes"] / many["kv_committed_bytes"]
    flat = empty["kv_committed_bytes"] / whole["kv_committed_bytes"]
    return Verdict(
        SUPPORTED if grown < PROPORTIONAL * length and flat == 1.0 else REFUTED,
        f"with {few['resident_tokens']:,} of {many['resident_tokens']:,} tokens ({length:.1%}) "
        f"paged commits {grown:.1%} of what it then commits; static with "
        f"{empty['resident_tokens']:,} of {whole['resident_tokens']:,} {flat:.0%}",
        (*paged, *static),
    )


def _least_and_most(rows: Iterable[Row]) -> tuple[Row, Row] | None:
    """Of one context, the rows with the fewest and with the most tokens, twice as many or more."""
    of: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        if row["sequences"] == 1 and row["resident_tokens"] is not None:
            same = row["context_tokens"], *(row.get(key) for key in ARM_KEYS)
            of.setdefault(same, []).append(row)
    ends = [[pick(own, key=_tokens) for pick in (min, max)] for own in of.values()]
    far = [(few, many) for few, many in ends if _tokens(many) >= 2 * max(1, _tokens(few))]
    return max(far, key=lambda pair: _tokens(pair[1]), default=None)


def _tokens(row: Row) -> int:
    return int(row["resident_tokens"])


def _same_bytes(row: Row) -> tuple[object, ...]:
    """What two rows must share for their bytes to be comparable."""
    return row["model"], row["context_tokens"], scale(row)


def bytes_of_ten_million(evidence: Evidence) -> Verdict:
    """C5: the K/V of 10M tokens at the report's own cost of a token."""
    rows = [
        r
        for r in evidence.of("static", whole_context, context_tokens=MILLIONS_10, model="report")
        if r.get("oom_requested_bytes")
    ]
    if not rows:
        return undecided("strategy=static model=report context=10M")
    row = rows[0]
    tokens = row["context_tokens"] * row["kv_bytes_per_token"]
    asked = min(row["oom_requested_bytes"], tokens) * scale(row)  # not what rounds it up to chunks
    part = REPORTED_FRACTION * asked
    text = f"10M tokens at {token_kib(row):g} KiB are {asked / GB:.1f} GB ({asked / 2**30:.1f} GiB)"
    if _near_reported(asked):
        verdict = SUPPORTED
    elif _near_reported(part):
        verdict = CONDITIONAL
        text += (
            f"; the report counts 7.8M tokens (0.78 x 10M) and 1,000 MiB as a GB: "
            f"{part / REPORTED_GB:.1f} of those, {part / GB:.1f} GB ({part / 2**30:.1f} GiB)"
        )
    else:
        verdict = REFUTED
    return Verdict(verdict, text, tuple(rows), round(asked / GB, 1), "arithmetic")


def _near_reported(nbytes: float) -> bool:
    """Whether bytes are the report's figure within 2 %, in GB or as the report counts them."""
    figures = (nbytes / GB, nbytes / REPORTED_GB)
    return any(abs(figure / REPORTED_GB_FOR_10M - 1) <= SAME_FIGURE for figure in figures)


def lower_fraction(evidence: Evidence) -> Verdict:
    """C7: static at 10M with fractions of the context and of the device."""
    rows = evidence.of("static", context_tokens=MILLIONS_10, model="report")
    of = {
        what: [r for r in rows if option(r, "mem_fraction_of") == what]
        for what in ("context", "device")
    }
    tried = {what: {r["mem_fraction"] for r in own} for what, own in of.items()}
    if not all({0.65, 0.8} <= t for t in tried.values()) or min(tried["context"]) >= 0.65:
        return undecided("experiment=mem_fraction")
    good = {what: sorted({r["mem_fraction"] for r in own if starts(r)}) for what, own in of.items()}
    text = (
        f"as a fraction of the context {_fractions(of['context'])}; as a fraction of the device "
        f"(as SGLang means it) {_fractions(of['device'])}"
    )
    engine = _engine_fractions(evidence)
    if engine:
        text += f"; SGLang itself, which has its tables besides: {_fractions(engine)}"
    if 0.65 in good["context"]:
        verdict = REFUTED
    else:
        verdict = CONDITIONAL if good["context"] or good["device"] else SUPPORTED
    return Verdict(verdict, text, tuple(rows + engine), max(good["context"], default=0.0))


def _engine_fractions(evidence: Evidence) -> list[Row]:
    """Starts of SGLang itself at 10M with nothing but a fraction, which their row then names."""
    found = evidence.of("sglang", lambda r: bool(r.get("engine_version")))
    return [
        r | {"mem_fraction": option(r, "mem_fraction_static")}
        for r in found
        if r["context_tokens"] == MILLIONS_10 and set(flags_of(r)) == {"mem_fraction_static"}
    ]


def _fractions(rows: list[Row]) -> str:
    """Which fractions start, which do not, and whether those that start admit the context."""
    good = [r for r in rows if starts(r)]
    bad = sorted({r["mem_fraction"] for r in rows if not starts(r)})
    said = []
    if bad:
        said.append(f"{', '.join(f'{f:g}' for f in bad)} do not start")
    if good:
        whole = all(map(admits, good))
        fractions = ", ".join(f"{f:g}" for f in sorted({r["mem_fraction"] for r in good}))
        room = "" if whole else ", with too small a pool to admit a request of 10M"
        said.append(f"{fractions} start{room}")
    return " and ".join(said)
