"""A table as text, Markdown, HTML or LaTeX, and how numbers are printed in all of them."""

from __future__ import annotations

import html
import math
import re
import textwrap
from dataclasses import dataclass, field

from harness import sizes
from harness.latex_table import latex_table
from harness.runs import clean
from harness.sizes import MIB

EMPTY = "–"

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "×": r"$\times$",
    "…": r"\ldots{}",
    "±": r"$\pm$",
    "≤": r"$\le$",
    "≥": r"$\ge$",
    "µ": r"\textmu{}",
    "·": r"\textperiodcentered{}",
    "→": r"$\rightarrow$",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': "''",
    **{c: f"\\{c}" for c in "&%$#_{}"},
}


@dataclass(frozen=True)
class Table:
    """Cells of text under headings, with notes below.

    Parameters
    ----------
    title : str
    columns : tuple of str
        Headings; one that starts with ``>`` is of numbers and set flush right.
    rows : tuple of tuples of str
    notes : tuple of str
        Sentences that a reader needs to read the table right.
    anchors : tuple of str
        For each row the trial that it comes from (``""``: none): a link in HTML.
    row_ids : tuple of str
        For each row the trial that such links lead to (``""``: none).
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    anchors: tuple[str, ...] = field(default=())
    row_ids: tuple[str, ...] = field(default=())

    @property
    def headings(self) -> list[str]:
        """Headings without their alignment marks."""
        return [c.removeprefix(">") for c in self.columns]

    def text(self, widths: dict[str, int] | None = None) -> str:
        """For a terminal; ``widths`` wraps the cells of the named columns."""
        limits = [(widths or {}).get(h, 0) for h in self.headings]
        wrapped = [
            [textwrap.wrap(c, w) or [""] if w else [c] for c, w in zip(row, limits, strict=True)]
            for row in (self.headings, *self.rows)
        ]
        sizes = [max(len(line) for row in wrapped for line in row[i]) for i in range(len(limits))]
        lines = [self.title] if self.title else []
        for n, row in enumerate(wrapped):
            for k in range(max(len(cell) for cell in row)):
                cells = [cell[k] if k < len(cell) else "" for cell in row]
                lines.append(self._line(cells, sizes))
            if n == 0:
                lines.append("  ".join("-" * size for size in sizes))
        return "\n".join([*lines, *self.notes])

    def _line(self, cells: list[str], sizes: list[int]) -> str:
        placed = [
            cell.rjust(size) if name.startswith(">") else cell.ljust(size)
            for name, cell, size in zip(self.columns, cells, sizes, strict=True)
        ]
        return "  ".join(placed).rstrip()

    def markdown(self) -> str:
        """Return a pipe table; cells are escaped, so that no row can break it or smuggle HTML."""
        rule = ["---:" if c.startswith(">") else "---" for c in self.columns]
        body = [[markdown_text(c) for c in row] for row in (self.headings, *self.rows)]
        lines = [f"| {' | '.join(row)} |" for row in (body[0], rule, *body[1:])]
        return "\n".join([*lines, *(f"\n{markdown_text(n)}" for n in self.notes)])

    def html(self, prefix: str = "", kind: str = "", trials: frozenset[str] = frozenset()) -> str:
        """Return a ``<table>``; a row links to its trial, and every word of a cell that is one.

        Only to those of ``trials``, whose anchors (``{prefix}trial-{id}``) the page has.
        """
        heads = "".join(
            f"<th{_right(c)}><button>{html.escape(c.removeprefix('>'))}</button></th>"
            for c in self.columns
        )
        rows = []
        for n, row in enumerate(self.rows):
            anchor = self.anchors[n] if n < len(self.anchors) else ""
            cells = [
                f"<td{_right(c)}>{_linked(v, prefix, trials)}</td>"
                for c, v in zip(self.columns, row, strict=True)
            ]
            if row and anchor in trials:
                link = f'<a href="#{prefix}trial-{html.escape(anchor)}">{html.escape(row[0])}</a>'
                cells[0] = f"<td>{link}</td>"
            name = self.row_ids[n] if n < len(self.row_ids) else ""
            own = f' id="{prefix}trial-{html.escape(name)}"' if name else ""
            rows.append(f"<tr{own}>{''.join(cells)}</tr>")
        notes = "".join(f"<p class=note>{html.escape(n)}</p>" for n in self.notes)
        body = "\n".join(rows)
        return (
            f'<div class="{f"scroll {kind}".strip()}"><table class=sortable>'
            f"<thead><tr>{heads}</tr></thead>\n"
            f"<tbody>{body}</tbody></table></div>{notes}"
        )

    def latex(self, label: str) -> str:
        """Return a table in booktabs style (:mod:`harness.latex_table`)."""
        return latex_table(
            latex_text(self.title),
            [latex_text(c) for c in self.headings],
            [c.startswith(">") for c in self.columns],
            [[latex_text(c) for c in row] for row in self.rows],
            [latex_text(n) for n in self.notes],
            label,
        )


def _linked(text: str, prefix: str, trials: frozenset[str]) -> str:
    """Return a cell's text, escaped, its words that are trials as links."""

    def word(found: re.Match[str]) -> str:
        escaped = html.escape(found[0])
        known = found[0] in trials
        return f'<a href="#{prefix}trial-{escaped}">{escaped}</a>' if known else escaped

    return re.sub(r"[^\s;]+", word, text)


def _right(column: str) -> str:
    return " class=number" if column.startswith(">") else ""


def latex_text(text: object) -> str:
    """Text with LaTeX's own characters escaped; other non-ASCII letters are left to UTF-8."""
    return "".join(_LATEX.get(c, c) for c in clean(text))


def markdown_text(text: object) -> str:
    """Text that Markdown prints as it is."""
    out = html.escape(clean(text), quote=False)
    return "".join(f"\\{c}" if c in "\\|`*_[]" else c for c in out)


def known(value: object) -> bool:
    """Whether a value is a number at all (not None, NaN or text)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def gib(nbytes: float) -> str:
    """Bytes as ``80.04 GiB`` (GiB is 2**30 bytes); ``–`` for what is no number."""
    return sizes.gib(nbytes) if known(nbytes) else EMPTY


def scaled_bytes(nbytes: float, scale: float) -> str:
    """``80.04 GiB``; of the scale model its own MiB, the modelled device's GiB in brackets.

    What these would round to nothing has a smaller unit.
    """
    if not known(nbytes):
        return EMPTY
    if not known(scale) or scale == 1:
        return sizes.gib_or_less(nbytes)
    own = sizes.mib_or_less(nbytes) if 0 < nbytes < 0.005 * MIB else f"{nbytes / MIB:.2f} MiB"
    return f"{own} ({sizes.gib_or_less(nbytes * scale)})"


def tokens(count: float) -> str:
    """Return a number of tokens: ``10M``, ``500K``, ``128Ki``, else all digits (``5,832,704``)."""
    if not known(count):
        return EMPTY
    n = int(count)
    if n >= 10**6 and n % 10**5 == 0:
        return f"{n / 10**6:g}M"
    if 10**3 <= n < 10**6 and n % 100 == 0:
        return f"{n / 10**3:g}K"
    for unit, suffix in ((1 << 20, "Mi"), (1 << 10, "Ki")):
        if n >= unit and n % unit == 0:
            return f"{n // unit}{suffix}"
    return f"{n:,}"


def short_tokens(count: float) -> str:
    """Return a number of tokens for a figure, three digits: ``5.84M``."""
    if not known(count):
        return EMPTY
    for unit, suffix in ((1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:.3g}"


def figure_of(value: object, digits: int = 4) -> str:
    """Return a number with so many significant digits and thousands separated; ``–`` for none."""
    if not isinstance(value, (int, float)) or not known(value):
        return EMPTY
    if value == 0:
        return "0"
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}" if places < 8 else f"{value:.{digits}g}"


def percent(value: float) -> str:
    """Return a share as ``10 %``."""
    return f"{100 * value:.4g} %" if known(value) else EMPTY
