"""Integers of a solver of boards, calibrated on boards: what its weights hear, and what they cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import lively_solver
from helpers import assert_one_line

from rmse_edge.arch.trm import TrmConfig
from rmse_edge.checkpoint import save_checkpoint
from rmse_edge.cli.quantize import main as rmse_quantize
from rmse_edge.errors import ArgumentError
from rmse_edge.puzzles.sets import Boards, made, write_boards
from rmse_edge.puzzles.sudoku import Sudoku
from rmse_edge.quantize import QuantizeRequest, Scheme, quantize
from rmse_edge.quantize.boards import BoardReader, compare_boards
from rmse_edge.quantize.hessians import gather

GATE = "L_level.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def boards() -> Boards:
    return made(Sudoku(4), 60, 1, 2)[0]


def solver(threshold: float) -> Any:
    config = TrmConfig(
        seq_len=16, vocab_size=6, puzzle="sudoku", hidden_size=32, num_heads=2, mlp_multiple=32, L_layers=1,
        H_cycles=1, L_cycles=1, puzzle_emb_ndim=32, puzzle_emb_len=1, halt_max_steps=4, exit_threshold=threshold,
    )  # fmt: skip
    return lively_solver(config).eval()


def test_weights_hear_every_step_of_every_board(boards: Boards) -> None:
    """And nothing of boards that have stopped, but for the share that is run to the end."""
    model, tokens = solver(1.0), torch.from_numpy(boards.given[:6])
    heard: list[torch.Tensor] = []
    hook = model.L_level.layers[0].mlp.gate_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0]))
    course = BoardReader(model).read(tokens)
    hook.remove()
    assert len(heard) == 8 and len(course.states) == 4 and course.depth.unique().tolist() == [4]
    rows = torch.cat([x.reshape(-1, 32) for x in heard]).double()
    found = gather(model, tokens, [GATE]).of(GATE)
    torch.testing.assert_close(found.double(), rows.T @ rows, rtol=1e-4, atol=1e-3)

    first = torch.stack([model.scores(board[None], {})[0] for board in tokens])
    stops = solver(float(first.median()))  # half of them stop after one step
    depth = BoardReader(stops).read(tokens, stop=True).depth[:, 0]
    assert len(depth.unique()) > 1
    kept = round(0.25 * 6)  # the first boards run to the end
    counts = torch.cat([torch.full((kept,), 4), depth[kept:]])
    per_call = [x.reshape(6, -1, 32) for x in heard]
    expected = sum(
        (per_call[2 * k + i][b].double().T @ per_call[2 * k + i][b].double())
        for b in range(6) for k in range(int(counts[b])) for i in range(2)
    )  # fmt: skip
    found = gather(stops, tokens, [GATE]).of(GATE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


def test_calibrated_integers_say_more_than_rounded_ones(boards: Boards) -> None:
    model = solver(0.5)
    request = {"calibration_tokens": 800, "recalibrate_gate": True}
    both = [quantize(model, QuantizeRequest(Scheme("int4"), method=m, **request), boards) for m in ("gptq", "rtn")]  # type: ignore[arg-type]
    gptq, rounded = (q.report["evaluation"] for q in both)
    assert gptq["boards"] == 6 and sum(gptq["drift"]) < sum(rounded["drift"])
    same = compare_boards(model, model, boards)
    assert same["float"] == same["quantized"] and same["same_steps"] == 1.0 and max(same["drift"]) == 0.0
    with pytest.raises(ArgumentError, match=r"^qat_steps: got 3, expected 0"):
        quantize(model, QuantizeRequest(Scheme("int4"), qat_steps=3), boards)


def test_the_verb_calibrates_on_boards(boards: Boards, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(solver(0.5), tmp_path / "m")
    write_boards(tmp_path / "b.csv", Sudoku(4), boards, "test")
    flags = ["-m", str(tmp_path / "m"), "-o", str(tmp_path / "q"), "--calibrate", str(tmp_path / "b.csv")]
    assert rmse_quantize([*flags, "--quant", "int8", "--calibration-tokens", "512"]) == 0
    assert "6 held-out boards, " in capsys.readouterr().out
    write_boards(tmp_path / "b.csv", Sudoku(4), boards.part(slice(0, 5)), "test")
    assert rmse_quantize([*flags, "--quant", "int8", "--force"]) == 2
    assert_one_line(capsys.readouterr().err, "--calibrate: the file has 5 boards, expected at least 20")
