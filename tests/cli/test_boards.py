"""The shipped solver at the command line: boards in, boards out, and an answer that breaks a rule is called so."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line
from paths import ROOT

from rmse_edge.cli.bench import main as rmse_bench
from rmse_edge.cli.evaluate import main as rmse_eval
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.loop.dials import Dials
from rmse_edge.puzzles.known import game_of_model
from rmse_edge.puzzles.sets import read_boards, write_boards
from rmse_edge.runtimes import open_boards

MODEL = ROOT / "models" / "trm-sudoku"
TEST = MODEL / "test.csv"
GAME = game_of_model(open_boards(MODEL).board)
BOARDS = read_boards(TEST, GAME, 12)


def test_a_board_is_solved_and_printed_as_people_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.txt").write_text(GAME.show(BOARDS.given[0]))
    assert rmse_run([str(MODEL), "--board", str(tmp_path / "b.txt"), "--show-steps", "-t", "1"]) == 0
    out, err = capsys.readouterr()
    steps = int(err.split(" of 16 steps")[0].rpartition(" ")[2])
    assert err.strip().endswith("solved") and out.endswith(GAME.show(BOARDS.answer[0]) + "\n")
    assert out.count("cells changed") == steps and out.startswith("step 1: ") and "*" in out


def test_boards_of_stdin_as_one_document(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "\n".join(GAME.line(board) for board in BOARDS.given[:3])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert (
        rmse_run([str(MODEL), "--board", "-", "-o", "json", "--exit-threshold", "1", "--max-loops", "2", "-t", "1"])
        == 0
    )
    document = json.loads(capsys.readouterr().out)
    assert [s["board"] for s in document["solutions"]] == lines.split("\n")
    assert {s["steps"] for s in document["solutions"]} == {2} and document["dials"]["max_loops"] == 2


def test_an_answer_that_breaks_a_rule_is_called_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a board that has no solution; with many of them, any is one."""
    size = GAME.size
    (tmp_path / "none.txt").write_text("11" + "." * (size * size - 2))
    assert rmse_run([str(MODEL), "--board", str(tmp_path / "none.txt"), "-o", "json", "-t", "1"]) == 0
    found = json.loads(capsys.readouterr().out)["solutions"][0]
    assert not found["solved"] and found["broken"]
    assert rmse_run([str(MODEL), "--board", str(tmp_path / "none.txt"), "-t", "1"]) == 0
    assert "NOT a solution: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no board"),
        ("12", "a board has 2 cells, expected"),
        ("9" * 99, "9 is no digit"),
        ("?", "'?' is no cell"),
    ],
)
def test_what_is_no_board_is_one_line(text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.txt").write_text(text)
    assert rmse_run([str(MODEL), "--board", str(tmp_path / "b.txt")]) == 2
    assert_one_line(capsys.readouterr().err, said)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--show-steps", "-p", "a"], "--show-steps: shows the steps of a board; add --board"),
        (["--board", "nowhere.txt"], "nowhere.txt"),
        (["--board", "x", "--chat"], "--board: is no question; leave out --chat"),
        (["--board", str(TEST), "--exit-kl", "0.1"], "has no such rule"),
        (["--board", str(TEST), "--temperature", "0"], "--temperature: is of texts; leave it out with --board"),
        (["--board", str(TEST), "--save-session", "s"], "--save-session: is of texts; leave it out with --board"),
        (["--board", str(TEST), "--show-depth"], "--show-depth: is of texts; leave it out with --board"),
        (["--board", str(TEST), "--system", "x"], "--system: is of texts; leave it out with --board"),
        (["--board", str(TEST), "--expert-ram", "1M"], "--expert-ram: solvers of boards have no experts; leave it out"),
    ],
)
def test_flags_that_cannot_be(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_run([str(MODEL), *flags]) == 2
    assert_one_line(capsys.readouterr().err, said)


def test_a_model_of_texts_fills_in_no_board(capsys: pytest.CaptureFixture[str]) -> None:
    assert rmse_run([str(ROOT / "models" / "ouro-shakespeare"), "--board", str(TEST)]) == 2
    assert_one_line(capsys.readouterr().err, "is a model of texts; give it a prompt")


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        (rmse_eval, ["--split", "train"]),
        (rmse_eval, ["--block", "7"]),
        (rmse_eval, ["--sweep", "--budget", "2"]),
        (rmse_bench, ["--prompt", "8"]),
        (rmse_bench, ["--generate", "0"]),
    ],
)
def test_flags_of_texts_beside_boards(verb: Any, flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert verb([str(MODEL), "--boards", str(TEST), *flags]) == 2
    assert_one_line(capsys.readouterr().err, f"{flags[-2]}: is of texts; leave it out with --boards")


def test_few_boards_are_timed_alone_and_the_reason_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_boards(tmp_path / "few.csv", GAME, BOARDS.part(slice(0, 2)), "test")
    flags = [
        "--boards",
        str(tmp_path / "few.csv"),
        "-r",
        "1",
        "-d",
        "1",
        "--exit-threshold",
        "1",
        "-t",
        "1",
        "-o",
        "json",
    ]
    assert rmse_bench([str(MODEL), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in found["rows"]] == [1]
    assert found["notes"] == [f"trm-sudoku: {tmp_path / 'few.csv'} has 2 boards, too few for 32 at once"]


def test_boards_are_evaluated_and_timed(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--boards", str(TEST), "--max-tokens", "12", "-t", "1", "-o", "json"]
    assert rmse_eval([str(MODEL), *few, "--max-loops", "4"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["boards"] == sum(found["histogram"]) == 12 and found["solved"] >= 0.5
    assert rmse_eval([str(MODEL), *few, "--sweep", "--rule", "exit-threshold=0.5", "--max-loops", "4"]) == 0
    half, off = json.loads(capsys.readouterr().out)["sweep"]
    assert off["mean_steps"] == 4 > half["mean_steps"] and off["false_halts"] == 0
    assert rmse_eval([str(MODEL), *few, "--sweep", "--rule", "exit-kl"]) == 2
    assert_one_line(capsys.readouterr().err, "--rule exit-kl: boards stop by exit-threshold alone")
    assert rmse_bench([str(MODEL), "--boards", str(TEST), "-r", "1", "-d", "2", "-t", "1", "-o", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["setting"], row["batch"]) for row in rows[::2]] == [("2 steps", 1), ("2 steps", 32)]
    assert rows[0]["mean_steps"] == 2.0 and all(row["boards_per_s"] > 0 for row in rows)


@pytest.mark.slow
def test_the_shipped_solver_stops_early_and_solves_as_much(capsys: pytest.CaptureFixture[str]) -> None:
    """On all boards of its test: in at most a third of the steps, and of the time; the numbers are those of its card."""
    flags = ["--boards", str(TEST), "--sweep", "--rule", "exit-threshold=0.9", "-t", "1", "-o", "json"]
    assert rmse_eval([str(MODEL), *flags]) == 0
    stopping, full = json.loads(capsys.readouterr().out)["sweep"]
    assert stopping["boards"] == full["boards"] == 300 and full["mean_steps"] == 16
    assert full["solved"] >= 0.95 and stopping["solved"] >= full["solved"] - 0.005
    assert stopping["mean_steps"] <= 16 / 3 and stopping["boards_per_s"] >= 3 * full["boards_per_s"]
    kept = {row["threshold"]: row for row in json.loads((MODEL / "evaluation.json").read_text())["by_threshold"]}
    for row, of_card in ((stopping, kept[0.9]), (full, kept[1.0])):
        assert row["solved"] == pytest.approx(of_card["solved"], abs=0.004)
        assert row["mean_steps"] == pytest.approx(of_card["mean_steps"], abs=0.01)


def test_a_batch_says_what_each_of_its_boards_says_alone() -> None:
    """Boards that have stopped leave it: all the same answers and steps."""
    runtime = open_boards(MODEL)
    dials = Dials(16, 2, 0.9)
    together = runtime.solve_batch(BOARDS.given, dials)
    for given, found in zip(BOARDS.given, together):
        alone = runtime.solve(given, dials)
        assert np.array_equal(alone.cells, found.cells) and int(alone.depth.max()) == found.iterations
        np.testing.assert_allclose(alone.logits, found.logits, atol=1e-3)
    every = list(runtime.steps(BOARDS.given[0], dials))
    assert len(every) == together[0].iterations and np.array_equal(every[-1].cells, together[0].cells)
