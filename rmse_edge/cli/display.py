"""Depth for people: tokens coloured by their loops, histograms as bars. Only this file knows about terminals."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rmse_edge.runtimes.text.generate import Span

# Backgrounds of the 256-colour palette from pale to strong, under black text: legible on dark and light terminals.
SCALE = (231, 230, 229, 228, 222, 221, 220, 214, 208, 202)
BLACK, RESET = "\x1b[38;5;16m", "\x1b[0m"


PLAIN = {"█": "#", "↵": "\\n", "±": "+-", "×": "x", "µ": "u"}  # for terminals and files of few characters


def plain(text: str, stream: TextIO | None = None) -> str:
    """`text` with ASCII in the place of our own signs that `stream` (stdout without it) has no characters for."""
    encoding = getattr(stream or sys.stdout, "encoding", None) or "utf-8"
    for sign, letters in PLAIN.items():
        if sign in text and sign.encode(encoding, "ignore") == b"":
            text = text.replace(sign, letters)
    return text


def paint(text: str, depth: int, max_loops: int) -> str:
    """`text` on the colour of its depth; a line end becomes a coloured ↵ and a bare one, or the colour would run on."""
    place = max(depth - 1, 0) / max(max_loops - 1, 1) * (len(SCALE) - 1)
    start = f"\x1b[48;5;{SCALE[round(place)]}m{BLACK}"
    lines = text.replace("\n", plain("↵") + "\n").splitlines(keepends=True)
    return "".join(start + line.removesuffix("\n") + RESET + "\n" * line.endswith("\n") for line in lines)


def legend(max_loops: int) -> str:
    return "loops " + "".join(paint(f" {k} ", k, max_loops) for k in range(1, max_loops + 1))


class DepthWriter:
    """Writes spans with their depth: in colour, or as runs of one depth in brackets, `[ROM/5][EO/3]`."""

    def __init__(self, write: Callable[[str], object], max_loops: int, color: bool) -> None:
        self._write = write
        self._max_loops = max_loops
        self._color = color
        self._open: int | None = None  # depth of the run being written
        if color:
            write(legend(max_loops) + "\n")

    def add(self, span: Span) -> None:
        if self._color:
            self._write(paint(span.text, span.depth, self._max_loops))
            return
        if span.depth != self._open:
            self.close()
            self._write("[")
            self._open = span.depth
        self._write(span.text)

    def close(self) -> None:
        """End the last run; to be called once more at the end."""
        if self._open is not None:
            self._write(f"/{self._open}]")
            self._open = None


def bars(histogram: Sequence[int], width: int = 40) -> list[str]:
    """A histogram of depths as lines: loops, share, bar. Depths above the deepest one seen are left out."""
    total, top = sum(histogram), max(histogram, default=0)
    deepest = max((k for k, count in enumerate(histogram, 1) if count), default=0)
    block = plain("█")
    return [
        f"{k:>3} loops {count / total:>6.1%} {block * math.ceil(width * count / top)}".rstrip()
        for k, count in enumerate(histogram[:deepest], 1)
    ]


def offload_lines(figures: dict[str, Any]) -> list[str]:
    """What --expert-ram did, as rmse-runner says it."""

    def percent(rate: float | None) -> str:
        return "-" if rate is None else f"{100 * rate:.0f}%"

    resident, total, budget = (
        figures[name] / 2**20 for name in ("resident_expert_bytes", "expert_bytes", "budget_bytes")
    )
    loops = (f"{k}:{percent(rate)}" for k, rate in enumerate(figures["hit_rate_per_loop"], 1))
    return [
        f"experts: {resident:.1f} of {total:.1f} MiB in memory, at most {budget:.1f}; "
        f"{percent(figures['hit_rate'])} were there when they were needed",
        f"read per token: {figures['mib_read_per_token']:.2f} MiB, waited for {figures['stall_ms_per_token']:.2f} ms; "
        f"read ahead {figures['prefetched']} experts, used {figures['prefetched_used']}, in vain "
        f"{figures['prefetched_wasted']} so far",
        f"there when needed, by loops: {' '.join(loops)}",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, the first one to the left, numbers to the right."""
    head, *rows = ([plain(str(cell)) for cell in row] for row in (head, *rows))
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths)))
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(head), rule, *(line(row) for row in rows)])
