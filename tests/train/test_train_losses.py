"""The objectives of the three stages, and that training with them learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import lively_model, small_config, small_recipe, small_text, text_source

from rmse_edge.loop.stop import exit_distribution
from rmse_edge.losses import token_loss
from rmse_edge.train.gpt import GPT, GPTConfig
from rmse_edge.train.journal import read_rows
from rmse_edge.train.losses import cross_entropies, expected_loss, gate_loss, losses_by_depth
from rmse_edge.train.objective import Objective, draw_thresholds
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import next_tokens
from rmse_edge.train.trainer import Trainer, build_model, evaluate


def test_expected_loss_by_hand() -> None:
    generator = torch.Generator().manual_seed(0)
    losses, gates = torch.rand(3, 2, 5, generator=generator), torch.randn(3, 2, 5, generator=generator)
    total, depth = 0.0, 0.0
    for b in range(2):
        for t in range(5):
            stop = [1 / (1 + math.exp(-g)) for g in gates[:, b, t].tolist()]
            p = [stop[0], (1 - stop[0]) * stop[1], (1 - stop[0]) * (1 - stop[1])]
            total += sum(q * v for q, v in zip(p, losses[:, b, t].tolist())) + 0.3 * sum(q * math.log(q) for q in p)
            depth += sum(q * k for k, q in enumerate(p, 1))
    loss, mean_depth = expected_loss(losses, gates, 0.3)
    assert loss.item() == pytest.approx(total / 10, rel=1e-5)
    assert mean_depth.item() == pytest.approx(depth / 10, rel=1e-5)


def test_entropy_regularisation_has_finite_gradients_at_a_saturated_gate() -> None:
    gates = torch.full((4, 1, 1), 80.0, requires_grad=True)
    expected_loss(torch.rand(4, 1, 1), gates, 0.5)[0].backward()
    assert torch.isfinite(gates.grad).all()


def test_the_gate_learns_to_go_on_where_it_pays() -> None:
    """Half the positions gain until loop 3, the other half nothing after loop 1."""
    losses = torch.tensor([[2.0, 1.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).T[:, None]  # (4, 1, 2)
    gates = torch.zeros(4, 1, 2, requires_grad=True)
    optimizer = torch.optim.Adam([gates], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        gate_loss(losses, gates, cost=0.05).backward()
        optimizer.step()
    p = exit_distribution(gates.detach())[:, 0]
    assert p[2, 0] > 0.9 and p[0, 1] > 0.9
    assert gates.grad is not None and gates.grad[3].abs().max() == 0, "the last loop stops anyway"


def test_the_gate_loss_trains_the_gate_alone() -> None:
    losses = torch.rand(4, 1, 2, requires_grad=True)
    gate_loss(losses, torch.zeros(4, 1, 2, requires_grad=True), cost=0.05).backward()
    assert losses.grad is None


def test_token_loss_is_float32() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.bfloat16)
    loss = token_loss(logits, torch.ones(2, 3, dtype=torch.int64))
    assert loss.dtype == torch.float32 and loss.shape == (2, 3)


def test_thresholds_leave_a_fifth_at_full_depth() -> None:
    torch.manual_seed(0)
    drawn = draw_thresholds(5000)
    assert drawn.shape == (5000, 1) and 0.18 < (drawn >= 1).float().mean() < 0.22


def test_the_exit_stage_scores_the_state_each_position_stopped_in() -> None:
    model = lively_model(small_config())
    blocks = torch.randint(37, (2, 65))
    with torch.no_grad():
        full, last, depth = Objective(model, small_recipe())(
            next_tokens(blocks), "exits", thresholds=torch.full((2, 1), 1.2)
        )
        every = losses_by_depth(model, blocks[:, :-1], blocks[:, 1:])
        assert depth == 5 and torch.allclose(full, every[-1].mean(), atol=1e-5) and torch.equal(full, last)
        first, _, depth = Objective(model, small_recipe())(
            next_tokens(blocks), "exits", thresholds=torch.full((2, 1), 1e-6)
        )
        assert depth == 1 and torch.allclose(first, every[0].mean(), atol=1e-5)


def test_cross_entropies_are_those_of_every_loop() -> None:
    model = lively_model(small_config())
    blocks = torch.randint(37, (2, 33))
    with torch.no_grad():
        states, _, _ = model.trajectory(blocks[:, :-1], 3)
        losses = cross_entropies(model, states, blocks[:, 1:])
        assert losses.shape == (3, 2, 32)
        torch.testing.assert_close(losses, losses_by_depth(model, blocks[:, :-1], blocks[:, 1:])[:3])
        mean = evaluate(model, blocks, batch=1)
        assert mean[:3] == pytest.approx(losses.mean((1, 2)).tolist(), rel=1e-5)


def run(out: Path, **changes: Any) -> Trainer:
    ids = small_text(20_000)
    trainer = Trainer(small_recipe(**changes), text_source(ids), out)
    trainer.run()
    return trainer


def test_each_stage_trains_its_own_parameters(tmp_path: Path) -> None:
    """The gate stage moves the gate alone, the exit stage everything else."""
    ids = small_text()
    trainer = Trainer(small_recipe(eval_every=100), text_source(ids), tmp_path)
    trainer.run(stop_at=6)
    for stop, moved in ((9, lambda n: n.startswith("gate.")), (12, lambda n: not n.startswith("gate."))):
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.run(stop_at=stop)
        for name, p in trainer.model.named_parameters():
            changed = not torch.equal(p, before[name])
            assert changed == moved(name), f"{name} in the stage that ends at {stop}"


@pytest.mark.slow
def test_training_learns_balances_and_stops_early(tmp_path: Path) -> None:
    """On a text whose entropy is about 1.2 nats (chance: 3.7): the loss falls, no expert stays idle, the gate stops."""
    trainer = run(
        tmp_path, steps=60, gate_steps=15, exit_steps=5, batch_size=8, lr=5e-3, warmup=10, eval_every=30, clip=1.0,
        model={"dropout": 0.0},
    )  # fmt: skip
    rows = read_rows(tmp_path / "log.csv")
    assert float(rows[0]["last_loss"]) > 3.4 and trainer.best < 1.8
    assert float(rows[-1]["val_loss"]) < 1.8
    assert sum(float(r["idle_experts"]) for r in rows[40:60]) / 20 < 0.05
    assert all(r["idle_experts"] == "" for r in rows if r["stage"] == "gate")
    depths = [float(r["depth"]) for r in rows if r["stage"] == "gate"]
    assert depths[-1] < depths[0], "on this text little comes after the first loop"


def test_a_gpt_trains_by_the_same_recipe(tmp_path: Path) -> None:
    model = {"vocab_size": 40, "d_model": 32, "n_heads": 2, "n_layers": 2, "block_size": 64, "dropout": 0.1}
    recipe = Recipe(model, "gpt", batch_size=4, steps=40, lr=5e-3, warmup=2, eval_every=20, eval_blocks=4)
    ids = small_text(20_000)
    trainer = Trainer(recipe, text_source(ids), tmp_path)
    first = trainer.evaluate()
    trainer.run()
    assert trainer.step == 40 == recipe.total_steps and len(first) == 1
    assert trainer.evaluate()[0] < first[0] - 0.3
    assert isinstance(trainer.model, GPT) and isinstance(build_model(recipe).config, GPTConfig)


def test_a_gpt_is_causal() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=40, d_model=32, n_heads=2, n_layers=2, block_size=64)).eval()
    tokens = torch.randint(40, (1, 64))
    other = tokens.clone()
    other[:, 40:] = 0
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :40], model(other)[:, :40])


def test_bfloat16_autocast_trains(tmp_path: Path) -> None:
    """Weights, loss and survival stay float32; two steps of every stage give finite numbers near the float32 ones."""
    changes: dict[str, Any] = dict(steps=2, gate_steps=2, exit_steps=2, eval_every=10, model={"dropout": 0.0})
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    run(tmp_path / "a", precision="fp32", **changes)
    trainer = run(tmp_path / "b", precision="bf16", **changes)
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    for ours, theirs in zip(read_rows(tmp_path / "b" / "log.csv"), read_rows(tmp_path / "a" / "log.csv")):
        assert float(ours["last_loss"]) == pytest.approx(float(theirs["last_loss"]), abs=0.05)


@pytest.mark.slow
def test_accumulation_equals_the_bigger_batch(tmp_path: Path) -> None:
    logs = []
    for rounds in (1, 4):
        out = tmp_path / str(rounds)
        out.mkdir()
        trainer = run(out, accumulate=rounds, model={"dropout": 0.0})
        logs.append((read_rows(out / "log.csv"), trainer.final_weights()))
    for a, b in zip(logs[0][0], logs[1][0]):
        for field in ("loss", "last_loss", "depth", "grad_norm"):
            assert float(a[field]) == pytest.approx(float(b[field]), rel=1e-4), (a["step"], field)
        assert a["idle_experts"] == b["idle_experts"]
    for name, value in logs[0][1].items():
        torch.testing.assert_close(logs[1][1][name], value, rtol=1e-3, atol=1e-5)
