"""Sparse experts: both ways of computing them equal a plain loop, and balancing keeps them all in use."""

from __future__ import annotations

import pytest
import torch
from small_models import small_config
from torch import Tensor, nn

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.parts import make_experts
from rmse_edge.layers.experts import (
    GATHER_ROWS,
    Routing,
    SparseExperts,
    StoredExperts,
    gathered_experts,
    grouped_experts,
    select,
)

E, K, D, F = 24, 3, 32, 32


def case(rows: int, seed: int = 0, width: int = D) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (rows, width),
        "logits": (rows, E),
        "bias": (E,),
        "gate_up": (E, 2 * F, width),
        "down": (E, width, F),
    }
    scales = {"gate_up": width**-0.5, "down": F**-0.5}
    return {n: torch.randn(s, generator=generator) * scales.get(n, 1.0) for n, s in shapes.items()}


def naive(x: Tensor, logits: Tensor, bias: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One row and one expert at a time, from the equations."""
    out = []
    for row, scores in zip(x, logits):
        chosen = (scores + bias).topk(K).indices
        share = scores.softmax(-1)[chosen]
        share = share / share.sum()
        total = torch.zeros(len(row))
        for weight, expert in zip(share, chosen):
            gate, up = gate_up[expert][0::2] @ row, gate_up[expert][1::2] @ row
            total = total + weight * (down[expert] @ (gate * torch.sigmoid(gate) * up))
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize("compute", [gathered_experts, grouped_experts])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, D), (2, D), (GATHER_ROWS, D), (GATHER_ROWS + 1, D), (50, D), (50, 1), (50, 33), (50, 34)],
)
def test_values_and_gradients_equal_a_plain_loop(compute, rows: int, width: int) -> None:
    """Of any width: the library's grouped product takes rows of 16 bytes only."""
    results = []
    for way in ("naive", "fast"):
        t = {n: v.requires_grad_(n != "bias") for n, v in case(rows, width=width).items()}
        if way == "naive":
            out = naive(**t)
        else:
            out = compute(t["x"], select(t["logits"], t["bias"], K), t["gate_up"], t["down"])
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
        (out * direction).sum().backward()
        results.append([out.detach()] + [t[n].grad for n in ("x", "logits", "gate_up", "down")])
    for ours, theirs in zip(results[1], results[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_one_expert_for_all_rows_and_experts_without_rows() -> None:
    t = case(20)
    t["logits"] = torch.zeros(20, E)
    t["logits"][:, 5:8] = 10.0  # every row picks experts 5, 6 and 7
    expected = naive(**t)
    for compute in (gathered_experts, grouped_experts):
        got = compute(t["x"], select(t["logits"], torch.zeros(E), K), t["gate_up"], t["down"])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def test_the_balancing_bias_selects_but_does_not_weigh() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    routing = select(logits, torch.tensor([0.0, 0.0, 0.0, 5.0]), 2)
    assert set(routing.experts[0].tolist()) == {0, 3}
    weight = dict(zip(routing.experts[0].tolist(), routing.weights[0].tolist()))
    assert weight[0] == pytest.approx(1 / (1 + 2.718281828**-3)) and sum(weight.values()) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_width_of_eight_bytes_in_half_precision(dtype: torch.dtype) -> None:
    t = {n: v if n in ("logits", "bias") else v.to(dtype) for n, v in case(50, width=36).items()}
    routing = select(t["logits"], t["bias"], K)
    few, many = (way(t["x"], routing, t["gate_up"], t["down"]) for way in (gathered_experts, grouped_experts))
    assert many.dtype == dtype
    torch.testing.assert_close(many, few, rtol=0, atol=0.1)


def fresh(config: RMSEConfig) -> SparseExperts:
    torch.manual_seed(0)
    experts = make_experts(config)
    with torch.no_grad():
        for p in (experts.gate_up_proj, experts.down_proj):
            p.normal_(std=p.shape[-1] ** -0.5)
        experts.step_logits.normal_()
    return experts


def test_routing_sees_the_loop() -> None:
    experts = fresh(small_config())
    seen: dict[int, Routing] = {}
    experts.observer = lambda k, routing: seen.__setitem__(k, routing)
    x = torch.randn(2, 10, D)
    outs = [experts(x, k) for k in range(3)]
    assert seen[0].experts.shape == (20, K) and not torch.equal(seen[0].experts, seen[1].experts)
    assert not torch.allclose(outs[0], outs[2])


def test_the_router_is_float32_even_in_bfloat16() -> None:
    experts = fresh(small_config()).bfloat16()
    assert experts.router_logits(torch.randn(4, D, dtype=torch.bfloat16), 0).dtype == torch.float32
    experts = fresh(small_config())
    x = torch.randn(4, D)
    expected = experts.router_logits(x, 0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(experts.router_logits(x, 0), expected)


def test_loads_are_counted_in_training_only() -> None:
    experts = fresh(small_config())
    experts.eval()(torch.randn(1, 30, D), 0)
    assert experts.load.sum() == 0
    experts.train()(torch.randn(1, 30, D), 0)
    assert experts.load.sum() == 30 * K


def test_balancing_wakes_idle_experts() -> None:
    """A router that starts with three favourites: with balancing all 24 experts end in use, without it they never do."""
    idle = {}
    for rate in (0.0, 0.05):
        experts = fresh(small_config()).train()
        with torch.no_grad():
            experts.step_logits.zero_()
            experts.step_logits[:, :K] = 4.0
            generator = torch.Generator().manual_seed(1)
            for _ in range(150):  # the weights stay: the bias alone moves
                experts(torch.randn(1, 64, D, generator=generator), 0)
                idle[rate] = experts.balance(rate)
    assert idle[0.0] > 0.3 and idle[0.05] == 0.0


def test_a_row_alone_equals_the_same_row_in_a_crowd() -> None:
    """Decode takes the gathered way, prefill the grouped one: they must not differ by more than rounding."""
    experts = fresh(small_config()).eval()
    x = torch.randn(1, 40, D)
    with torch.no_grad():
        crowd = experts(x, 2)
        alone = torch.cat([experts(x[:, i : i + 1], 2) for i in range(40)], 1)
    torch.testing.assert_close(alone, crowd, rtol=1e-5, atol=1e-5)


def test_stopped_rows_are_not_computed() -> None:
    """Outside of training the rows that run are all that is routed; they get what they get in a crowd, the others zeros."""
    experts = fresh(small_config()).eval()
    x = torch.randn(2, 30, D, generator=torch.Generator().manual_seed(0))
    active = torch.arange(60).view(2, 30) % 4 == 1
    computed: list[int] = []
    heard: list[Routing] = []
    experts.listener = lambda rows, routing: computed.append(len(rows))
    experts.observer = lambda k, routing: heard.append(routing)
    with torch.no_grad():
        crowd, some = experts(x, 2), experts(x, 2, active)
        nobody = experts(x, 2, torch.zeros_like(active))
    assert computed == [60, 15, 0] and not nobody.any()
    torch.testing.assert_close(some[active], crowd[active], rtol=1e-5, atol=1e-5)
    assert not some[~active].any() and [len(routing.experts) for routing in heard] == [60, 60, 60]
    flat = active.flatten()
    assert torch.equal(heard[1].experts[flat], heard[0].experts[flat]) and not heard[1].weights[~flat].any()


def test_stored_experts_are_all_of_them_but_the_stacked_weights() -> None:
    """Whatever experts are given in the future, a target's own form of them has it, too."""
    experts = fresh(small_config()).eval()
    experts.register_buffer("later", torch.ones(3), persistent=False)
    experts.temperature = nn.Parameter(torch.ones(1))
    experts.extra, experts.number = nn.Linear(2, 2), 7
    stored = StoredExperts(experts)
    ours, theirs = dict(stored.named_parameters()), dict(experts.named_parameters())
    assert theirs.keys() - ours.keys() == {"gate_up_proj", "down_proj"}
    assert all(ours[name] is theirs[name] for name in ours) and {"temperature", "extra.weight"} <= ours.keys()
    assert all(stored.get_buffer(name) is buffer for name, buffer in experts.named_buffers())
    assert stored.number == 7 and stored.top_k == K and not stored.training
    stored.register_buffer("own", torch.ones(1))
    assert "own" not in dict(experts.named_buffers()) and experts.down_proj is not None
    assert set(stored.state_dict()) == set(experts.state_dict()) - {"gate_up_proj", "down_proj"} | {"own"}
