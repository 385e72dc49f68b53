"""What a person sees while a run goes on: a bar, the trial in hand, and a line for each row."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

from harness.cell import Cell
from harness.rows import Row
from harness.sizes import gib, mib, tokens_text


class Progress:
    """A progress bar over trials, on standard error."""

    def __init__(self) -> None:
        self.bar = tqdm(
            total=0,
            unit="trial",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 2.0,
            bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} trials [{elapsed}<{remaining}] {postfix}",
        )

    def expect(self, trials: int) -> None:
        """This many trials are to come."""
        self.bar.reset(total=trials)

    def record(self, record: dict[str, Any]) -> None:
        """Show the phase of the trial in hand."""
        if record["type"] == "timeline" and sys.stderr.isatty():
            row = record["row"]
            self.bar.set_postfix_str(f"{row['phase']}: {row['allocation']}", refresh=False)
            self.bar.refresh()

    def advance(self, trials: int, cell: Cell) -> None:
        """``trials`` more are done."""
        if self.bar.total is not None and self.bar.n + trials > self.bar.total:
            self.bar.total = self.bar.n + trials
        context = tokens_text(cell.context_tokens)
        self.bar.set_postfix_str(f"{cell.settings.strategy} {context} done", refresh=False)
        self.bar.update(trials)

    def row(self, row: Row) -> None:
        """One line for a finished trial, above the bar."""
        self.bar.write(row_line(row), file=sys.stdout)
        sys.stdout.flush()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self.bar.total and self.bar.n < self.bar.total:
            self.bar.total = self.bar.n
        self.bar.refresh()
        self.bar.close()


def row_line(row: Row) -> str:
    """``paged  10M x 100 %  oom in fill: asked …``."""
    size = mib if int(row.get("scale") or 1) > 1 else gib
    name = f"{row['strategy']} itself" if row.get("engine_version") else row["strategy"]
    text = (
        f"{name:<12} {tokens_text(int(row['context_tokens'])):>10} "
        f"x {float(row['fill']):>4.0%}  {row['purpose']:<8} {row['status']:<8}"
    )
    if row["status"] in ("oom", "refused") and row.get("oom_requested_bytes") is not None:
        text += (
            f" in {row['oom_phase']}: {row['oom_allocation']} asked "
            f"{size(row['oom_requested_bytes'])}, {size(row['oom_free_bytes'])} free"
        )
    elif row["basis"] == "planned":
        text += f" planned, not run: peak {size(row['predicted_peak_bytes'])}"
    elif row["status"] == "ok":
        text += f" peak {size(row['peak_device_bytes'])}"
        if row.get("attention_decode_step_ms") is not None:
            text += f", attention decode {row['attention_decode_step_ms']:.2f} ms a step"
    else:
        text += f" {row.get('error') or row.get('signal') or ''}"[:160]
    return text
