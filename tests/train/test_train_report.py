"""What `rmse-train report` measures, on models where the answer is known."""

from __future__ import annotations

import pytest
import torch
from small_models import dials, lively_model, small_config, whole_sequence
from torch import Tensor

from rmse_edge.train.losses import losses_by_depth
from rmse_edge.train.report import RULES, adaptive, effective_number, exit_states, expert_usage
from rmse_edge.train.trainer import evaluate


@pytest.fixture(scope="module")
def blocks() -> Tensor:
    return torch.randint(37, (6, 65), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_propagated_exits_are_those_of_the_deployed_rule(blocks: Tensor) -> None:
    model = lively_model(small_config(min_loops=2))
    tokens = blocks[:, :-1]
    state, depth = exit_states(model, tokens, 0.6, "propagate")
    logits, expected = whole_sequence(model, tokens, dials(model, exit_threshold=0.6, min_loops=2))
    assert torch.equal(depth, expected) and depth.min() == 2 and depth.float().std() > 0.5
    torch.testing.assert_close(model.head_proj(state), logits)


@torch.no_grad()
def test_selected_exits_pick_states_of_the_full_run(blocks: Tensor) -> None:
    model = lively_model(small_config())
    tokens, targets = blocks[:, :-1], blocks[:, 1:]
    state, depth = exit_states(model, tokens, 0.6, "selected")
    every, gates, _ = model.trajectory(tokens)
    for b, t in ((0, 0), (3, 17), (5, 63)):
        score, survival = 0.0, 1.0
        for k in range(5):
            survival *= 1 - torch.sigmoid(gates[k, b, t]).item()
            score = 1 - survival
            if score >= 0.6 or k == 4:
                break
        assert depth[b, t] == k + 1
        assert torch.equal(state[b, t], every[k][b, t])
    # The first position sees nobody stop: the rules agree there, whatever else differs.
    for rule in RULES:
        other, other_depth = exit_states(model, tokens, 0.6, rule)
        assert torch.equal(other_depth[:, 0], depth[:, 0])
        torch.testing.assert_close(other[:, 0], state[:, 0])
    full = losses_by_depth(model, tokens, targets)
    rows = adaptive(model, blocks, [1.0, 1e-6])
    for row in rows:
        loop = 4 if row["threshold"] == 1.0 else 0
        assert row["loss"] == pytest.approx(full[loop].mean().item(), rel=1e-5)
        assert (row["mean_depth"], row["sd_depth"]) == (loop + 1, 0)


def test_rows_carry_the_loss_of_a_fixed_depth_of_the_same_mean(blocks: Tensor) -> None:
    model = lively_model(small_config())
    fixed = evaluate(model, blocks)
    for row in adaptive(model, blocks, [0.6], fixed):
        low = int(row["mean_depth"])
        share = row["mean_depth"] - low
        expected = (1 - share) * fixed[low - 1] + share * fixed[low]
        assert row["loss_at_same_fixed_depth"] == pytest.approx(expected)


def test_overlap_of_loops_that_pick_alike_and_apart(blocks: Tensor) -> None:
    """Loops 1 and 2 pick experts 0..2, loop 3 picks 3..5, loops 4 and 5 two of 6..7 with one of the first three."""
    model = lively_model(small_config())
    experts = model.block.experts
    with torch.no_grad():
        experts.router.weight.zero_()
        experts.balance_bias.zero_()
        experts.step_logits.fill_(-9.0)
        for k, chosen in enumerate(([0, 1, 2], [0, 1, 2], [3, 4, 5], [0, 6, 7], [0, 6, 7])):
            experts.step_logits[k, chosen] = torch.tensor([3.0, 2.0, 1.0])
    usage = expert_usage(model, blocks)
    overlap = torch.tensor(usage["overlap"])
    expected = torch.eye(5, dtype=torch.float64)
    for i, j, share in ((0, 1, 1), (0, 3, 1 / 3), (0, 4, 1 / 3), (1, 3, 1 / 3), (1, 4, 1 / 3), (3, 4, 1)):
        expected[i, j] = expected[j, i] = share
    torch.testing.assert_close(overlap.double(), expected)
    jaccard = torch.tensor(usage["jaccard"])
    assert jaccard[0, 1] == 1 and jaccard[0, 2] == 0 and jaccard[0, 3].item() == pytest.approx(1 / 5)
    assert usage["mean_overlap"] == pytest.approx((2 + 4 / 3) / 10)
    assert usage["chance_overlap"] == 3 / 24
    assert usage["idle"] == [21] * 5 and usage["idle_all_loops"] == 16
    assert usage["effective_experts"] == pytest.approx([3.0] * 5)
    assert usage["top_tenth_share"] == pytest.approx([2 / 3] * 5)
    assert experts.observer is None


def test_effective_number() -> None:
    assert effective_number(torch.ones(8)) == pytest.approx(8)
    assert effective_number(torch.tensor([5.0, 0.0, 0.0])) == pytest.approx(1)


def test_a_model_of_one_loop_reports(blocks: Tensor) -> None:
    assert expert_usage(lively_model(small_config(max_loops=1)), blocks)["mean_overlap"] is None
