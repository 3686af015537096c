"""When a position stops: the rules, and the distribution they are trained with."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from small_models import dials, lively_model, small_config, whole_sequence
from torch import Tensor

from rmse_edge.loop.dials import Dials
from rmse_edge.loop.predictions import carry_after, change_stops, changes, first_carry
from rmse_edge.loop.stop import (
    add_log_survival,
    cosine_change,
    cosine_stops,
    delta_stops,
    entropy_stops,
    exit_distribution,
    gate_stops,
)


def scores(logits: list[float], threshold: float) -> list[bool]:
    """Whether the gate rule holds after each loop of one always active position."""
    log_survival, out = torch.zeros(1), []
    for logit in logits:
        log_survival = add_log_survival(log_survival, torch.tensor([logit]), torch.tensor([True]))
        out.append(bool(gate_stops(log_survival, torch.tensor(threshold))))
    return out


def test_the_gate_stops_when_the_brake_score_reaches_the_threshold() -> None:
    half = [0.0] * 4  # lambda 1/2 in every loop: scores 0.5, 0.75, 0.875, 0.9375
    assert scores(half, 0.49) == [True] * 4
    assert scores(half, 0.7) == [False, True, True, True]
    assert scores(half, 0.9) == [False, False, False, True]
    assert scores(half, 0.95) == [False] * 4


@pytest.mark.parametrize("threshold", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("logit", [9.0, 30.0, 200.0])
def test_a_threshold_of_one_or_more_disables_the_gate(threshold: float, logit: float) -> None:
    """However sure the gate is: at logit 30 a float32 score is exactly 1 and "score >= 1" would hold."""
    assert scores([logit] * 64, threshold) == [False] * 64


def test_thresholds_next_to_one_are_told_apart() -> None:
    """As a float32 product 1 - survival could not distinguish these."""
    assert scores([9.0], 0.9998) == [True] and scores([9.0], 0.9999) == [False]
    assert scores([9.0, 0.0], 0.99993) == [False, True]


def test_bfloat16_gates_do_not_lose_the_score() -> None:
    log_survival = torch.zeros(1)
    for _ in range(12):
        log_survival = add_log_survival(log_survival, torch.tensor([-3.0], dtype=torch.bfloat16), torch.tensor([True]))
    assert log_survival.dtype == torch.float32
    assert log_survival.item() == pytest.approx(-12 * math.log1p(math.exp(-3.0)), rel=1e-6)


def test_a_stopped_position_keeps_its_survival() -> None:
    before = torch.tensor([-0.5, -0.5])
    after = add_log_survival(before, torch.tensor([2.0, 2.0]), torch.tensor([True, False]))
    assert after[0] < before[0] and after[1] == before[1]


def test_the_delta_rule_is_relative_and_zero_disables_it() -> None:
    before = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3.0, 4.0]])
    after = torch.tensor([[3.0, 4.4], [1.0, 0.0], [3.0, 4.0]])  # changes of 0.075, 1 and 0
    for scale in (1.0, 1e-3, 1e3):
        got = [delta_stops(scale * before, scale * after, torch.tensor(e)).tolist() for e in (0.07, 0.08, 0.0)]
        assert got == [[False, False, True], [True, False, True], [False, False, False]]


def test_the_entropy_rule() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [20.0, 0.0, 0.0, 0.0], [1.0, 1.0, -30.0, -30.0]])
    assert entropy_stops(logits, torch.tensor(1.0)).tolist() == [False, True, True]
    assert entropy_stops(logits, torch.tensor(0.5)).tolist() == [False, True, False]
    assert entropy_stops(logits, torch.tensor(0.0)).tolist() == [False, False, False]
    assert entropy_stops(logits.half() * 1000, torch.tensor(1.0)).tolist() == [False, True, True]


def test_the_exit_distribution_sums_to_one() -> None:
    gates = 5 * torch.randn(12, 3, 40, generator=torch.Generator().manual_seed(0))
    p = exit_distribution(gates)
    assert p.dtype == torch.float32 and (p >= 0).all()
    torch.testing.assert_close(p.sum(0), torch.ones(3, 40))
    even = exit_distribution(torch.zeros(4, 1))[:, 0]
    torch.testing.assert_close(even, torch.tensor([0.5, 0.25, 0.125, 0.125]))
    torch.testing.assert_close(exit_distribution(gates[:1]), torch.ones(1, 3, 40))
    saturated = exit_distribution(torch.full((12, 1), 60.0))
    assert torch.isfinite(saturated).all() and saturated[0] == 1


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(37, (2, 60), generator=torch.Generator().manual_seed(3))


def test_a_saturated_gate_runs_to_full_depth_at_threshold_one(tokens: Tensor) -> None:
    model = lively_model(small_config())
    with torch.no_grad():
        model.gate.weight.zero_()
        model.gate.bias.fill_(9.0)
    assert (whole_sequence(model, tokens, dials(model, exit_threshold=1.0))[1] == 5).all()
    assert (whole_sequence(model, tokens, dials(model, exit_threshold=0.99))[1] == 1).all()
    assert (whole_sequence(model, tokens, dials(model, exit_threshold=0.99, min_loops=3))[1] == 3).all()


def test_a_lower_threshold_never_runs_deeper(tokens: Tensor) -> None:
    """For the first position, which sees nobody else stop, position by position; for all on average."""
    model = lively_model(small_config())
    depths = [whole_sequence(model, tokens, dials(model, exit_threshold=t))[1].float() for t in (0.2, 0.5, 0.8, 1.0)]
    for lower, higher in pairwise(depths):
        assert (lower[:, 0] <= higher[:, 0]).all() and lower.mean() < higher.mean()


def test_the_entropy_rule_stops_positions_whose_logits_are_sharp(tokens: Tensor) -> None:
    model = lively_model(small_config(exit_rules=("entropy",)))
    logits, depth = whole_sequence(model, tokens, dials(model, exit_entropy=2.3))
    log_p = torch.log_softmax(logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert 0 < (depth < 5).float().mean() < 1
    assert (entropy[depth < 5] < 2.3).all()


def test_the_cosine_rule_asks_for_the_direction_alone() -> None:
    before, after = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])  # cosine 0.6
    assert cosine_change(before, after).item() == pytest.approx(0.4)
    assert cosine_stops(before, after, torch.tensor(0.41)) and not cosine_stops(before, after, torch.tensor(0.39))
    assert not cosine_stops(before, before, torch.tensor(0.0))  # which disables it
    assert cosine_change(torch.zeros(1, 2), after).item() == 1


CHANGES = ("exit_kl", "exit_entropy_change", "exit_steady")


def test_predictions_of_one_loop_and_the_next() -> None:
    """Of one position over two tokens: 1/2, 1/2 before any loop, then 3/4, 1/4 twice, then 1/4, 3/4."""
    p = [[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]]
    carry = first_carry(CHANGES, torch.zeros(1, 1, 8), 2)
    found = []
    for k, of_loop in enumerate(p):
        new = carry_after(k, carry, torch.tensor([[of_loop]]).log() + 7)
        found.append({name: score.item() for name, score in changes(k, carry, new, CHANGES).items()})
        off = {name: torch.tensor(0) if name == "exit_steady" else torch.tensor(0.0) for name in CHANGES}
        assert not change_stops(k, carry, new, off)
        one = {"exit_steady": torch.tensor(1)}
        assert bool(change_stops(k, carry, new, one)) == (k == 1)
        for name in CHANGES[:2]:
            low, high = (torch.tensor(found[-1][name] + step) for step in (-1e-3, 1e-3))
            assert change_stops(k, carry, new, {name: high}) and not change_stops(k, carry, new, {name: low})
        carry = new
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert [f["exit_steady"] for f in found] == [0, 1, 0]
    assert [f["exit_entropy_change"] for f in found] == pytest.approx([100 - entropy, 0, 0], abs=1e-5)
    expected = [0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25), 0, 0.5 * math.log(3)]
    assert [f["exit_kl"] for f in found] == pytest.approx(expected, abs=1e-6)


def test_a_rule_that_is_off_stops_nothing_whatever_is_rounded() -> None:
    """What changes by next to nothing, such as a state that has settled, may come out below zero."""
    states = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
    assert bool((cosine_change(states, states * 1.1) < 0).any())
    assert not cosine_stops(states, states * 1.1, torch.tensor(0.0)).any()
    half = torch.full((1, 1, 2), 0.5).log()
    before, after = {"log_p": half}, {"log_p": half + 1e-6}
    assert changes(1, before, after, ["exit_kl"])["exit_kl"].item() < 0
    assert not change_stops(1, before, after, {"exit_kl": torch.tensor(0.0)})


def test_a_model_has_scores_of_its_own_rules_alone() -> None:
    """The parity gate chooses its settings by them, and gives a model no other dials."""
    from architectures import TEXTS

    for case in TEXTS:
        model = case.model()
        names = model.spec(1).dials
        loops = model.spec(1).max_loops
        scalars = {name: torch.from_numpy(value) for name, value in Dials(loops).arrays().items() if name in names}
        found = model.whole_text(torch.from_numpy(case.ids(8)), scalars)
        assert found.scores.keys() <= set(names), case.name
