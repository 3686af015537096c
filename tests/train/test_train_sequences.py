"""Tasks to compare mixers: what their examples promise, what is measured on them, and training on one from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import assert_one_line
from paths import ROOT

from rmse_edge.arch.hybrid.config import HybridConfig
from rmse_edge.arch.trm import TrmConfig
from rmse_edge.cli.train import main
from rmse_edge.errors import ConfigError
from rmse_edge.train.mqar import Mqar
from rmse_edge.train.needle import MARK, Needle
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import IGNORED
from rmse_edge.train.tasks import make_task
from rmse_edge.train.tracking import ModularAddition, Parity

pytestmark = pytest.mark.slow


def test_every_query_of_mqar_asks_for_a_pair_of_its_sequence() -> None:
    task = Mqar(tokens=64, train=((48, 5),), test=((64, 16),))
    batch = task.batch(300, (1, 2))
    gaps = []
    for tokens, targets in zip(batch["tokens"].numpy(), batch["targets"].numpy()):
        pairs = dict(zip(tokens[0:10:2], tokens[1:10:2]))
        assert len(pairs) == len(set(pairs.values())) == 5 and all(0 < k < 32 <= v < 64 for k, v in pairs.items())
        asked = np.flatnonzero(targets != IGNORED)
        assert sorted(tokens[asked]) == sorted(pairs) and [pairs[tokens[i]] for i in asked] == targets[asked].tolist()
        gaps += list(asked - 10)
    assert batch["tokens"].shape == (300, 48) and {gap % 2 for gap in gaps} == {0} and max(gaps) == 36
    # Five of nineteen places by weights 1 / g: nearly every first place is taken, and few of the last.
    near, far = gaps.count(0) / 300, gaps.count(36) / 300
    assert near > 0.8 and far < 0.25
    even = Mqar(tokens=64, train=((48, 5),), test=((64, 16),), power=1.0).batch(300, (1, 2))["targets"]
    assert 0.15 < float((even[:, 10] != IGNORED).float().mean()) < 0.4
    assert torch.equal(task.batch(300, (1, 2))["tokens"], batch["tokens"])
    assert not torch.equal(task.batch(300, (1, 3))["tokens"], batch["tokens"])


def test_what_is_tracked_is_the_sum_until_there() -> None:
    batch = ModularAddition(modulus=7, train=20).batch(6, (3,))
    for tokens, targets in zip(batch["tokens"].tolist(), batch["targets"].tolist()):
        assert [sum(tokens[: i + 1]) % 7 for i in range(len(tokens))] == targets
    lengths = {Parity().batch(1, (seed,))["tokens"].shape[1] for seed in range(200)}
    assert min(lengths) >= 3 and max(lengths) == 40 and Parity().vocab_size == 2


def test_a_needle_lies_where_it_is_put_and_is_asked_for_behind() -> None:
    task = Needle(values=8, hay=8, questions=3)
    for depth, at in ((0.0, 0), (0.5, 48), (1.0, 97), (None, None)):
        batch = task.draw(np.random.default_rng(4), 50, 100, depth)
        for tokens, targets in zip(batch["tokens"].numpy(), batch["targets"].numpy()):
            marks, asked = np.flatnonzero(tokens == MARK), np.flatnonzero(targets != IGNORED)
            assert (marks[1:] == asked).all() and asked[-1] == 99 and at in (None, marks[0])
            assert set(targets[asked]) == {tokens[marks[0] + 1]} <= set(range(1, 9))
            rest = np.setdiff1d(np.arange(100), [*marks, marks[0] + 1])
            assert (tokens[rest] > 8).all() and (depth is None or len(asked) == 1)
    assert len({int((row != IGNORED).sum()) for row in batch["targets"]}) == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "mqar", "train": [[63, 4]]}, "task mqar: train: got ((63, 4),), expected even numbers of positions"),
        (
            {"name": "mqar", "test": [[64, 17]]},
            "task mqar: test: got ((64, 17),), expected even numbers of positions, at",
        ),
        ({"name": "mqar", "tokens": 100}, "task mqar: tokens: got 100, expected at least 130, of which half are keys"),
        ({"name": "mqar", "train": []}, "task mqar: train: got [], expected a list of [positions, pairs]"),
        ({"name": "parity", "modulus": 3}, "task parity: modulus: got 3, expected 2"),
        ({"name": "parity", "test": [64, 40]}, "task parity: test: got (64, 40), expected lengths that rise"),
        ({"name": "needle", "test": [9]}, "task needle: test: got (9,), expected lengths of at least 16"),
        ({"name": "needle", "values": 900}, "model.vocab_size: got 600, the task needle needs 965"),
        ({"name": "needle"}, "model.max_position_embeddings: got 1000, the task needle needs at least 1024"),
        ({"name": "recall"}, "architecture: got 'hybrid', the task recall needs rmse"),
    ],
)
def test_what_does_not_go_together_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        make_task(options, HybridConfig(vocab_size=600, max_position_embeddings=1000))
    assert_one_line(str(error.value), said)
    with pytest.raises(ConfigError, match="the task parity needs a model of texts"):
        make_task({"name": "parity"}, TrmConfig())


@pytest.mark.parametrize("path", sorted((ROOT / "docs/experiments/hybrid").glob("*.json")), ids=lambda path: path.stem)
def test_the_recipes_of_hybrids_are_ones(path: Path) -> None:
    recipe = Recipe.from_file(path)
    assert recipe.architecture == "hybrid" and (recipe.task is None) == (path.stem == "recipe")
    if recipe.task is not None:
        make_task(recipe.task, recipe.model_config())


def test_a_model_learns_what_a_task_asks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By a recipe, which needs no length of its sequences; measured on longer ones, and drawn."""
    recipe = Recipe(
        architecture="hybrid",
        model={
            "vocab_size": 2, "d_model": 32, "layers": ["gated_deltanet"], "intermediate_size": 32, "exit_rules": [],
            "deltanet_key_heads": 1, "deltanet_value_heads": 1, "deltanet_key_dim": 16, "deltanet_value_dim": 16,
        },
        task={"name": "parity", "train": 4, "test": [2, 8], "count": 32},
        objective="last", depths=(1,), steps=60, gate_steps=0, exit_steps=0, lr=1e-2, warmup=5, batch_size=32,
        eval_every=30, eval_blocks=16, precision="fp32", dtype="float32",
    )  # fmt: skip
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    assert main(["--recipe", str(tmp_path / "recipe.json"), "-o", str(tmp_path / "run")]) == 0
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert json.loads(capsys.readouterr().out) == result and (tmp_path / "run" / "parity.png").is_file()
    short, long = result["lengths"]
    assert (short["from"], short["to"], long["from"], long["to"]) == (1, 2, 3, 8) and result["chance"] == 0.5
    assert short["right"] > 0.9 and short["scaled"] == pytest.approx(2 * short["right"] - 1)
