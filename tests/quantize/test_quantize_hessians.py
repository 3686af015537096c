"""What calibration gathers: Hessians of every input of the loop, against plain sums over recorded inputs."""

from __future__ import annotations

import pytest
import torch
from helpers import mixed_model, remembering_model
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE, Stop
from rmse_edge.arch.rmse.reading import deployed_exit
from rmse_edge.errors import UserError
from rmse_edge.layers.experts import Routing, swiglu
from rmse_edge.loop.stop import exit_distribution
from rmse_edge.quantize.hessians import FLOOR, PRIOR_ROWS, gather

Q = "block.attention.q_proj.weight"
INJECT, HEAD = "inject.weight", "head_proj.weight"
EXPERTS = "block.experts"
UP, DOWN = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"


@pytest.fixture(scope="module")
def model() -> RMSE:
    return mixed_model()


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(65, (40, 70), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def recorded(
    model: RMSE, blocks: Tensor, stop: Stop | None = None
) -> tuple[list[Tensor], list[Tensor], Tensor, list[Tensor]]:
    """Inputs of q_proj and of the experts by loop (rows, d), gate logits (K, rows) and normed states by loop.

    `stop` as in `RMSE.trajectory`; an observer has the block compute stopped positions too.
    """
    model.block.experts.observer = lambda k, routing: None
    queries: list[Tensor] = []
    experts: list[Tensor] = []
    hooks = [
        model.block.attention.q_proj.register_forward_pre_hook(lambda _, a: queries.append(a[0].flatten(0, 1))),
        model.block.experts.register_forward_pre_hook(lambda _, a: experts.append(a[0].flatten(0, 1))),
    ]
    states, gates, _ = model.trajectory(blocks, stop=stop)
    for hook in hooks:
        hook.remove()
    model.block.experts.observer = None
    return queries, experts, gates.flatten(1), [h.flatten(0, 1) for h in states]


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def running(gates: Tensor) -> Tensor:
    """Probability that a row is still running in loop k, from the exit distribution: (K, rows)."""
    p = exit_distribution(gates)
    return p.flip(0).cumsum(0).flip(0)


def weighted(inputs: list[Tensor], weights: Tensor) -> Tensor:
    """Hessian of the inputs (rows, d) of every loop, with weights (K, rows)."""
    return sum((x * w[:, None]).T @ x for x, w in zip(inputs, weights))  # type: ignore[return-value]


def test_dense_inputs_of_every_loop(model: RMSE, blocks: Tensor) -> None:
    """`even` counts every loop's rows once, `first` only the first loop's."""
    queries, _, gates, _ = recorded(model, blocks)
    weights = {"even": torch.ones_like(gates), "first": torch.zeros_like(gates)}
    weights["first"][0] = 1
    for loops, weight in weights.items():
        assert close(gather(model, blocks, [Q], loops).of(Q), weighted(queries, weight)), loops


def test_a_quarter_runs_to_the_end_and_the_rest_stops(model: RMSE, blocks: Tensor) -> None:
    """`exits` counts every loop of the first quarter, and of the others what the model computes, by its chance of running."""
    whole, rest = blocks[:10], blocks[10:]
    queries, _, gates, states = recorded(model, whole)
    q = weighted(queries, torch.ones_like(gates))
    head = weighted(states, torch.full_like(gates, 1 / len(gates)))
    stop = deployed_exit(model)
    queries, _, gates, states = recorded(model, rest, stop)
    depth = model.trajectory(rest, stop=stop)[2].flatten()
    assert 1 < depth.double().mean() < model.config.max_loops  # so that it shows who stopped
    computed = torch.arange(len(gates))[:, None] < depth
    found = gather(model, blocks, [Q, "block.attention.kv_proj.weight", HEAD], "exits")
    expected = q + weighted(queries, running(gates) * computed)
    assert close(found.of(Q), expected) and close(found.of("block.attention.kv_proj.weight"), expected)
    assert close(found.of(HEAD), head + states[-1].T @ states[-1])


def test_experts_hear_of_running_rows_only(model: RMSE, blocks: Tensor) -> None:
    """Of the part whose positions stop: every row that runs, once for each of its experts, by its routing weight."""
    found = gather(model, blocks, [UP], "exits")
    expected, rows = torch.zeros(64, 64), 0
    for part, stop in ((blocks[:10], None), (blocks[10:], deployed_exit(model))):
        _, inputs, gates, _ = recorded(model, part, stop)
        depth = model.trajectory(part, stop=stop)[2].flatten()
        for k, x in enumerate(inputs):
            routing = model.block.experts.route(x, k)
            share = routing.weights.square().sum(1) * (k < depth) * (1 if stop is None else running(gates)[k])
            expected += (x * share[:, None]).T @ x
            rows += int((k < depth).sum()) * model.config.top_k
    assert int(found.rows[EXPERTS].sum()) == rows and close(found.sums[UP].sum(0), expected.detach())


def test_without_exits_every_loop_counts_by_its_chance(blocks: Tensor) -> None:
    """A model whose exits are off runs to the end, and a row of loop k counts by the chance that it is still running."""
    model = mixed_model(exit_threshold=1.0)
    queries, _, gates, states = recorded(model, blocks)
    alive = FLOOR + (1 - FLOOR) * running(gates)
    assert alive[-1].mean() < 0.9 * alive[0].mean()  # so that the weights show
    found = gather(model, blocks, [Q, HEAD], "exits")
    p = FLOOR / len(gates) + (1 - FLOOR) * exit_distribution(gates)
    assert close(found.of(Q), weighted(queries, alive)) and close(found.of(HEAD), weighted(states, p))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_same_text_gives_the_same_sums(model: RMSE, blocks: Tensor, threads: int) -> None:
    """Whoever is faster, sums are added up in one order: a seed gives the same integers again."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = (gather(model, blocks, [Q, UP, DOWN], "exits").sums for _ in range(2))
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for name in a:
        assert torch.equal(a[name], b[name]), name


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
    assert found.rows[EXPERTS].sum() == blocks.numel() * model.config.max_loops * top_k
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
    assert found.rows[EXPERTS][5] == 0 and found.rare() == int((found.rows[EXPERTS] < 64).sum()) >= 1
    assert not found.sums[UP][5].any()
    typical = found.sums[UP].sum(0) / found.rows[EXPERTS].sum()  # weights and rows cancel: E[x x^T] of a row
    assert close(found.of(UP)[5], PRIOR_ROWS * typical)
    assert torch.linalg.eigvalsh(found.of(DOWN)[5]).min() > 0
    busiest = int(found.rows[EXPERTS].argmax())
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
