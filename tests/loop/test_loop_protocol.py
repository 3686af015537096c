"""The `LoopModel` protocol assumes no language model: a board solver takes the same way from PyTorch to ONNX."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import architectures  # noqa: F401  # registers the puzzle
import numpy as np
import pytest
import torch
from helpers import assert_one_line
from later import later
from puzzle import CELLS, MAX_LOOPS, SYMBOLS, Puzzle
from torch import Tensor

from rmse_edge.arch.common.identity import model_info
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ConfigError, ExportError, UserError
from rmse_edge.export import LoopProgram, trace
from rmse_edge.export.gate.methods import compare_methods
from rmse_edge.export.program import BOARDS as ANY_BOARDS
from rmse_edge.export.targets import LowerOptions, get_target
from rmse_edge.loop.contract import LoopModel, Tensors
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.onnx import OnnxMethods
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.board import BATCHED, BoardRuntime

onnx = later("onnx")
onnx_passes = later("rmse_edge.export.onnx.passes")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

THRESHOLD = 0.8  # at which random boards stop at many depths


def puzzle(kind: type[Puzzle] = Puzzle) -> Puzzle:
    torch.manual_seed(3)
    return kind().eval()


@pytest.fixture(scope="module")
def program() -> LoopProgram:
    return trace(puzzle(), (CELLS,))


@pytest.fixture(scope="module")
def folder(program: LoopProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The puzzle, lowered by the target that lowers language models."""
    folder = tmp_path_factory.mktemp("puzzle")
    get_target("onnx").lower(program, folder, LowerOptions())
    return folder


@pytest.fixture(scope="module")
def lowered(program: LoopProgram, folder: Path) -> OnnxMethods:
    return OnnxMethods(folder, {f"{m.name}_{CELLS}": f"{m.name}.onnx" for m in program.methods})


def dials(max_loops: int = MAX_LOOPS, min_loops: int = 1, exit_threshold: float = THRESHOLD) -> dict[str, float]:
    return {"max_loops": max_loops, "min_loops": min_loops, "exit_threshold": exit_threshold}


def solve(methods: Any, board: np.ndarray, **changes: float) -> Arrays:
    """One call as a host makes it."""
    types = {"max_loops": np.int64, "min_loops": np.int64, "exit_threshold": np.float32}
    given = {name: np.array(value, types[name]) for name, value in dials(**changes).items()}
    looped = methods.run("loop", CELLS, methods.run("prelude", CELLS, {"board": board}) | given)
    found = looped | methods.run("head", CELLS, {"h": looped["h"]})
    return {name: np.array(value) for name, value in found.items()}


def boards(count: int) -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(0, SYMBOLS, (1, CELLS)) for _ in range(count)]


def test_both_models_are_loop_models(tiny: RMSE) -> None:
    """The protocol is what the code checks for; RMS-E and the puzzle are two implementations of it."""
    assert isinstance(tiny, LoopModel) and isinstance(puzzle(), LoopModel)
    assert not isinstance(torch.nn.Linear(1, 1), LoopModel)


def test_a_model_without_context_state_or_commit_has_the_methods_it_needs(program: LoopProgram, folder: Path) -> None:
    """No commit is traced, lowered or asked for, and the loop takes nothing but the board's embedding and the dials."""
    assert [m.name for m in program.methods] == ["prelude", "loop", "begin", "step", "head"]
    assert {p.name for p in folder.iterdir()} == {
        "prelude.onnx", "loop.onnx", "begin.onnx", "step.onnx", "head.onnx", "weights.bin",
    }  # fmt: skip
    graph = onnx.load(folder / "loop.onnx", load_external_data=False).graph
    assert [i.name for i in graph.input] == ["x", "max_loops", "min_loops", "exit_threshold"]
    assert [o.name for o in graph.output] == ["h", "depth", "iterations"]
    assert [o.type.tensor_type.shape.dim[0].dim_value for o in graph.output[:2]] == [1, 1]  # one flag for the board


@pytest.mark.parametrize("changes", [{}, {"exit_threshold": 2.0}, {"max_loops": 2}, {"min_loops": 6}])
def test_every_method_agrees_with_pytorch(
    program: LoopProgram, lowered: OnnxMethods, changes: dict[str, float]
) -> None:
    """prelude, loop, head, `begin`, and the host driving `step`, at adaptive, full, capped and floored depth."""
    worst = compare_methods(program, lowered, dials(**changes), 1e-5)
    assert set(worst) == {"prelude_16", "loop_16", "head_16", "begin_16", "step_16"}


def test_boards_stop_by_themselves_and_give_the_same_answer(program: LoopProgram, lowered: OnnxMethods) -> None:
    """Thirty boards stop early at several depths, and the ONNX loop runs exactly as often as the PyTorch one."""
    reference = TorchMethods(program.model)
    depths = set()
    for board in boards(30):
        expected, got = solve(reference, board), solve(lowered, board)
        assert got["depth"] == expected["depth"] and got["iterations"] == got["depth"][0]
        np.testing.assert_allclose(got["symbols"], expected["symbols"], atol=1e-5)
        depths.add(int(got["depth"][0]))
    assert len(depths) >= 3 and min(depths) < MAX_LOOPS


def test_several_boards_at_once_say_what_each_says_alone(tmp_path: Path) -> None:
    """On ONNX Runtime. Those that have stopped leave the batch: no step computes them any more."""
    model = puzzle()
    program = trace(model, (CELLS,), batches=True)
    shapes = {m.name: {t.shape[0] for t in (*m.takes, *m.gives) if t.shape} for m in program.methods}
    assert shapes == {"loop": {1}} | {name: {ANY_BOARDS} for name in BATCHED}
    get_target("onnx").lower(program, tmp_path, LowerOptions())
    methods = OnnxMethods(tmp_path, {f"{m.name}_{CELLS}": f"{m.name}.onnx" for m in program.methods})
    info = dataclasses.replace(model_info(model, "puzzle", 0), target="onnx")
    together = BoardRuntime(info, methods, largest_batch=None)
    sizes: list[int] = []
    run = methods.run

    def counted(method: str, chunk: int, feeds: Arrays) -> Arrays:
        sizes.extend([len(feeds["h"])] if method == "step" else [])
        return run(method, chunk, feeds)

    methods.run = counted  # type: ignore[method-assign]
    given, settings = np.concatenate(boards(9)), Dials(MAX_LOOPS, 1, THRESHOLD)
    found = together.solve_batch(given, settings)
    alone = [BoardRuntime(info, TorchMethods(model)).solve(board, settings) for board in given]
    for a, b in zip(found, alone):
        assert np.array_equal(a.depth, b.depth) and a.iterations == b.iterations
        np.testing.assert_allclose(a.logits, b.logits, atol=1e-5)
    depths = [s.iterations for s in alone]
    assert len(set(depths)) >= 3 and sizes == [sum(d > k for d in depths) for k in range(max(depths))]
    with pytest.raises(UserError, match=r"^a board of 15 cells; expected 16$"):
        together.solve_batch(given[:, :15], settings)


def test_no_cell_is_before_another(lowered: OnnxMethods) -> None:
    """The last cell changes the answer of the first: nothing on the way assumed an order of positions."""
    board = boards(1)[0]
    other = board.copy()
    other[0, -1] = (other[0, -1] + 1) % SYMBOLS
    a, b = (solve(lowered, x, exit_threshold=2.0)["symbols"][0, 0] for x in (board, other))
    assert np.abs(a - b).max() > 1e-3


def test_a_loop_without_emits_scans_nothing(folder: Path) -> None:
    """Only the carry leaves the loop: the iteration count, z_h, the flag, the depth and z_l."""
    loop = onnx_passes.find_loop(onnx.load(folder / "loop.onnx", load_external_data=False))
    assert loop is not None and len(loop.output) == len(loop.input) - 2 == 5


def test_a_planted_difference_is_noticed(program: LoopProgram, folder: Path, tmp_path: Path) -> None:
    """The comparison of methods can fail: every weight a thousandth larger is too much."""
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    values = np.fromfile(tmp_path / "weights.bin", np.float32)
    (values * np.float32(1.001)).tofile(tmp_path / "weights.bin")
    wrong = OnnxMethods(tmp_path, {f"{m.name}_{CELLS}": f"{m.name}.onnx" for m in program.methods})
    with pytest.raises(ExportError, match=r"^\w+_16: \w+ differs by "):
        compare_methods(program, wrong, dials(), 1e-5)


# ------------------------------------------------------------------------------------------------ broken models


class WrongShape(Puzzle):
    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": super().prelude(tensors)["x"][:, :-1]}


class WrongType(Puzzle):
    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": super().prelude(tensors)["x"].double()}


class Undecidable(Puzzle):
    def prelude(self, tensors: Tensors) -> Tensors:
        x = super().prelude(tensors)["x"]
        return {"x": x if self.lucky(tensors["board"]) else -x}

    def lucky(self, board: Tensor) -> bool:
        return bool(board.sum() > 3)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (WrongShape, "prelude (16 rows): x is (1, 15, 32) torch.float32, its spec says (1, 16, 32) torch.float32"),
        (WrongType, "prelude (16 rows): x is (1, 16, 32) torch.float64, its spec says (1, 16, 32) torch.float32"),
        (Undecidable, "Undecidable.prelude does not trace"),
    ],
)
def test_a_model_that_breaks_the_protocol_is_named(kind: type[Puzzle], said: str) -> None:
    """What a method returns is held against its spec right after tracing, in one line."""
    with pytest.raises(ExportError) as caught:
        trace(puzzle(kind), (CELLS,))
    assert_one_line(str(caught.value), said)


def test_a_board_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigError, match="chunk: got 64, expected the whole board"):
        trace(puzzle(), (64,))
