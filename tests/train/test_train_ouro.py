"""A dense looped model trains by the same recipe, with its gate, and is written by its published names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import assert_one_line

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.cli.train import main as rmse_train

pytestmark = pytest.mark.slow

RECIPE = {
    "architecture": "ouro",
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "total_ut_steps": 3, "max_position_embeddings": 128, "rope_theta": 10000.0, "block_size": 32,
        "untrained_loops": 2,
    },
    "depths": [2, 3], "steps": 30, "warmup": 5, "gate_steps": 4, "exit_steps": 4, "eval_every": 15, "eval_blocks": 4,
    "batch_size": 4, "precision": "fp32",
}  # fmt: skip


def recipe_file(folder: Path, **changes: object) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(RECIPE | changes))
    return path


def test_all_three_stages(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat, and the dog on the log. " * 100)
    flags = ["--text", str(tmp_path / "text.txt"), "--recipe", str(recipe_file(tmp_path)), "-o", str(tmp_path / "run")]
    assert rmse_train(flags) == 0
    losses = json.loads((tmp_path / "run" / "evaluation.json").read_text())["loss_by_depth"]["float32"]
    assert len(losses) == 3
    assert losses[-1] < 2.9  # 22 different characters: 3.1 nats for who knows nothing
    model = load_checkpoint(tmp_path / "run")
    assert model.config.model_type == "ouro"
    assert float(model.model.early_exit_gate.weight.abs().max()) > 0  # it starts as zeros
    assert json.loads((tmp_path / "run" / "config.json").read_text())["architectures"] == ["OuroForCausalLM"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architecture": "gru"},
            "architecture: got 'gru', expected one of gpt, bd3lm, dory, dr_llm, hrm, hrm_text, huginn_raven, hybrid, inkling2_loop_text, ouro, qwen3_next, rmse, rodimus, trm",
        ),
        ({"depths": [2, 4]}, "depths: got [2, 4], expected loops in 1..3, the depth that is trained"),
        ({"model": RECIPE["model"] | {"block_size": None}}, "block_size: is missing, expected the number"),  # type: ignore[operator]
        ({"model": RECIPE["model"] | {"d_model": 32}}, "model: unknown key 'd_model'"),  # type: ignore[operator]
        (
            {"architecture": "gpt", "model": {}, "task": {"name": "recall"}},
            "task: got {'name': 'recall'}, expected none for architecture gpt",
        ),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(
    changes: dict[str, object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("x" * 3000)
    flags = ["--text", str(tmp_path / "text.txt"), "--recipe", str(recipe_file(tmp_path, **changes))]
    assert rmse_train([*flags, "-o", str(tmp_path / "run")]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()
