"""Routers: labels by search, training, the verb. 20 s of one core, most of it for the verb."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line
from safetensors.torch import load_file, save_file

from rmse_edge.arch.dr_llm.config import DrLlmConfig
from rmse_edge.arch.dr_llm.model import DrLlm
from rmse_edge.checkpoint import load_checkpoint, save_checkpoint
from rmse_edge.cli.train import main as rmse_train
from rmse_edge.loop.dials import Dials
from rmse_edge.loop.plan import plan_of
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.text import train_character_tokenizer
from rmse_edge.train.plans import best_plans, loss_of_plans, read_by_routers, routed
from rmse_edge.train.routing import RouterRecipe, class_weights, focal_loss, learn

PROMPT = 10
TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 60


def make(vocab: int = 20, layers: int = 3) -> DrLlm:
    torch.manual_seed(1)
    config = DrLlmConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, rope_theta=10000.0, tie_word_embeddings=False, router_hidden=8,
        num_windows=4, routed_positions=32,
    )  # fmt: skip
    model = DrLlm(config).eval().requires_grad_(False)
    model.lm_head.weight *= 4.0
    return model


def prompts(count: int, vocab: int = 20, length: int = 16) -> torch.Tensor:
    return torch.randint(vocab, (count, length), generator=torch.Generator().manual_seed(2))


def every_plan(model: DrLlm, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All plans (P, L), and the loss of each prompt by each (P, B)."""
    plans = torch.tensor(list(itertools.product(range(3), repeat=model.config.num_hidden_layers)))
    return plans, torch.stack([loss_of_plans(model, tokens, PROMPT, plan.expand(len(tokens), -1)) for plan in plans])


@pytest.mark.parametrize("price", [0.0, 0.05, 10.0])
def test_all_plans_are_tried(price: float) -> None:
    model, tokens = make(), prompts(5)
    plans, losses = every_plan(model, tokens)
    best = (losses + price * plans.sum(1)[:, None]).argmin(0)
    found = best_plans(model, tokens, PROMPT, price, width=None)
    assert torch.equal(found.counts, plans[best])
    torch.testing.assert_close(found.loss, losses[best, torch.arange(5)])
    torch.testing.assert_close(found.once, losses[plans.tolist().index([1, 1, 1])])
    wide = best_plans(model, tokens, PROMPT, price, width=27)
    assert torch.equal(wide.counts, found.counts)
    narrow = best_plans(model, tokens, PROMPT, price, width=2)
    values = [f.loss + price * f.counts.sum(1) for f in (narrow, found)]
    assert (values[0] >= values[1] - 1e-6).all() and (values[0] <= found.once + 3 * price + 1e-6).all()
    assert price < 10 or not found.counts.any()


def test_one_plan_may_be_for_all() -> None:
    model, tokens = make(), prompts(6)
    plans, losses = every_plan(model, tokens)
    best = plans[(losses.mean(1) + 0.02 * plans.sum(1)).argmin()]
    found = best_plans(model, tokens, PROMPT, 0.02, width=None, pooled=True)
    assert torch.equal(found.counts, best.expand(6, -1))


def test_losses_of_plans_are_those_of_the_model() -> None:
    """And what routers read along a plan is what they decide by: as the host runs it."""
    model, tokens = make(), prompts(4)
    with torch.no_grad():
        for router in model.model.routers:
            router.linear2.weight.normal_(std=2.0)
            router.linear2.bias.zero_()
    counts = routed(model, tokens, PROMPT, -0.5)
    assert len({tuple(row) for row in counts.tolist()}) > 1
    losses = loss_of_plans(model, tokens, PROMPT, counts)
    read = read_by_routers(model, tokens, PROMPT, counts)
    for row, text in enumerate(tokens):
        runtime = TorchRuntime(model, "planned")
        fed = runtime.feed(text.numpy(), Dials(6, route=-0.5), prompt=PROMPT)
        assert plan_of(runtime.state["past_plan"]) == [i for i, n in enumerate(counts[row].tolist()) for _ in range(n)]
        of_text = torch.nn.functional.cross_entropy(torch.from_numpy(fed.logits[PROMPT - 1 : -1]), text[PROMPT:])
        torch.testing.assert_close(losses[row], of_text, rtol=1e-4, atol=1e-5)
        said = [model.model.routers[i](read[row, i]).mean(0).argmax().item() for i in range(3)]
        assert said == counts[row].tolist()


def test_the_loss_is_the_focal_one_with_balanced_classes() -> None:
    labels = torch.tensor([[1, 1, 1, 0], [1, 1, 2, 0]])
    weights = class_weights(labels, 0.5)
    numbers = torch.tensor([2.0, 5.0, 1.0])
    expected = 0.5 / (1 - 0.5**numbers)
    torch.testing.assert_close(weights, expected / expected.sum() * 3)
    assert class_weights(torch.ones(2, 2, dtype=torch.int64), 0.999).tolist() == [
        0,
        1,
        0,
    ]  # of what there is none, nothing
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    p = torch.softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    w = weights[labels]
    torch.testing.assert_close(focal_loss(logits, labels, weights, 2.0), (w * (1 - p) ** 2 * -p.log()).sum() / w.sum())
    torch.testing.assert_close(focal_loss(logits, labels, torch.ones(3), 0.0), -p.log().mean())


def test_routers_learn_what_the_prompt_says() -> None:
    """Labels that hang by the prompt's letters are learnt, and prompts that were not seen are told apart."""
    model = make(layers=2)
    half = torch.randint(10, (96, 12), generator=torch.Generator().manual_seed(3))
    kind = torch.arange(96) % 2
    tokens = half + 10 * kind[:, None]
    counts = torch.stack([2 * kind, 1 - kind], 1)
    model.reset_routers()
    recipe = RouterRecipe(prompt=PROMPT, steps=150, batch_size=32, lr=1e-2, warmup=10)
    found = learn(model, tokens, counts, recipe)
    assert found["accuracy"] == [1.0, 1.0] and max(found["accuracy_of_commonest"]) < 0.7
    assert torch.equal(routed(model, tokens[:8], PROMPT, -0.5), counts[:8])


# --------------------------------------------------------------------------------------------------------------- the verb


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT)
    folder = tmp_path / "base"
    folder.mkdir()
    train_character_tokenizer(TEXT, folder / "tokenizer.json")
    vocab = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    save_checkpoint(make(vocab), folder)
    return folder


FLAGS = [
    word for change in ("prompts=32", "held_out=12", "prompt=12", "answer=8", "width=2", "steps=100", "lr=0.01", "price=0.5")
    for word in ("--set", change)
]  # fmt: skip


def test_the_verb_trains_routers_and_nothing_else(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--text", str(tmp_path / "text.txt"), "--stage", "routers", "--init", str(base), *FLAGS]
    assert rmse_train([*flags, "-o", str(tmp_path / "routed")]) in (None, 0)
    table = capsys.readouterr().out
    assert all(name in table for name in ("routers, route -0.5", "one plan for all", "random skipping", "first layers"))
    evaluation = json.loads((tmp_path / "routed" / "evaluation.json").read_text())
    held_out = evaluation["held_out"]
    assert held_out["best plan of each prompt"]["executions"] < held_out["every layer once"]["executions"] == 3
    assert held_out["routers"][-1]["executions"] == 3 and held_out["routers"][-1]["difference"] == 0
    executions = [p["executions"] for p in held_out["routers"]]
    assert executions[0] <= executions[4] < 3  # the routers alone, and moved towards skipping
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "routed"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("model.routers.") for name in changed)
    assert json.loads((tmp_path / "routed" / "recipe.json").read_text())["prompts"] == 32
    TorchRuntime.open(tmp_path / "routed").feed([1, 2, 3], Dials(6, route=-0.5))
    assert rmse_train([*flags, "-o", str(tmp_path / "routed")]) == 2
    assert_one_line(capsys.readouterr().err, "holds another run (evaluation.json); choose another folder")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "prompt=40"], "prompt: got 40 and answer 8, expected at most 32, the model's routed_positions"),
        (["--set", "held_out=9999"], "too few for 9999 held-out prompts of 20"),
        (["--set", "pompts=1"], "unknown key 'pompts'"),
        (["--set", "width=0"], "width: got 0"),
        (["--device", "cuda"], "--device: --stage routers runs on the CPU"),
        (["--resume"], "--resume: --stage routers is done in one go"),
    ],
)
def test_what_cannot_be_trained(
    base: Path, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--text", str(tmp_path / "text.txt"), "--stage", "routers", "--init", str(base), *FLAGS, *flags]
    assert rmse_train([*given, "-o", str(tmp_path / "routed")]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "routed").exists()


def test_models_without_routers_have_none_to_train(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    given = ["--text", str(tmp_path / "text.txt"), "--stage", "routers", "--init", str(checkpoint)]
    assert rmse_train([*given, "-o", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "has no routers, expected dr_llm")


def test_a_checkpoint_without_routers_runs_every_layer_once(base: Path, tmp_path: Path) -> None:
    """As published models come: a Llama, called dr_llm in its config.json."""
    whole = load_file(base / "model.safetensors")
    bare: dict[str, Any] = {name: t for name, t in whole.items() if not name.startswith("model.routers.")}
    (tmp_path / "bare").mkdir()
    config = json.loads((base / "config.json").read_text())
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    model = load_checkpoint(tmp_path / "bare")
    assert re.fullmatch("DrLlm", type(model).__name__)
    tokens = prompts(3)
    assert routed(model, tokens, PROMPT, -0.5).tolist() == [[1, 1, 1]] * 3
