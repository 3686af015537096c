"""TRM and HRM against the numbers that their published code gave; tests/data/trm/README.md says what they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line
from paths import ROOT
from published_code import assert_close, assert_refused
from safetensors.torch import load_file, save_file
from torch import Tensor

from rmse_edge.arch.common import recursive
from rmse_edge.arch.common.recursive_model import RecursiveSolver
from rmse_edge.arch.hrm import HrmConfig
from rmse_edge.arch.trm import TrmConfig
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.errors import ConfigError
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.supervision import DeepSupervision, log_stablemax

DATA = ROOT / "tests" / "data"
MODELS = ("trm/attention", "trm/mlp", "hrm")
every = pytest.mark.parametrize("name", MODELS)


def known(name: str) -> dict[str, Tensor]:
    return load_file(DATA / name / "numbers.safetensors")


def golden(name: str, published_angles: bool = True) -> RecursiveSolver:
    """A model of the numbers. The published angles are float32 throughout and differ from ours by a rounding; a model of
    random weights makes that larger with every step."""
    model: RecursiveSolver = load_checkpoint(DATA / name)
    if published_angles and model.config.pos_encodings == "rope":
        numbers = known(name)
        model.cos, model.sin = numbers["rope_cos"][None], numbers["rope_sin"][None]
    return model


def refined(model: RecursiveSolver, numbers: dict[str, Tensor], steps: int) -> list[tuple[Tensor, Tensor]]:
    """The states after each step, each step from the published states before it: the model with an MLP of positions makes
    a rounding some 20 times as large with every step, and processors round differently."""
    x = model.embed(numbers["batch0.inputs"].long(), numbers["batch0.puzzle_identifiers"].long())
    before = [(numbers[f"act_eval.step{i}.z_H"], numbers[f"act_eval.step{i}.z_L"]) for i in range(steps - 1)]
    return [model.refine(x, *states) for states in (model.first(x), *before)]


def rounding(name: str) -> float:
    """How far one step in float32 may be from the same in other float32: the published states of the model with an MLP of
    positions are 4e-5 of the largest from what float64 gives, those of the others 3e-6."""
    return 1e-4 if name == "trm/mlp" else 1e-5


@every
@torch.no_grad()
def test_every_step_gives_the_published_states(name: str) -> None:
    model, numbers = golden(name), known(name)
    x = model.embed(numbers["batch0.inputs"].long(), numbers["batch0.puzzle_identifiers"].long())
    assert_close(x, numbers["input_embeddings"])
    for i, (z_h, z_l) in enumerate(refined(model, numbers, 3)):
        at = f"act_eval.step{i}."
        within = rounding(name)
        assert_close(z_h, numbers[f"{at}z_H"], within)
        assert_close(z_l, numbers[f"{at}z_L"], within)
        assert_close(model.head(z_h)["symbols"], numbers[f"{at}logits"], within)
        halt, go_on = model.halting(z_h)
        assert_close(halt, numbers[f"{at}q_halt_logits"], within)
        assert_close(go_on, numbers[f"{at}q_continue_logits"], within)


@torch.no_grad()
def test_our_angles_are_the_published_ones_but_for_a_rounding() -> None:
    model, numbers = golden("trm/attention", published_angles=False), known("trm/attention")
    assert_close(model.cos[0], numbers["rope_cos"], 1e-6)
    for i, (z_h, _) in enumerate(refined(model, numbers, 3)):
        assert_close(z_h, numbers[f"act_eval.step{i}.z_H"])


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (TrmConfig(), 6_828_034),
        (TrmConfig(mlp_t=True, pos_encodings="none"), 5_028_866),
        (HrmConfig(), 27_275_266),
    ],
    ids=["trm", "trm mlp", "hrm"],
)
def test_published_sizes(config: Any, count: int) -> None:
    """Without the puzzles' own vectors, of which Sudoku has one."""
    with torch.device("meta"):
        model = RecursiveSolver(config)
    found = sum(p.numel() for p in model.parameters())
    assert found == recursive.parameters(config) == count + 512
    assert (config.puzzle, config.positions) == ("sudoku", 97 if config.model_type == "trm" else 82)


def offered(numbers: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {"tokens": numbers[f"batch{i}.inputs"].long(), "targets": numbers[f"batch{i}.labels"].long()}


def training(name: str) -> DeepSupervision:
    """The objective of the published training, whose puzzles are told apart by nothing here: all are the first."""
    model = golden(name)
    recipe = Recipe(
        architecture=model.config.model_type, task={"name": "sudoku", "size": 4}, model=model.config.to_dict(),
        objective="last", gate_steps=0, exit_steps=0, depths=(1,), batch_size=3,
    )  # fmt: skip
    return DeepSupervision(model, recipe).train()


@every
def test_a_step_of_training_gives_the_published_losses_and_gradients(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three boards at a time; rows that have halted take those on offer. Published losses are sums over rows."""
    objective, numbers, within = training(name), known(name), rounding(name)
    model, ids = objective.model, torch.zeros(3, dtype=torch.int64)
    true = RecursiveSolver.embed
    monkeypatch.setattr(RecursiveSolver, "embed", lambda self, board, puzzle=None: true(self, board, ids))
    for i in range(4):
        at = f"act_train.step{i}."
        ids = torch.where(objective.halted, numbers[f"batch{i}.puzzle_identifiers"].long(), ids)
        loss, of_cells, _ = objective(offered(numbers, i), "loops")
        assert torch.equal(objective.tokens, numbers[f"{at}current_inputs"].long())
        assert torch.equal(objective.halted, numbers[f"{at}halted"])
        assert torch.equal(objective.steps, numbers[f"{at}steps"].long())
        assert_close(objective.z_h, numbers[f"{at}z_H"], 2 * within)
        assert_close(objective.z_l, numbers[f"{at}z_L"], 2 * within)
        assert_close(3 * loss.detach(), numbers[f"{at}loss"], within)
        assert_close(3 * of_cells, numbers[f"{at}lm_loss"], within)
        objective.z_h, objective.z_l = numbers[f"{at}z_H"], numbers[f"{at}z_L"]  # as in `refined`
        if i == 0:
            model.zero_grad()
            (3 * loss).backward()
            assert_close(3 * loss.detach(), numbers["grad.loss"])
            check_gradients(model, numbers)


def check_gradients(model: RecursiveSolver, numbers: dict[str, Tensor]) -> None:
    """Norms by the published names; what is several tensors here is one there."""
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    checked = 0
    for name, norm in numbers.items():
        if not name.startswith("grad_norm."):
            continue
        short = name.removeprefix("grad_norm.model.inner.")
        parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
        joined = next((j for j in parts if j in short), None)
        names = [short.replace(joined, part) for part in parts[joined]] if joined else [short]
        names = [n.replace("embedding_weight", "weight") for n in names]
        found = torch.stack([own[n].square().sum() for n in names]).sum().sqrt()
        assert_close(found, norm, 1e-4)
        checked += 1
    assert checked >= 8
    for name in ("lm_head.weight", "q_head.weight"):
        assert_close(own[name], numbers[f"grad.{name}"], 1e-4)


def test_stablemax_is_a_distribution() -> None:
    logits = torch.tensor([[-3.0, 0.0, 2.5], [1e4, -1e4, 0.0]])
    p = log_stablemax(logits).exp()
    assert p.dtype == torch.float64
    assert_close(p.sum(-1), torch.ones(2, dtype=torch.float64))
    assert_close(p[0], torch.tensor([0.25, 1.0, 3.5], dtype=torch.float64) / 4.75)


# ---------------------------------------------------------------------------------------------------------- checkpoints


@every
@pytest.mark.parametrize("start", ["", "inner.", "_orig_mod.model.inner."])
def test_a_published_checkpoint_is_read_however_it_was_wrapped(name: str, start: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DATA / name, tmp_path / "p")
    tensors = load_file(DATA / name / "model.safetensors")
    save_file({start + n.removeprefix("model.inner."): t for n, t in tensors.items()}, folder / "model.safetensors")
    found, expected = load_checkpoint(folder), golden(name, published_angles=False)
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in found.state_dict().items())
    save_checkpoint(found, tmp_path / "own")
    again = load_checkpoint(tmp_path / "own")
    assert again.config == found.config
    assert all(torch.equal(t, expected.state_dict()[n]) for n, t in again.state_dict().items())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop("model.inner.q_head.bias"), "q_head.bias is missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "tensor extra is not part of the model"),
        (lambda t: t.update({"model.inner.L_level.layers.0.self_attn.qkv_proj.weight": torch.zeros(95, 32)}), "q_proj"),
    ],
    ids=["missing", "unknown", "shape"],
)
def test_a_damaged_checkpoint_is_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    assert_refused(DATA / "trm/attention", damage, message, tmp_path / "p")


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TrmConfig, {"num_heads": 7}, "num_heads: got 7, expected a divisor of hidden_size (512)"),
        (TrmConfig, {"no_ACT_continue": False}, "no_ACT_continue: got false, expected true"),
        (TrmConfig, {"separate_H": True}, "H_layers: got 0, expected at least 1, since separate_H is on"),
        (TrmConfig, {"puzzle_emb_ndim": 0}, "puzzle_emb_len: got 16, expected 0"),
        (TrmConfig, {"puzzle": "maze"}, "puzzle: a maze of 81 cells has 6 symbols, the model 11"),
        (TrmConfig, {"puzzle": "sudoku", "seq_len": 25}, "puzzle: size: got 5, expected one of 4, 6, 9"),
        (HrmConfig, {"H_layers": 0}, "H_layers: got 0, expected at least 1"),
        (HrmConfig, {"halt_max_steps": 65}, "halt_max_steps: got 65, expected a whole number from 1 to 64"),
        (HrmConfig, {"seq_lem": 81}, "unknown key 'seq_lem'"),
    ],
)
def test_a_config_that_cannot_be_is_one_line(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind.from_dict(values)
    assert_one_line(str(caught.value), message)


def test_two_networks_and_learned_positions() -> None:
    """Neither is in the numbers: H must have weights of its own, and positions must tell cells apart."""
    config = TrmConfig(
        seq_len=16, vocab_size=6, hidden_size=32, num_heads=2, mlp_multiple=32, pos_encodings="learned",
        puzzle_emb_len=2, puzzle_emb_ndim=32, separate_H=True, H_layers=1,
    )  # fmt: skip
    assert json.loads(config.to_json())["separate_H"] and TrmConfig.from_dict(config.to_dict()) == config
    torch.manual_seed(0)
    model = RecursiveSolver(config).eval()
    assert sum(p.numel() for p in model.parameters()) == recursive.parameters(config)
    x = model.embed(torch.ones(1, 16, dtype=torch.int64))
    before = model.refine(x, *model.first(x))[0]
    assert float((before[:, 2] - before[:, 3]).abs().max()) > 1e-3
    torch.nn.init.zeros_(model.H_level.layers[0].mlp.down_proj.weight)
    assert float((before - model.refine(x, *model.first(x))[0]).abs().max()) > 1e-3
