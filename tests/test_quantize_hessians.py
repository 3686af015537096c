"""What calibration gathers: Hessians of every input of the loop, against plain sums over recorded inputs."""

from __future__ import annotations

import pytest
import torch
from helpers import mixed_model, remembering_model
from torch import Tensor

from rmse_edge.errors import UserError
from rmse_edge.exit import exit_distribution
from rmse_edge.experts import Routing, swiglu
from rmse_edge.model import RMSE
from rmse_edge.quantize.hessians import DOWN, FLOOR, HEAD, PRIOR_ROWS, UP, gather

Q = "block.attention.q_proj.weight"
INJECT = "inject.weight"


@pytest.fixture(scope="module")
def model() -> RMSE:
    return mixed_model()


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(65, (40, 70), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def recorded(model: RMSE, blocks: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Inputs of q_proj and of the experts by loop (rows, d), gate logits (K, rows) and normed states by loop."""
    queries: list[Tensor] = []
    experts: list[Tensor] = []
    hooks = [
        model.block.attention.q_proj.register_forward_pre_hook(lambda _, a: queries.append(a[0].flatten(0, 1))),
        model.block.experts.register_forward_pre_hook(lambda _, a: experts.append(a[0].flatten(0, 1))),
    ]
    states, gates, _ = model.trajectory(blocks)
    for hook in hooks:
        hook.remove()
    return queries, experts, gates.flatten(1), [h.flatten(0, 1) for h in states]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def running(gates: Tensor) -> Tensor:
    """Probability that a row is still running in loop k, from the exit distribution: (K, rows)."""
    p = exit_distribution(gates)
    return p.flip(0).cumsum(0).flip(0)


def test_dense_inputs_of_every_loop(model: RMSE, blocks: Tensor) -> None:
    """`even` counts every loop's rows once, `first` only the first loop's, `exits` by the chance of getting there."""
    queries, _, gates, _ = recorded(model, blocks)
    alive = FLOOR + (1 - FLOOR) * running(gates)
    assert alive[-1].mean() < 0.9 * alive[0].mean()  # so that the weights show
    weights = {"even": torch.ones_like(gates), "exits": alive, "first": torch.zeros_like(gates)}
    weights["first"][0] = 1
    for loops, weight in weights.items():
        expected = sum((x * w[:, None]).T @ x for x, w in zip(queries, weight))
        assert close(gather(model, blocks, [Q], loops).of(Q), expected), loops


def test_the_head_is_read_at_every_exit(model: RMSE, blocks: Tensor) -> None:
    _, _, gates, states = recorded(model, blocks)
    p = FLOOR / len(gates) + (1 - FLOOR) * exit_distribution(gates)
    expected = sum((x * w[:, None]).T @ x for x, w in zip(states, p))
    assert close(gather(model, blocks, [HEAD], "exits").of(HEAD), expected)


def test_what_is_outside_the_loop_counts_once(model: RMSE, blocks: Tensor) -> None:
    x = model.embed(blocks).flatten(0, 1).detach()
    for loops in ("even", "exits", "first"):
        assert close(gather(model, blocks, [INJECT], loops).of(INJECT), x.T @ x)


def test_every_expert_has_its_own_rows(model: RMSE, blocks: Tensor) -> None:
    """Inputs and hidden activations of one expert over all loops, by the square of its routing weight."""
    _, inputs, _, _ = recorded(model, blocks)
    routings: list[Routing] = []
    model.block.experts.observer = lambda k, routing: routings.append(routing)
    with torch.no_grad():
        model.trajectory(blocks)
    model.block.experts.observer = None
    found = gather(model, blocks, [UP, DOWN], "even")
    top_k, count = model.config.top_k, model.config.n_experts
    assert found.rows.sum() == blocks.numel() * model.config.max_loops * top_k
    for expert in (0, 7, count - 1):
        up, down = torch.zeros(64, 64), torch.zeros(32, 32)
        for x, routing in zip(inputs, routings):
            rows, place = (routing.experts == expert).nonzero(as_tuple=True)
            weight = routing.weights[rows, place].square()[:, None]
            hidden = swiglu(x[rows] @ model.block.experts.gate_up_proj[expert].T).detach()
            up += (x[rows] * weight).T @ x[rows]
            down += (hidden * weight).T @ hidden
        assert close(found.sums[UP][expert], up) and close(found.sums[DOWN][expert], down)


def test_an_expert_that_is_never_routed_borrows(blocks: Tensor) -> None:
    """It is counted, and quantised for the rows of the average expert; the others hardly notice the borrowed rows."""
    model = mixed_model()
    model.block.experts.balance_bias[5] = -100
    found = gather(model, blocks, [UP, DOWN], "even")
    assert found.rows[5] == 0 and found.rare() == int((found.rows < 64).sum()) >= 1
    assert not found.sums[UP][5].any()
    typical = found.sums[UP].sum(0) / found.rows.sum()  # weights and rows cancel: E[x x^T] of a row
    assert close(found.of(UP)[5], PRIOR_ROWS * typical)
    assert torch.linalg.eigvalsh(found.of(DOWN)[5]).min() > 0
    busiest = int(found.rows.argmax())
    assert close(found.of(UP)[busiest], found.sums[UP][busiest] + PRIOR_ROWS * typical)


def test_a_memory_is_written_on_the_way() -> None:
    """Segment by segment, as the model is run: the second segment's inputs differ from those of a blank memory."""
    model = remembering_model()
    blocks = torch.randint(65, (2, 128), generator=torch.Generator().manual_seed(0))
    queries: list[Tensor] = []
    hook = model.block.attention.q_proj.register_forward_pre_hook(lambda _, a: queries.append(a[0].flatten(0, 1)))
    with torch.no_grad():
        model.trajectory(blocks)
        expected = sum(x.T @ x for x in queries)
        queries.clear()
        model.trajectory(blocks, remember=False)
    hook.remove()
    assert close(gather(model, blocks, [Q], "even").of(Q), expected)
    assert not close(sum(x.T @ x for x in queries), expected)


def test_inputs_that_are_not_numbers_are_named(blocks: Tensor) -> None:
    model = mixed_model()
    with torch.no_grad():
        model.block.attention_norm.weight[3] = float("inf")
    with pytest.raises(UserError, match=r"^block\.attention\.q_proj\.weight: its inputs hold NaN or Inf") as caught:
        gather(model, blocks, [Q]).of(Q)
    assert "\n" not in str(caught.value)
