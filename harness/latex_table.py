"""A table for a paper: booktabs rules, columns that fit an article's text, longer ones over pages.

Needs the packages ``array``, ``booktabs`` and ``longtable``, which every TeX has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

PACKAGES = r"% needs \usepackage{array,booktabs,longtable}"
# Sizes, the gap beside a column, and how many letters an article's line and a column's gaps take.
SIZES = ((r"\scriptsize", "3pt", 84.0, 1.6), (r"\tiny", "2pt", 101.0, 1.2))
LEAST_LETTERS = 6.0
# A column need not be wider for one long word: TeX hyphenates it.
WORD_LETTERS = 12.0
# Numbers are broken only where they have a second figure in brackets.
NUMBER_LETTERS = 14
BREAKS = r"(?<=[\w\\][-/=_])(?=\w)|(?<=,)(?=[^\d\s])|(?<=\.)(?=[a-z])"
# Lines of a page that a float may fill; longer tables break over pages.
FLOAT_LINES = 50


def latex_table(
    title: str,
    headings: Sequence[str],
    numeric: Sequence[bool],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    label: str,
) -> str:
    """Return LaTeX of a table.

    Parameters
    ----------
    title, headings, rows, notes
        Escaped text. Notes are set under the table.
    numeric : sequence of bool
        For each column whether it is of numbers: set flush right.
    label : str
        The table's label is ``tab:{label}``.
    """
    for size, gap, line, gap_letters in SIZES:
        look = [rf"{size}\setlength{{\tabcolsep}}{{{gap}}}"]
        room = line - gap_letters * len(headings)
        widths, fits = column_letters(headings, numeric, rows, room)
        if fits:
            break
    columns = zip(widths, numeric, strict=True)
    spec = "".join(_column(width and width / line, n) for width, n in columns)
    heads = zip(headings, numeric, widths, strict=True)
    head = " & ".join(_heading(text, n, width) for text, n, width in heads) + r" \\"
    body = [
        " & ".join(c if w is None else breakable(c) for c, w in zip(row, widths, strict=True))
        + r" \\"
        for row in rows
    ]
    caption = rf"\caption{{{title}}}\label{{tab:{label}}}"
    said = [rf"\par\smallskip {note}" for note in notes]
    if _lines(rows, widths) <= FLOAT_LINES:
        parts = [r"\begin{table}", r"\centering", caption, *look]
        parts += [rf"\begin{{tabular}}{{{spec}}}", r"\toprule", head, r"\midrule", *body]
        parts += [r"\bottomrule", r"\end{tabular}", *said, r"\end{table}"]
    else:
        parts = [r"\begingroup", *look, rf"\begin{{longtable}}{{{spec}}}", caption + r" \\"]
        parts += [r"\toprule", head, r"\midrule", r"\endfirsthead", r"\toprule", head, r"\midrule"]
        parts += [r"\endhead", r"\bottomrule", r"\endfoot", *body, r"\end{longtable}", *said]
        parts += [r"\par\endgroup"]
    return "\n".join([PACKAGES, *parts, ""])


def column_letters(
    headings: Sequence[str], numeric: Sequence[bool], rows: Sequence[Sequence[str]], room: float
) -> tuple[list[float | None], bool]:
    """Return the width of each column in which text is broken into lines; None for the others.

    The second value says whether all columns together fit into ``room`` letters.
    """
    columns = list(zip(*rows, strict=True)) or [()] * len(headings)
    natural = [
        max([_letters(w) for w in heading.split()] + [_letters(c) for c in column], default=1)
        for heading, column in zip(headings, columns, strict=True)
    ]
    if sum(natural) <= room:
        return [None] * len(headings), True
    fixed = [NUMBER_LETTERS if n else LEAST_LETTERS for n in numeric]
    free = [i for i, most in enumerate(fixed) if natural[i] > most]
    least = {i: _longest_word(headings[i], columns[i]) for i in free}
    room -= sum(n for i, n in enumerate(natural) if i not in free)
    fits = room >= sum(least.values())
    out: list[float | None] = [None] * len(headings)
    # A long text gets more than a short one, but not in proportion; nobody gets more than it needs.
    while free:
        weight = sum(math.sqrt(natural[i]) for i in free)
        share = {i: room * math.sqrt(natural[i]) / weight for i in free}
        settled = [i for i in free if share[i] <= least[i] or share[i] >= natural[i]]
        if not settled:
            for i in free:
                out[i] = share[i]
            break
        narrow = [i for i in settled if share[i] <= least[i]]
        for i in narrow or settled:
            out[i] = min(least[i], natural[i]) if narrow else natural[i]
            room -= out[i] or 0
            free.remove(i)
    return out, fits


def _letters(text: str) -> int:
    """Return how many letters are printed of LaTeX."""
    return len(re.sub(r"\\[A-Za-z]+(\{\})?|\\(?=.)", lambda m: "x" if m[1] else "", text))


def _longest_word(heading: str, cells: Sequence[str]) -> float:
    """Return the letters that a column needs: of its longest piece, within reason."""
    pieces = (p for text in (heading, *cells) for w in text.split() for p in re.split(BREAKS, w))
    return min(max([LEAST_LETTERS, *map(_letters, pieces)]), WORD_LETTERS)


def _column(width: float | None, numeric: bool) -> str:
    """Return a column's letter, or its width as a share of a line."""
    if width is None:
        return "r" if numeric else "l"
    ragged = r"\raggedleft" if numeric else r"\raggedright"
    return rf">{{{ragged}\arraybackslash\hspace{{0pt}}}}p{{{width:.3f}\linewidth}}"


def _heading(text: str, numeric: bool, width: float | None) -> str:
    """Return a heading; that of a narrow column has a line a word."""
    if width is not None or " " not in text:
        return text
    return rf"\shortstack[{'r' if numeric else 'l'}]{{{text.replace(' ', chr(92) * 2)}}}"


def breakable(text: str) -> str:
    """Let LaTeX break a text inside its long words."""
    return re.sub(BREAKS, lambda _: r"\allowbreak{}", text)


def _lines(rows: Sequence[Sequence[str]], widths: Sequence[float | None]) -> float:
    """Return about how many lines the rows take."""
    return sum(
        max(math.ceil(1.15 * _letters(c) / w) if w else 1 for c, w in zip(row, widths, strict=True))
        for row in rows
    )
