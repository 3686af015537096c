"""Training solvers of boards by the general trainer: an objective that carries what it found, resumed exactly."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.data import main as rmse_data
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.errors import ConfigError, UserError
from rmse_edge.puzzles.sudoku import Sudoku
from rmse_edge.train.boards import SudokuTask
from rmse_edge.train.optimizer import AdamAtan2
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.session import train_task
from rmse_edge.train.supervision import DeepSupervision
from rmse_edge.train.trainer import Trainer, build_model

pytestmark = pytest.mark.slow

TASK = {"name": "sudoku", "size": 4, "train": 24, "held_out": 4, "test": 8}
MODEL = {
    "seq_len": 16, "vocab_size": 6, "puzzle": "sudoku", "hidden_size": 16, "num_heads": 2, "mlp_multiple": 16,
    "mlp_t": True, "pos_encodings": "none", "H_cycles": 1, "L_cycles": 1, "puzzle_emb_ndim": 16, "puzzle_emb_len": 1,
    "halt_max_steps": 3,
}  # fmt: skip


def recipe(architecture: str = "trm", **changes: Any) -> Recipe:
    model = MODEL | {"H_layers": 1, "L_layers": 1} | changes.pop("model", {})
    values: dict[str, Any] = {
        "architecture": architecture, "task": TASK, "model": model, "objective": "last", "gate_steps": 0,
        "exit_steps": 0, "depths": [1], "steps": 8, "batch_size": 8, "warmup": 2, "eval_every": 4, "eval_blocks": 4,
        "precision": "fp32", "dtype": "float32",
    }  # fmt: skip
    return Recipe.from_dict(values | changes)


@pytest.mark.parametrize("architecture", ["trm", "hrm"])
def test_a_resumed_run_is_the_run_that_never_stopped(architecture: str, tmp_path: Path) -> None:
    """What rows carry from step to step, exploration and the optimiser included."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    own = recipe(architecture, optimizer="adam_atan2" if architecture == "trm" else "adamw")
    found = train_task(whole, own)
    assert train_task(cut, own, stop_at=5) is None
    again = train_task(cut, own, resume=True)
    assert found == again and found is not None
    a, b = load_checkpoint(whole).state_dict(), load_checkpoint(cut).state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [len(found[name]) for name in ("by_depth", "by_threshold")] == [3, 8]
    assert {p.name for p in whole.iterdir()} >= {"curve.png", "sudoku.png", "log.csv", "recipe.json", "config.json"}
    assert not (whole / "tokenizer.json").exists()


def test_boards_of_files_are_drawn(tmp_path: Path) -> None:
    """As of a published set, which has millions; what may be a form of a training board is left out of the test."""
    assert rmse_data(["sudoku", "--size", "4", "--count", "40", "--test", "10", "-o", str(tmp_path / "d")]) == 0
    lines = {name: (tmp_path / "d" / name).read_text().splitlines() for name in ("train.csv", "test.csv")}
    task = SudokuTask(size=4, train=24, held_out=4, test=8, data=str(tmp_path / "d"))
    assert (len(task.boards), len(task.held), len(task.tested), task.alike) == (20, 4, 8, 0)
    (tmp_path / "d" / "test.csv").write_text("\n".join([*lines["test.csv"], *lines["train.csv"][1:]]))
    task = SudokuTask(size=4, train=40, held_out=4, test=50, data=str(tmp_path / "d"))
    assert (len(task.tested), task.alike) == (10, 40)
    (tmp_path / "d" / "test.csv").write_text("\n".join(lines["train.csv"]))
    with pytest.raises(ConfigError, match=r"^data: every test board of .* is a symmetric form of a training board$"):
        SudokuTask(size=4, train=40, held_out=4, test=50, data=str(tmp_path / "d"))


def test_a_lone_recipe_is_welcome_where_it_is_the_same(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text(recipe(steps=1).to_json())
    with pytest.raises(UserError, match=r"recipe\.json: is another recipe"):
        train_task(tmp_path, recipe(steps=2))
    assert train_task(tmp_path, recipe(steps=1)) is not None


def test_rows_keep_their_boards_until_they_halt() -> None:
    own = recipe(model={"halt_exploration_prob": 0.0})
    task = SudokuTask(**{k: v for k, v in TASK.items() if k != "name"})
    objective = DeepSupervision(build_model(own), own).train()  # its halting head says no by itself
    worked, steps = [], []
    for i in range(7):
        objective(task.batch(8, (0, i)), "loops")
        worked.append(objective.tokens.clone())
        steps.append(objective.steps.tolist())
    assert steps == [[1 + i % 3] * 8 for i in range(7)]
    same = [torch.equal(a, b) for a, b in itertools.pairwise(worked)]
    assert same == [True, True, False, True, True, False]
    before = {name: t.clone() for name, t in objective.named_buffers()}
    losses, _, _ = objective(task.validation(4), "validate")
    assert losses.shape == (3,)
    assert all(torch.equal(t, before[name]) for name, t in objective.named_buffers())


def test_exploration_makes_boards_wait() -> None:
    """Boards that would halt at once go on where they explore, to 2 steps at least."""
    torch.manual_seed(0)
    own = recipe(model={"halt_exploration_prob": 0.5, "halt_max_steps": 6}, batch_size=64)
    model = build_model(own)
    torch.nn.init.constant_(model.q_head.bias, 5.0)
    task = SudokuTask(**{k: v for k, v in TASK.items() if k != "name"})
    objective = DeepSupervision(model, own).train()
    objective(task.batch(64, (0, 0)), "loops")
    assert 16 < int((~objective.halted).sum()) < 48


@pytest.mark.parametrize("gradient", ["cycle", "step", "full"])
def test_gradients_go_through_the_calls_that_are_asked_for(gradient: str) -> None:
    """Counted: 2 cycles of 2 calls of L and 1 of H. "cycle": 3 calls; "step": the last of L and of H; "full": all 6."""
    own = recipe("hrm", model={"H_cycles": 2, "L_cycles": 2, "gradient": gradient})
    model = build_model(own).train()
    calls: list[bool] = []
    for level in (model.L_level, model.H_level):
        level.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    x = model.embed(torch.ones(1, 16, dtype=torch.int64))
    model.refine(x, *model.first(x))
    assert calls == {
        "cycle": [False, False, False, True, True, True],
        "step": [False, False, False, False, True, True],
        "full": [True] * 6,
    }[gradient]  # fmt: skip


def test_adam_atan2_is_adamw_without_its_epsilon() -> None:
    """Small angles: atan2(m, sqrt(v)) is m / sqrt(v) where that is small, and bounded where AdamW's is not."""
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours = AdamAtan2([first], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5)
    theirs = torch.optim.AdamW([second], lr=0.1, betas=(0.9, 0.99), weight_decay=0.5, eps=0.0)
    for gradients in (torch.tensor([1.0, -1e-12, 3.0]), torch.tensor([-0.9, 1e-12, -2.8])):
        for p, optimizer in ((first, ours), (second, theirs)):
            p.grad = gradients.clone()
            before = p.detach().clone()
            optimizer.step()
            if optimizer is ours:
                moved = p.detach() - before * (1 - 0.05)
            else:
                ratio = (p.detach() - before * (1 - 0.05)) / -0.1
        assert torch.allclose(moved, -0.1 * torch.atan(ratio), atol=1e-6)
        second.data.copy_(first.data)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": None}, "task: is missing, expected one of boards (sudoku or maze) for architecture trm"),
        ({"accumulate": 2}, "accumulate: got 2, expected 1: rows keep their boards from step to step"),
        ({"objective": "expected"}, "objective: got 'expected', expected 'last'"),
    ],
)
def test_a_recipe_that_cannot_be_is_one_line(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(**changes)
    assert_one_line(str(caught.value), said)


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"size": 6}, "model.seq_len: got 16, the task sudoku needs 36"),
        ({"size": 5}, "task sudoku: size: got 5, expected one of 4, 6, 9"),
        ({"held_out": 24}, "task sudoku: held_out: got 24, expected fewer than the 24 training boards"),
        ({"name": "maze", "size": 9, "train": 6, "test": 1}, "model.seq_len: got 16, the task maze needs 81"),
        ({"name": "recall", "size": None}, "task recall: unknown key 'held_out'; known keys are "),
        ({"bards": 3}, "task sudoku: unknown key 'bards'; known keys are augment, data, held_out, "),
        (
            {"name": "maze", "size": 7, "test": 1},
            "task maze: train: 24 boards that differ by more than a symmetry were not found, only ",
        ),
        ({"data": "nowhere"}, "nowhere/train.csv: no such file"),
    ],
)
def test_a_task_that_does_not_fit_is_one_line(
    task: dict[str, Any], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(json.loads(recipe().to_json()) | {"task": TASK | task}))
    assert rmse_train(["--recipe", str(tmp_path / "r.json"), "-o", str(tmp_path / "run")]) == 2
    assert_one_line(capsys.readouterr().err, said)
    assert not (tmp_path / "run").exists()


def test_boards_are_made_and_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["sudoku", "--size", "4", "--count", "20", "--test", "6", "--seed", "3", "-o", str(tmp_path / "d")]
    assert rmse_data(made) == 0 and "20 boards" in capsys.readouterr().out
    assert rmse_data(made) == 2
    assert_one_line(capsys.readouterr().err, "train.csv: is there already; choose another folder")
    assert rmse_data(["shakespeare", "--count", "3"]) == 2
    assert_one_line(capsys.readouterr().err, "--count: is of boards; shakespeare is a text")
    own = recipe(task=TASK | {"data": str(tmp_path / "d")}, steps=1)
    task = SudokuTask(**{k: v for k, v in own.task.items() if k != "name"})  # type: ignore[union-attr]
    assert (len(task.boards), len(task.held), len(task.tested)) == (16, 4, 6)
    trainer = Trainer(own, task, tmp_path)
    row = trainer.train_step()
    assert math.isfinite(row["loss"]) and row["tokens"] == 8 * 16
    assert {g["lr_scale"] for g in trainer.optimizer.param_groups} == {1.0}
    task.puzzle_lr_scale = 100.0
    scales = {g["lr_scale"]: len(g["params"]) for g in trainer.new_optimizer().param_groups}
    assert scales[100.0] == 1
    batch = task.batch(5, (1,))
    assert all(Sudoku(4).broken(g, a) is None for g, a in zip(batch["tokens"].numpy(), batch["targets"].numpy()))
    assert not np.array_equal(batch["tokens"], task.batch(5, (2,))["tokens"])
