"""The table as a picture: tokens/s, and beside each bar how many times as fast as llama.cpp. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from rmse_edge.files import new_file

from .cells import Cell
from .field import BASELINE
from .report import Results, in_order, loops_of


def draw(results: Results, path: Path) -> None:
    """One panel for each test of each model and number of threads; the ending of `path` chooses the format."""
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    panels: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in results.cells:
        panels.setdefault((cell.model, cell.threads, cell.test), []).append(cell)
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(7 * columns, 3.4 * rows), layout="constrained")
    for place, ((model, threads, test), cells) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        cells = in_order(cells)
        speeds = [cell.median or 0.0 for cell in cells]
        axes.barh(range(len(cells)), speeds, color=["C1" if cell.contestant == BASELINE else "C0" for cell in cells])
        for height, (cell, speed) in enumerate(zip(cells, speeds)):
            axes.text(speed, height, f" {mark(cell, results)}", va="center", fontsize=7)
        axes.set_yticks(range(len(cells)), [f"{cell.contestant}, {loops_of(cell)}" for cell in cells], fontsize=7)
        axes.set_title(f"{model}, {test}, threads: {threads}", fontsize=9)
        axes.set_xlabel("tokens/s, and times as fast as llama.cpp", fontsize=8)
        axes.set_xlim(0, 1.12 * max(speeds) or 1.0)
        axes.invert_yaxis()
    with new_file(path) as part:
        figure.savefig(part, dpi=120)


def mark(cell: Cell, results: Results) -> str:
    """What stands beside a bar."""
    if cell.failed:
        return "failed"
    ratio = cell.ratio(results.cells)
    return "" if ratio is None else f"{ratio:.2f} x"
