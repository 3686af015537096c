"""A model that fills in boards of 81 cells; see tests/puzzle.py. tests/arch/test_packages.py exports it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import solver as make_solver
from puzzle import Puzzle

from rmse_edge.arch.common.identity import model_info
from rmse_edge.errors import ArgumentError, ParityError, UserError
from rmse_edge.export import LoopProgram
from rmse_edge.export.gate import board as gate_of_boards
from rmse_edge.export.gate.board import board_gate
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes import BoardRuntime
from rmse_edge.runtimes.engines.torch import TorchMethods

CELLS, SYMBOLS = 81, 10


@pytest.fixture(scope="module")
def solver() -> Puzzle:
    return make_solver().eval()


def on_torch(model: Puzzle) -> BoardRuntime:
    return BoardRuntime(model_info(model, "puzzle", 0), TorchMethods(model))


def boards(count: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, SYMBOLS, (count, CELLS))


def test_a_board_stops_by_itself(solver: Puzzle) -> None:
    runtime = on_torch(solver)
    scores = solver.scores(torch.from_numpy(boards(1)), {n: torch.tensor(v) for n, v in Dials(8).arrays().items()})
    full, early = (runtime.solve(boards(1)[0], Dials(8, 1, t)) for t in (1.0, float(scores[2]) - 1e-4))
    assert (full.iterations, full.depth.tolist()) == (8, [8])
    assert early.iterations <= 3 and early.depth.tolist() == [early.iterations]
    assert full.cells.shape == (CELLS,) and full.logits.shape == (CELLS, SYMBOLS)


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (np.zeros(80, np.int64), "a board of 80 cells; expected 81"),
        (np.full(81, 10), r"cell 10 is no symbol of the model \(0..9\)"),
        (np.full(81, -1), r"cell -1 is no symbol of the model \(0..9\)"),
    ],
)
def test_what_is_no_board_is_refused(cells: np.ndarray, said: str, solver: Puzzle) -> None:
    with pytest.raises(UserError, match=f"^{said}$"):
        on_torch(solver).solve(cells, Dials(8))
    with pytest.raises(ArgumentError, match="max_loops: got 9"):
        on_torch(solver).solve(boards(1)[0], Dials(9))


class OneMore(BoardRuntime):
    """A host that lets a board think on for a loop."""

    def solve(self, cells, dials):  # type: ignore[no-untyped-def]
        return super().solve(cells, Dials(dials.max_loops, min(dials.max_loops, 2), dials.exit_threshold))


@pytest.mark.slow
def test_the_gate_catches_a_host_that_stops_late(solver: Puzzle, monkeypatch: pytest.MonkeyPatch) -> None:
    program = LoopProgram(solver, {CELLS: solver.spec(CELLS)}, [])
    monkeypatch.setattr(gate_of_boards, "compare_methods", lambda *_: {})  # PyTorch's methods have no step
    report = board_gate(program, solver, on_torch(solver), exact=True)
    assert {s["same_depth"] for s in report["settings"].values()} == {1.0}
    assert len({s["mean_depth"] for s in report["settings"].values()}) == 3
    said = r"^parity failed at early: logits differ by .* of the depths are the same; random symbols were compared: puzzle in "
    with pytest.raises(ParityError, match=said):
        board_gate(program, solver, OneMore(model_info(solver, "puzzle", 0), TorchMethods(solver)), exact=True)
