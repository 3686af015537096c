"""Sudoku and mazes: made, solved, checked, turned, read and told apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_one_line

from rmse_edge.errors import ArgumentError, TextError, UserError
from rmse_edge.info import BoardInfo
from rmse_edge.puzzles.game import Game
from rmse_edge.puzzles.known import game_of, game_of_model
from rmse_edge.puzzles.maze import Maze
from rmse_edge.puzzles.measures import halted_at, table_of_thresholds
from rmse_edge.puzzles.sets import Boards, made, read_boards, unlike, write_boards
from rmse_edge.puzzles.sudoku import Sudoku, solved

GAMES = [Sudoku(4), Sudoku(6), Sudoku(9), Maze(9), Maze(12)]
every = pytest.mark.parametrize("game", GAMES, ids=lambda game: f"{game.kind} {game.size}")

# An easy one and its answer, and Arto Inkala's of 2012, as newspapers printed them.
EASY = "53..7....6..195....98....6.8...6...34..8.3..17...2...6.6....28....419..5....8..79"
ANSWER = "534678912672195348198342567859761423426853791713924856961537284287419635345286179"
HARD = "8..........36......7..9.2...5...7.......457.....1...3...1....68..85...1..9....4.."


def one(game: Game, text: str) -> np.ndarray:
    return game.read(text, "text")[0]


@every
def test_boards_have_one_answer_and_symmetries_keep_it(game: Game) -> None:
    draw = np.random.default_rng(0)
    given, answer, hard = game.generate(draw)
    assert given.min() >= 1 and answer.max() < game.symbols and hard >= 0
    assert game.broken(given, answer) is None
    assert game.broken(given, given) is not None
    boards, answers = game.augmented(np.stack([given] * 20), np.stack([answer] * 20), draw)
    assert len({b.tobytes() for b in boards}) > 5
    for turned, of_it in zip(boards, answers):
        assert game.broken(turned, of_it) is None
        assert game.invariant(turned) == game.invariant(given)
    other = game.generate(draw)[0]
    assert game.invariant(other) != game.invariant(given)
    assert np.array_equal(one(game, game.line(given)), given) and np.array_equal(one(game, game.show(given)), given)


def test_a_known_sudoku() -> None:
    game = Sudoku(9)
    found, guesses = solved(one(game, EASY), 9)
    assert [game.line(answer) for answer in found] == [ANSWER] and guesses == 0
    found, guesses = solved(one(game, HARD), 9)
    assert len(found) == 1 and guesses > 5


def test_no_answer_and_several() -> None:
    game = Sudoku(4)
    assert solved(one(game, "11.............."), 4) == ([], 0)
    assert len(solved(one(game, "................"), 4)[0]) == 2
    assert len(solved(one(game, "................"), 4, most=10**6)[0]) == 288  # all there are


def test_generated_boards_have_no_other_answer() -> None:
    game, draw = Sudoku(6), np.random.default_rng(4)
    for _ in range(5):
        given, answer, _ = game.generate(draw)
        assert [a.tolist() for a in solved(given, 6)[0]] == [answer.tolist()]


def test_a_maze_has_one_shortest_path() -> None:
    """By a search of its own: as many steps as cells are marked, and no way around."""
    game = Maze(9)
    given, answer, steps = game.generate(np.random.default_rng(3))
    free = {divmod(int(i), 9) for i in np.flatnonzero(given != 1)}
    start, goal = (divmod(int(np.flatnonzero(given == s)[0]), 9) for s in (3, 4))
    reached, rounds = {start}, 0
    while goal not in reached:
        reached |= {(r + y, c + x) for r, c in reached for y, x in ((1, 0), (-1, 0), (0, 1), (0, -1))} & free
        rounds += 1
    assert rounds == steps == (answer == 5).sum() + 1
    detour = answer.copy()
    detour[np.flatnonzero(answer == 2)[0]] = 5
    assert "are marked, where the shortest path has" in str(game.broken(given, detour))
    gap = answer.copy()
    gap[np.flatnonzero(answer == 5)[0]] = 2
    assert game.broken(given, gap) == "the path does not reach the goal"
    wall = answer.copy()
    wall[0] = 2
    assert game.broken(given, wall) == "row 1, column 1 was '#' and became ' '"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({0: 1}, "row 1, column 1 is left blank"),
        ({0: 5}, "row 1, column 1 is given as 5 and became 4"),
        ({2: 4}, "row 1 has 3 twice"),
    ],
)
def test_the_rule_that_an_answer_breaks(change: dict[int, int], said: str) -> None:
    game = Sudoku(9)
    answer = one(game, ANSWER)
    assert game.broken(one(game, EASY), answer) is None
    for cell, symbol in change.items():
        answer[cell] = symbol
    assert game.broken(one(game, EASY), answer) == said


def test_every_answer_but_one_is_broken() -> None:
    """The checker is exact: of all fillings of the last five cells it takes the one that the solver finds."""
    game = Sudoku(4)
    given = one(game, "1234341.21...32.")
    right = solved(given, 4)[0]
    assert len(right) == 1
    blank = np.flatnonzero(given == 1)
    for filling in itertools.product(range(1, 6), repeat=len(blank)):
        answer = given.copy()
        answer[blank] = filling
        assert (game.broken(given, answer) is None) == np.array_equal(answer, right[0])


@pytest.mark.parametrize(
    ("game", "text", "said"),
    [
        (Sudoku(4), "", "text: holds no board; expected 16 cells"),
        (Sudoku(4), "1.2", "text: a board has 3 cells, expected 16"),
        (Sudoku(4), "." * 20, "text: board 2 has 4 cells, expected 16"),
        (Sudoku(4), "5" + "." * 15, "text, line 1: 5 is no digit of a 4x4 Sudoku"),
        (Sudoku(4), "....\n..x.", "text, line 2: 'x' is no cell; expected 1..4, or . for blank"),
        (Maze(5), "#####\n#S #", "text, line 2: a row of 4 cells, expected 5"),
        (Maze(5), "#####\n#S  #\n### #\n#   #\n#####", "text: board 1 has 1 S and 0 G, expected one of each"),
        (Maze(5), "#####\n#S ?#", "text, line 2: '?' is no cell; expected one of '# SGo'"),
    ],
)
def test_what_is_no_board_is_one_line(game: Game, text: str, said: str) -> None:
    with pytest.raises(TextError) as caught:
        game.read(text, "text")
    assert_one_line(str(caught.value), said)


def test_boards_as_people_write_them() -> None:
    game = Sudoku(4)
    board = one(game, "12..34..........")
    assert game.show(board) == "1 2 | . .\n3 4 | . .\n----+-----\n. . | . .\n. . | . ."
    assert len(game.read(game.show(board) + "\n\n" + game.line(board), "text")) == 2
    assert game.show(board, board == 2).splitlines()[0] == "1*2 | . ."
    maze = Maze(5).read("#####\n#S G#\n#####\n#####\n#####", "text")[0]
    marked = np.arange(25) == 7
    assert Maze(5).show(maze + 3 * marked, marked).splitlines()[1] == "# S o*G # "


def test_games_that_there_are_not() -> None:
    for kind, cells, said in (("sudoku", 25, "size: got 5"), ("maze", 80, "no square"), (None, 81, "is not known")):
        with pytest.raises(UserError, match=said):
            game_of(kind, cells)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="has 11 symbols, the model 10"):
        game_of_model(BoardInfo(81, 10, kind="sudoku"))


def test_sets_share_no_symmetric_form(tmp_path: Path) -> None:
    game = Sudoku(4)
    train, test = made(game, 40, 10, 1)
    again = made(game, 40, 10, 1)[0]
    assert np.array_equal(train.given, again.given) and (len(train), len(test)) == (40, 10)
    assert len(unlike(game, test, train)) == len(test)
    forms = {form.tobytes() for board in train.given for form in all_forms(board)}
    assert not any(board.tobytes() in forms for board in test.given)
    draw = np.random.default_rng(0)
    leaked = Boards(*game.augmented(train.given[:1], train.answer[:1], draw), train.rating[:1])
    both = Boards(*(np.concatenate(parts) for parts in zip(*((b.given, b.answer, b.rating) for b in (leaked, test)))))
    assert np.array_equal(unlike(game, both, train).given, test.given)
    with pytest.raises(
        ArgumentError, match=r"^test: 3 boards that differ by more than a symmetry were not found, only \d"
    ):
        made(Narrow(4), 1, 3, 0)
    write_boards(tmp_path / "a.csv", game, train, "me")
    back = read_boards(tmp_path / "a.csv", game)
    assert np.array_equal(back.given, train.given) and np.array_equal(back.answer, train.answer)
    assert np.array_equal(read_boards(tmp_path / "a.csv", game, 7).given, train.given[:7])
    number = {given.tobytes(): i for i, given in enumerate(train.given)}
    drawn = [[number[g.tobytes()] for g in read_boards(tmp_path / "a.csv", game, 7, seed).given] for seed in range(200)]
    assert all(rows == sorted(set(rows)) and len(rows) == 7 for rows in drawn)
    assert np.ptp(np.bincount(np.concatenate(drawn), minlength=40)) < 40  # each 35 times, of 200; deviation 5.4
    assert len(read_boards(tmp_path / "a.csv", game, 100, 3)) == 40


class Narrow(Sudoku):
    """Of which there are few boards."""

    def generate(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        return super().generate(np.random.default_rng(int(draw.integers(2))))


def all_forms(board: np.ndarray) -> list[np.ndarray]:
    """All 128 * 24 symmetric forms of a Sudoku of 4, by brute force."""
    lines = [(a, b, c, d) for top in ((0, 1), (2, 3)) for a, b in (top, top[::-1])
             for low in (((2, 3), (0, 1))[top[0] // 2],) for c, d in (low, low[::-1])]  # fmt: skip
    grid = board.reshape(4, 4)
    found = []
    for rows, columns in itertools.product(lines, lines):
        turned = grid[np.ix_(rows, columns)]
        for names in itertools.permutations(range(2, 6)):
            named = np.array([0, 1, *names])[turned]
            found += [named.reshape(-1), named.T.reshape(-1)]
    assert len(found) == 128 * 24
    return found


def test_published_csv_files_are_read(tmp_path: Path) -> None:
    """Sudoku-Extreme and Maze-Hard: their columns and characters."""
    (tmp_path / "s.csv").write_text(f"source,question,answer,rating\npuzzles0_kaggle,{EASY},{ANSWER},3\n")
    found = read_boards(tmp_path / "s.csv", Sudoku(9))
    assert (found.rating.tolist(), found.given[0, :3].tolist()) == ([3], [6, 4, 1])
    given, answer, _ = Maze(30).generate(np.random.default_rng(0))
    line = Maze(30).line
    (tmp_path / "m.csv").write_text(f"source,question,answer,rating\nme,{line(given)},{line(answer)},110\n")
    assert np.array_equal(read_boards(tmp_path / "m.csv", Maze(30)).answer[0], answer)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_empty_lines_of_a_csv_are_passed_over(end: str, tmp_path: Path) -> None:
    lines = ["source,question,answer,rating", f"a,{EASY},{ANSWER},3", "", f"b,{EASY},{ANSWER},4", "", ""]
    (tmp_path / "s.csv").write_bytes(end.join(lines).encode())
    assert read_boards(tmp_path / "s.csv", Sudoku(9)).rating.tolist() == [3, 4]


def test_a_search_for_boards_that_there_are_not_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many were found before."""
    monkeypatch.setattr("rmse_edge.puzzles.sets.LONGEST", 300)
    tried = []

    class Counted(Narrow):
        def generate(self, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
            tried.append(1)
            return super().generate(draw)

    with pytest.raises(ArgumentError, match="were not found"):
        made(Counted(4), 3, 3, 0)
    assert 300 < len(tried) < 350


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected a CSV whose first line is source,question,answer,rating"),
        ("source,question,answer,rating\n", "holds no board"),
        ("source,question,answer,rating\na,b\n", "line 2: 2 fields, expected 4"),
        (
            f"source,question,answer,rating\na,{EASY[:80]},{ANSWER},1\n",
            "line 2: question: a board has 80 cells, expected 81",
        ),
        (
            f"source,question,answer,rating\na,{EASY},{ANSWER[::-1]},1\n",
            "line 2: its answer is none: row 1, column 1 is given",
        ),
    ],
)
def test_a_csv_that_is_none_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "b.csv").write_text(text)
    with pytest.raises(TextError) as caught:
        read_boards(tmp_path / "b.csv", Sudoku(9))
    assert_one_line(str(caught.value), f"{tmp_path / 'b.csv'}", said)


def test_where_boards_halt() -> None:
    score = np.array([[0.2, 0.9, 0.1], [0.6, 0.1, 0.2], [0.9, 0.1, 0.3]])
    assert halted_at(score, 0.5).tolist() == [2, 1, 3]
    assert halted_at(score, 1.0).tolist() == [3, 3, 3]
    exact = np.array([[False, False, False], [True, True, False], [True, True, True]])
    halting, full = table_of_thresholds(exact, score, (0.5, 1.0))
    assert halting == {"threshold": 0.5, "solved": 2 / 3, "mean_steps": 2.0, "false_halts": 1 / 3}
    assert (full["solved"], full["false_halts"]) == (1.0, 0.0)
