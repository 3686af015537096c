"""The sampler: determinism, the distribution it draws from, and its options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_one_line

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.loop.generator import SplitMix64, noise, number
from rmse_edge.runtimes.text.sampling import Sampler, Sampling, probabilities

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "sampler.json").read_text())
LOGITS = np.random.default_rng(0).normal(size=65).astype(np.float32) * 2


def draws(count: int, logits: np.ndarray = LOGITS, **options: Any) -> np.ndarray:
    sampler = Sampler(Sampling(**options))
    return np.array([sampler.pick(logits) for _ in range(count)])


def softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def chi_square(tokens: np.ndarray, expected: np.ndarray) -> float:
    observed = np.bincount(tokens, minlength=len(expected))
    assert not observed[expected == 0].any()
    kept = expected > 0
    counts = expected[kept] * len(tokens)
    return float(((observed[kept] - counts) ** 2 / counts).sum())


def test_same_seed_and_logits_same_tokens():
    assert (draws(200, seed=7) == draws(200, seed=7)).all()
    assert (draws(200, seed=7) != draws(200, seed=8)).any()


def test_tokens_do_not_depend_on_the_type_or_the_last_digits_of_the_logits():
    """What two runtimes differ by must not change what they say, but for draws that fall on a boundary."""
    assert (draws(500, seed=1) == draws(500, LOGITS.astype(np.float64), seed=1)).all()
    noise = np.random.default_rng(1).normal(size=65).astype(np.float32) * 1e-6
    assert (draws(500, seed=1) != draws(500, LOGITS + noise, seed=1)).sum() <= 1


def test_random_numbers_are_those_on_record():
    """tests/runtimes/native_core.cpp holds the runner's against the same."""
    for known in GOLDEN["words"]:
        stream = SplitMix64(int(known["seed"]))
        assert [f"{stream.next():016x}" for _ in known["words"]] == known["words"]
        assert [f"{number(int(known['seed']), n):016x}" for n in range(len(known["words"]))] == known["words"]
    for known in GOLDEN["uniform"]:
        stream = SplitMix64(int(known["seed"]))
        assert [stream.uniform() for _ in known["numbers"]] == known["numbers"]
    assert SplitMix64(1234567).next() == 6457827717110365317  # as published beside the algorithm


def test_noise_is_that_on_record():
    for known in GOLDEN["noise"]:
        found = noise(int(known["seed"]), int(known["position"]), len(known["numbers"]))
        assert found.dtype == np.float32 and found.tolist() == known["numbers"]


def test_noise_is_normal_enough_and_every_position_has_its_own():
    """Mean, variance and fourth moment; no correlation between seeds, positions or places; a longer one begins alike."""
    drawn = np.stack([[noise(s, p, 20_000) for p in (0, 1, 2**40)] for s in (0, 1, 2**63)]).reshape(9, -1)
    assert abs(drawn.mean()) < 0.01 and abs(drawn.var() - 1) < 0.02 and abs((drawn**4).mean() - 2.9) < 0.1
    assert np.abs(drawn).max() < 6
    between = np.corrcoef(np.concatenate([drawn, np.roll(drawn, 1, axis=1)])) - np.eye(18)
    assert np.abs(between).max() < 0.035  # 5 standard deviations
    np.testing.assert_array_equal(noise(3, 4, 5), noise(3, 4, 50)[:5])
    assert noise(3, 4, 0).shape == (0,)


@pytest.mark.parametrize("case", GOLDEN["tokens"], ids=lambda case: case["name"])
def test_tokens_are_those_on_record(case: dict[str, Any]):
    """A change of the sampler that changes texts must be noticed, and is one in every language."""
    source = case["logits"]
    if "list" in source:
        logits = np.array(source["list"], np.float32)
    else:
        logits = noise(*source["noise"]) * np.float32(source["times"])
    sampler = Sampler(Sampling(**case["options"] | {"seed": int(case["options"]["seed"])}))
    assert [sampler.pick(logits, [(a, b) for a, b in case["unused"]]) for _ in case["tokens"]] == case["tokens"]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float):
    logits = np.array([0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 1.5, 0.2])
    tokens = draws(20_000, logits, temperature=temperature, seed=3)
    assert chi_square(tokens, softmax(logits, temperature)) < 29.9  # 7 degrees of freedom, exceeded 1 time in 10,000


def test_greedy_is_the_largest_logit_and_the_lowest_index_on_ties():
    assert draws(3, temperature=0).tolist() == [LOGITS.argmax()] * 3
    assert Sampler(Sampling(temperature=0)).pick(np.array([1.0, 3.0, 3.0])) == 1


def test_a_tiny_temperature_is_greedy():
    assert set(draws(50, temperature=1e-320)) == {int(LOGITS.argmax())}


def test_top_k_keeps_the_largest_and_decides_ties_for_the_lower_index():
    kept = probabilities(LOGITS, Sampling(temperature=1, top_k=5))
    assert set(np.flatnonzero(kept)) == set(np.argsort(-LOGITS)[:5])
    assert kept.sum() == pytest.approx(1)
    assert np.flatnonzero(probabilities(np.zeros(6), Sampling(top_k=2))).tolist() == [0, 1]
    assert chi_square(draws(20_000, temperature=1, top_k=5, seed=2), kept) < 23.6  # 4 degrees of freedom


def test_top_p_keeps_the_smallest_sufficient_set():
    logits = np.log([0.1, 0.4, 0.3, 0.2])
    for top_p, expected in ((0.3, [1]), (0.4, [1]), (0.41, [1, 2]), (0.75, [1, 2, 3]), (0.95, [0, 1, 2, 3])):
        kept = probabilities(logits, Sampling(temperature=1, top_p=top_p - 1e-9))
        assert np.flatnonzero(kept).tolist() == expected, top_p


def test_top_p_counts_what_top_k_left():
    logits = np.log([0.4, 0.3, 0.2, 0.1])  # of the two kept ones, the first has 0.4 / 0.7 = 0.57
    assert np.flatnonzero(probabilities(logits, Sampling(temperature=1, top_k=2, top_p=0.5))).tolist() == [0]


def test_one_random_number_per_token_whatever_the_options():
    """On equal logits a draw u is token floor(8 u) of 8 and floor(4 u) of 4: the streams can be compared."""
    logits = np.zeros(8)
    every, half = draws(300, logits, seed=5), draws(300, logits, top_k=4, seed=5)
    assert (every // 2 == half).all()
    sampler, greedy = Sampler(Sampling(seed=5)), Sampler(Sampling(seed=5, temperature=0))
    for _ in range(10):
        sampler.pick(logits), greedy.pick(logits)
    assert sampler._random.next() == greedy._random.next()


def test_minus_infinity_is_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 0.0])
    assert set(draws(200, logits)) == {1, 3}


@pytest.mark.parametrize("logits", [[0.0, np.nan], [np.inf, 0.0], [-np.inf, -np.inf]])
def test_logits_that_are_not_numbers(logits: list[float]):
    with pytest.raises(UserError) as caught:
        Sampler(Sampling()).pick(np.array(logits))
    assert_one_line(str(caught.value), "damaged")


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -0.1), ("temperature", float("nan")), ("temperature", float("inf")), ("top_k", -1), ("top_p", 0.0),
     ("top_p", 1.1), ("top_p", float("nan")), ("seed", -1), ("seed", 2**64)],
)  # fmt: skip
def test_options_out_of_range_name_the_setting(option: str, value: float):
    with pytest.raises(ArgumentError) as caught:
        Sampling(**{option: value})
    assert_one_line(str(caught.value), f"{option}: got {value}")
