"""Models of recurrent depth train without a gate, at the depth of the step, and get one afterwards with all else frozen."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import small_dory, small_hrm_text, small_huginn, small_hybrid, small_inkling
from helpers import assert_one_line, random_tokens
from safetensors.torch import load_file
from small_models import text_source
from torch import Tensor

from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.reading import stop_of
from rmse_edge.loop.whole import in_one_call
from rmse_edge.losses import token_loss
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.trainer import Trainer

pytestmark = pytest.mark.slow

DORY = {
    "architecture": "dory",
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1,
        "n_recurrent_loops": 3, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 16,
        "max_position_embeddings": 128, "initializer_range": 0.1, "exit_rules": ["delta"],
    },
    "block_size": 32, "objective": "last", "depths": [1, 2, 3], "steps": 40, "gate_steps": 0, "exit_steps": 0, "lr": 0.01,
    "warmup": 5, "eval_every": 20, "eval_blocks": 4, "batch_size": 4, "precision": "fp32",
}  # fmt: skip
HUGINN = DORY | {
    "architecture": "huginn_raven",
    "model": {
        "n_embd": 32, "n_heads": 2, "intermediate_size": 64, "n_layers_in_prelude": 1, "n_layers_in_recurrent_block": 1,
        "n_layers_in_coda": 1, "mean_recurrence": 3, "block_size": 128, "exit_rules": ["delta"],
    },
}  # fmt: skip

HRM_TEXT = DORY | {
    "architecture": "hrm_text",
    "model": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16,
        "H_cycles": 3, "L_cycles": 1, "max_position_embeddings": 128, "exit_rules": ["delta"],
    },
}  # fmt: skip

INKLING = DORY | {
    "architecture": "inkling2_loop_text",
    "model": {
        "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": 1, "swa_head_dim": 16, "sliding_window_size": 16, "d_rel": 4,
        "rel_extent": 24, "layer_types": ["hybrid_sliding", "hybrid_sliding", "hybrid", "hybrid"], "moe_intermediate_size": 32,
        "n_routed_experts": 6, "num_experts_per_tok": 2, "route_scale": 2.0, "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1, "loop_layer_index_end": 3, "loop_num_passes": 3, "loop_gate_rank": 8,
        "max_position_embeddings": 128, "eos_token_id": None, "exit_rules": ["delta"],
    },
}  # fmt: skip
HYBRID = DORY | {
    "architecture": "hybrid",
    "model": {
        "d_model": 32, "layers": ["gated_attention", "atlas", "mamba3"], "think": [1, 3], "think_loops": 3, "n_heads": 2,
        "n_kv_heads": 1, "head_dim": 16, "rotary_dims": 4, "window": 16, "mamba_heads": 2, "mamba_head_dim": 16,
        "mamba_state_dim": 16, "mamba_angles": 4, "atlas_heads": 2, "atlas_head_dim": 8, "atlas_hidden": 8,
        "atlas_segment": 16, "n_experts": 6, "top_k": 2, "expert_width": 32, "shared_width": 32, "exit_rules": ["delta"],
    },
}  # fmt: skip
ALL = (small_dory, small_huginn, small_hrm_text, small_inkling, small_hybrid)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat, and the dog on the log. " * 100)
    return path


def recipe_file(folder: Path, recipe: dict[str, Any], **changes: object) -> Path:
    path = folder / "recipe.json"
    path.write_text(json.dumps(recipe | changes))
    return path


@pytest.mark.parametrize(("build", "change"), [*zip(ALL, (0.3, 0.75, 0.4, 0.95, 0.5))])
@pytest.mark.parametrize("rule", ["", "exit_epsilon", "exit_threshold"])
def test_a_trajectory_says_what_the_model_says_of_a_text(build: Any, change: float, rule: str) -> None:
    model, tokens = build().eval(), torch.from_numpy(random_tokens(80))
    values = {"exit_epsilon": change, "exit_threshold": 0.6}
    dials = Dials(model.config.max_loops, **({rule: values[rule]} if rule else {}))
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    expected = model.whole_text(tokens, scalars)
    with torch.no_grad():
        states, gates, depth = model.trajectory(
            tokens[None], dials.max_loops, stop_of(dials, lambda h: h), every=not dials.exits
        )
        logits = model.read_out(states[-1])[0]
    assert len(states) == (1 if dials.exits else dials.max_loops) and gates.shape == (dials.max_loops, 1, 80)
    assert torch.equal(depth[0], expected.depth)
    assert (len(set(depth[0].tolist())) > 1) == dials.exits
    np.testing.assert_allclose(states[-1][0, :, -model.width :], expected.h, atol=2e-5)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("build", ALL)
def test_gradients_are_those_of_the_whole_forward_pass(build: Any) -> None:
    """Of the calls that hosts make: `whole_text` is made of these, but for its `no_grad`."""
    model, tokens = build(), torch.from_numpy(random_tokens(49))
    dials = Dials(model.config.trained_loops)
    scalars = {name: torch.from_numpy(value) for name, value in dials.arrays().items()}
    told = getattr(model, "told", getattr(model, "angles_of", lambda count: {}))
    context = told(48) | {"prefix": torch.tensor([0])}  # which those that have none do not read

    def of_trajectory() -> Tensor:
        states, _, _ = model.eval().trajectory(tokens[None, :-1], every=False)
        return token_loss(model.read_out(states[-1])[0], tokens[1:]).mean()

    def of_calls() -> Tensor:
        return token_loss(in_one_call.__wrapped__(model, tokens[:-1], context, scalars).logits, tokens[1:]).mean()

    found = []
    for loss in (of_trajectory, of_calls):
        model.zero_grad()
        loss().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if not name.startswith("exit_gate.")})
    for name, gradient in found[1].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("build", ALL)
def test_a_gate_begins_alike_in_every_loop(build: Any) -> None:
    model = type(build())(build().config)
    share = torch.sigmoid(model.gate(torch.zeros(1, 5, model.width), torch.randn(1, 5, model.width)))
    torch.testing.assert_close(share, torch.full((1, 5), 1 / model.config.trained_loops))


@pytest.mark.parametrize(
    "recipe", [DORY, HUGINN, HRM_TEXT, INKLING, HYBRID], ids=["dory", "huginn", "hrm_text", "inkling", "hybrid"]
)
def test_trained_without_a_gate_which_comes_last(recipe: dict[str, Any], text: Path, tmp_path: Path) -> None:
    flags = ["--text", str(text), "--recipe", str(recipe_file(tmp_path, recipe)), "-o", str(tmp_path / "run")]
    assert rmse_train(flags) == 0
    losses = json.loads((tmp_path / "run" / "evaluation.json").read_text())["loss_by_depth"]["float32"]
    assert len(losses) == 3 and losses[-1] < 2.6  # 22 different characters: 3.1 nats for who knows nothing
    assert not load_checkpoint(tmp_path / "run").config.gated

    flags = ["--text", str(text), "--stage", "gate", "--init", str(tmp_path / "run"), "-o", str(tmp_path / "gated")]
    assert rmse_train([*flags, "--set", "gate_steps=8", "--set", "block_size=64", "--set", "eval_blocks=2"]) == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "gated"))
    assert set(after) - set(before) == {"exit_gate.weight", "exit_gate.bias"}
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["exit_gate.weight"].abs().max() > 0  # it starts as zeros
    model = load_checkpoint(tmp_path / "gated")
    assert model.config.exit_rules == ("delta", "gate") and model.config.exit_threshold == 1


def test_the_gate_of_a_checkpoint_in_float32_leaves_it_as_exact(text: Path, tmp_path: Path) -> None:
    """And one whose vocabulary is padded is trained on."""
    model = small_dory()
    save_checkpoint(model, tmp_path / "start", dtype=torch.float32)
    flags = ["--text", str(text), "--stage", "gate", "--init", str(tmp_path / "start"), "-o", str(tmp_path / "gated")]
    assert rmse_train([*flags, "--set", "gate_steps=2", "--set", "block_size=64", "--stop-at", "1"]) == 0
    assert rmse_train([*flags[:2], *flags[-2:], "--resume"]) == 0
    assert list(json.loads((tmp_path / "gated" / "evaluation.json").read_text())["loss_by_depth"]) == ["float32"]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "gated"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"exit_gate.weight", "exit_gate.bias"}


def test_experts_of_every_layer_are_balanced(tmp_path: Path) -> None:
    """By what all loops of a step have sent them. The bias only chooses, and is kept with the weights."""
    recipe = Recipe.from_dict(INKLING | {"model": INKLING["model"] | {"vocab_size": 37}, "balance_rate": 0.25})
    trainer = Trainer(recipe, text_source(random_tokens(2000, vocab=37), 32), tmp_path)
    layers = [module for module in trainer.model.modules() if isinstance(module, SparseExperts)]
    loads = []
    for layer in layers:  # the first expert is chosen by all
        layer.balance_bias[0] = 1.0
    balance = trainer.balance
    trainer.balance = lambda stage: loads.extend(layer.load.clone() for layer in layers) or balance(stage)  # type: ignore[func-returns-value]
    row = trainer.train_step()
    assert len(layers) == 4 and 0 <= row["idle_experts"] < 1
    for i, (layer, load) in enumerate(zip(layers, loads)):
        looped = recipe.model["loop_layer_index_start"] <= i < recipe.model["loop_layer_index_end"]
        assert load.sum() == 4 * 32 * 2 * (row["loops"] if looped else 1)  # sequences, positions, experts of a position
        assert load[0] > load.mean() and float(layer.balance_bias[0]) == 0.75
        assert torch.equal(layer.balance_bias[1:], 0.25 * torch.sign(load.mean() - load[1:]))
        assert not layer.load.any()
    assert trainer.balance("gate") is None


def test_where_the_processor_has_bfloat16_it_is_used() -> None:
    """Experts are given rows of that type there, and have float32 weights."""
    model, tokens = small_inkling(), torch.from_numpy(random_tokens(65))[None]
    losses = []
    for autocast in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        model.zero_grad()
        with autocast:
            states, _, _ = model.trajectory(tokens[:, :-1], every=False)
            loss = token_loss(model.read_out(states[-1]), tokens[:, 1:]).mean()
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if not n.startswith("exit_gate."))
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.03)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "expected"}, "objective: got 'expected', expected 'last': the model has no exit gate"),
        ({"gate_steps": 3}, "gate_steps: got 3, expected 0: the model has no exit gate"),
        ({"exit_steps": 3}, "exit_steps: got 3, expected 0: the model has no exit gate"),
        ({"steps": 0}, "steps: got 0, expected at least 1"),
        ({"block_size": None}, "block_size: is missing"),
        ({"depths": [4]}, "depths: got [4], expected loops in 1..3"),
    ],
)
def test_a_recipe_that_does_not_fit_is_one_line(
    changes: dict[str, object], message: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", str(text), "--recipe", str(recipe_file(tmp_path, DORY, **changes)), "-o", str(tmp_path / "run")]
    assert rmse_train(flags) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


def test_what_trains_a_gate_needs_a_checkpoint(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--text", str(text), "-o", str(tmp_path / "run"), "--stage", "gate"]
    recipe, start = recipe_file(tmp_path, DORY), tmp_path / "start"
    save_checkpoint(small_dory(), start)
    for more, message in (
        ([], "--stage gate: missing --init DIR"),
        (["--init", str(start), "--recipe", str(recipe)], "--recipe: --stage gate makes its own"),
        (["--init", str(start), "--set", "gate_steps=0"], "steps: got 0, expected at least 1"),
    ):
        assert rmse_train([*flags, *more]) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()
