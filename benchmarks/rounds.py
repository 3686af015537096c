"""One model at one number of threads: all its contestants open at once, and asked in turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .artifacts import Artifacts, Missing
from .cells import Cell
from .child import Child, Failed
from .field import Start, Timed, depths_of, start_of
from .shapes import Looped


@dataclass
class Side:
    """A contestant, its process while it has one, and its cells."""

    start: Start | None
    cells: list[Cell]
    child: Child | None = None
    facts: dict[str, object] = field(default_factory=dict)

    def fail(self, reason: str) -> None:
        """The whole contestant, where nothing failed before."""
        for cell in self.cells:
            cell.failed = cell.failed or reason


def run_section(
    model: Looped,
    threads: int,
    contestants: Sequence[str],
    tests: Timed,
    rounds: int,
    files: Artifacts,
    limit: float,
    say: Callable[[str], object],
) -> tuple[list[Cell], dict[str, dict[str, object]]]:
    """A warm-up and then the rounds; in each every row of every contestant once, test by test.

    A row that fails keeps its reason and is not asked again. What was measured before stays.

    Args:
        limit: seconds that one answer may take.
    Returns:
        the cells, and what each contestant said of itself.
    """
    sides: dict[str, Side] = {}
    for name in contestants:  # everything is built before anything is timed
        sides[name] = prepared(name, model, threads, tests, files)
    try:
        for name, side in sides.items():
            if side.start is not None:
                say(f"{model.name}, threads {threads}: opening {name}")
                log = files.folder / f"{model.name}-{threads}-{name}.log"
                open_side(side, log, limit)
        for number in range(rounds + 1):
            say(f"{model.name}, threads {threads}: " + (f"round {number} of {rounds}" if number else "warm-up"))
            for kind, count in tests.named():
                for side in sides.values():
                    for cell in side.cells:
                        if cell.test == f"{kind}{count}" and cell.failed is None:
                            ask(side, cell, kind, count, number)
    finally:
        for side in sides.values():
            if side.child is not None:
                side.child.close()
    return [c for side in sides.values() for c in side.cells], {name: side.facts for name, side in sides.items()}


def prepared(name: str, model: Looped, threads: int, tests: Timed, files: Artifacts) -> Side:
    """Its files, made if they are not there, and its cells, still empty."""
    try:
        start, failed = start_of(name, model, threads, tests, files), None
    except Missing as missing:
        start, failed = None, str(missing)
    size = start.file_bytes if start else None
    cells = [
        Cell(model.name, threads, name, f"{kind}{count}", depth, file_bytes=size, failed=failed)
        for kind, count in tests.named()
        for depth in depths_of(name, model)
    ]
    return Side(start, cells)


def open_side(side: Side, log: Path, limit: float) -> None:
    assert side.start is not None
    try:
        side.child = Child(side.start.command, log, limit)
        side.facts = side.child.facts
    except Failed as failed:
        side.fail(str(failed))


def ask(side: Side, cell: Cell, kind: str, count: int, number: int) -> None:
    """One measurement into a cell; of round 0, the warm-up, only the memory is kept."""
    assert side.child is not None
    try:
        answer = side.child.ask(test=kind, tokens=count, loops=cell.loops)
    except Failed as failed:
        cell.failed = str(failed)
        if side.child.process.poll() is not None:  # the process is gone, and with it its other rows
            side.fail(str(failed))
        return
    peak = answer.get("peak_bytes") or side.child.peak_bytes()
    for other in side.cells:
        other.peak_bytes = max(filter(None, (other.peak_bytes, peak)), default=None)
    cell.mean_loops = answer.get("mean_loops")
    if number:
        cell.speeds[number] = answer["tok_per_s"]
        if answer.get("gb_per_s") is not None:
            cell.gb_per_s.append(answer["gb_per_s"])
