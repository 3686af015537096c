"""The table as a picture: how many times as fast as llama.cpp, contestant by contestant. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from rmse_edge.files import new_file

from .cells import Cell
from .field import BASELINE
from .report import Results, loops_of


def draw(results: Results, path: Path) -> None:
    """One panel for each test of each model and number of threads; the ending of `path` chooses the format."""
    from matplotlib.figure import Figure  # not pyplot: no window system is asked for

    panels: dict[tuple[str, int, str], list[Cell]] = {}
    for cell in results.cells:
        if cell.contestant != BASELINE:
            panels.setdefault((cell.model, cell.threads, cell.test), []).append(cell)
    columns = min(2, len(panels)) or 1
    rows = -(-len(panels) // columns) or 1
    figure = Figure(figsize=(7 * columns, 3.2 * rows), layout="constrained")
    for place, ((model, threads, test), cells) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, place)
        names = [f"{cell.contestant}, {loops_of(cell)}" for cell in cells]
        ratios = [cell.ratio(results.cells) for cell in cells]
        axes.barh(names, [ratio or 0.0 for ratio in ratios], color=["C0" if r else "none" for r in ratios])
        for height, (cell, ratio) in enumerate(zip(cells, ratios)):
            axes.text(
                ratio or 0.0,
                height,
                f" {ratio:.2f}" if ratio else " failed" if cell.failed else " -",
                va="center",
                fontsize=7,
            )
        axes.axvline(1.0, color="grey", lw=1, ls=":")
        axes.invert_yaxis()
        axes.tick_params(labelsize=7)
        axes.set_title(f"{model}, {test}, threads: {threads}", fontsize=9)
        axes.set_xlabel("times as fast as llama.cpp on the dense twin", fontsize=8)
    with new_file(path) as part:
        figure.savefig(part, dpi=150)
