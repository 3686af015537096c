"""rmse-train on models that write by blocks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line

from rmse_edge.arch.bd3lm.config import Bd3lmConfig
from rmse_edge.arch.bd3lm.model import Bd3lm
from rmse_edge.cli.run import main as rmse_run
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.train.diffusion import BlockDiffusion, bounds, evaluate_bound, masks
from rmse_edge.train.noise import SCHEDULES, times
from rmse_edge.train.recipe import Recipe

RECIPE = {
    "architecture": "bd3lm",
    "model": {"block_size": 4, "model_length": 16, "hidden_dim": 32, "n_blocks": 1, "n_heads": 2, "dropout": 0.0},
    "objective": "last", "gate_steps": 0, "exit_steps": 0, "steps": 60, "batch_size": 16, "warmup": 5, "lr": 1e-2,
    "eval_every": 30, "eval_blocks": 8, "precision": "fp32", "dtype": "float32", "ema": 0.9,
}  # fmt: skip
WORDS = ("ab", "cde", "fghi")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words of which every letter but the first is known from the one before it."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "words.txt"
    file.write_text("".join(draw.choice(WORDS) for _ in range(2000)))
    return file


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    (recipe := folder / "r.json").write_text(json.dumps(RECIPE))
    assert rmse_train(["--text", str(text), "--recipe", str(recipe), "-o", str(folder / "out"), "--threads", "1"]) == 0
    return folder / "out"


def test_a_text_is_learned_by_blocks(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((trained / "config.json").read_text())
    assert config["vocab_size"] == 9 + 1  # and the mask
    evaluation = json.loads((trained / "evaluation.json").read_text())
    (bound,) = evaluation["loss_by_depth"]["float32"]
    # A third of the words each, of 3 letters on average: ln 3 a word. Untrained it is ln 9 = 2.2 a letter.
    assert np.log(3) / 3 < bound < 1.7
    assert rmse_run([str(trained), "-p", "abfghicde", "-n", "7", "--exit-threshold", "0.9", "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["text"]) == 7 and set(document["text"]) <= set("".join(WORDS))


def test_the_bound_is_the_same_again(trained: Path) -> None:
    from rmse_edge.checkpoint import load_checkpoint

    model = load_checkpoint(trained)
    tokens = torch.randint(0, 9, (5, 17), generator=torch.Generator().manual_seed(0))
    assert evaluate_bound(model, tokens) == evaluate_bound(model, tokens)
    many = float(bounds(model, tokens[:, :16], draws=64).mean())
    assert float(bounds(model, tokens[:, :16], draws=8).mean()) == pytest.approx(many, rel=0.1)


@pytest.mark.parametrize("noise", SCHEDULES)
def test_every_schedule_estimates_the_same_bound(noise: str) -> None:
    torch.manual_seed(1)
    numbers = {"model_length": 8, "hidden_dim": 16, "n_blocks": 1, "n_heads": 2, "dropout": 0.0}
    model = Bd3lm(Bd3lmConfig(9, 4, noise=noise, sampling_eps_min=1e-4, **numbers)).eval()
    tokens = torch.randint(0, 8, (1, 8)).expand(3000, 8)
    objective = BlockDiffusion(model, Recipe.from_dict(RECIPE))
    with torch.no_grad():
        found = float(objective({"tokens": tokens}, "loops")[0])
    assert found == pytest.approx(float(bounds(model, tokens[:500], 12).mean()), rel=0.06)


def test_masks_are_as_many_as_the_times_say() -> None:
    generator = torch.Generator().manual_seed(0)
    t = times(torch.rand(200, 4, generator=generator), 0.3, 0.8)
    assert float(t.min()) >= 0.3 and float(t.max()) <= 0.8 and float(t.mean()) == pytest.approx(0.55, abs=1e-3)
    masked = masks(torch.rand(200, 16, generator=generator), t.repeat_interleave(4, 1))
    assert not masked[:, 0].any() and float(masked[:, 1:].float().mean()) == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            ["block_size=6"],
            r"block_size: got 6, expected a multiple of the model's block_size (4), at most its model_length",
        ),
        (["block_size=32"], "block_size: got 32, expected a multiple"),
        (["objective=expected"], "objective: got 'expected', expected 'last'"),
        (["gate_steps=3"], "gate_steps: got 3, expected 0"),
        (["model.noise=linear"], "noise: got 'linear', expected"),
        (["model.sampling_eps_min=0.9", "model.sampling_eps_max=0.5"], "sampling_eps_min: got 0.9, expected at most"),
        (['task={"name": "recall"}'], "task: got {'name': 'recall'}, expected none for architecture bd3lm"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(
    changes: list[str], said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (recipe := tmp_path / "r.json").write_text(json.dumps(RECIPE))
    flags = [word for change in changes for word in ("--set", change)]
    assert rmse_train(["--text", str(text), "--recipe", str(recipe), "-o", str(tmp_path / "out"), *flags]) == 2
    assert_one_line(capsys.readouterr().err, said)


def test_it_has_no_gate_to_train(trained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--text", str(text), "--init", str(trained), "--stage", "gate", "-o", str(tmp_path / "out")]
    assert rmse_train(flags) == 2
    assert_one_line(capsys.readouterr().err, "bd3lm has no exit gate")
