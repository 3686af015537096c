"""Figures of models whose answers are known: loops that change nothing, a state that settles, one that never does."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from ouro_models import lively_ouro
from paths import ROOT
from small_models import lively_model, small_config
from torch import Tensor, nn

from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import UserError
from rmse_edge.probe import difficulty, diversity
from rmse_edge.probe.exits import frontiers, scores
from rmse_edge.probe.measures import by_iteration, settled_at, settling, verdicts
from rmse_edge.probe.readings import read
from rmse_edge.probe.subjects import Layered, Looped
from rmse_edge.train.gpt import GPT, GPTConfig

VOCABULARY, LOOPS = 11, 5


class Course:
    """A subject whose state is that of `places` on a circle: after each loop so many steps away from where a token began."""

    def __init__(self, places: list[float]) -> None:
        draw = torch.Generator().manual_seed(0)
        self.model = nn.Identity()
        self.vocab_size, self.length, self.places = VOCABULARY, 16, places
        self.embedding = torch.randn(VOCABULARY, 8, generator=draw)
        self.head = torch.randn(VOCABULARY, 8, generator=draw)

    def course(self, tokens: Tensor) -> tuple[list[Tensor], None]:
        x = self.embedding[tokens]
        a, b = x[..., :4], x[..., 4:]
        angles = torch.tensor(self.places)
        return [torch.cat([a * c - b * s, a * s + b * c], -1) for c, s in zip(angles.cos(), angles.sin())], None

    def vectors(self, state: Tensor) -> Tensor:
        return state

    def logits(self, state: Tensor) -> Tensor:
        return state @ self.head.T


def blocks(count: int = 6, length: int = 16, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, length + 1))


def said(
    subject: Any, epsilon: float = 0.1, **sizes: int
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    readings = read(subject, blocks(**sizes))
    claims = {v.claim: v.verdict for v in verdicts(readings)}
    return by_iteration(readings, epsilon), settling(readings, epsilon), claims


def test_loops_that_change_nothing() -> None:
    """Ouro, whose layers add nothing: every loop is the norm of what was normed."""
    model = lively_ouro(total_ut_steps=LOOPS)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.input_layernorm_2, layer.post_attention_layernorm_2):
                norm.weight.zero_()
    rows, settled, claims = said(Looped(model), vocabulary=65)
    first = rows[0]
    for row in rows:
        assert row["loss"] == pytest.approx(first["loss"], abs=1e-5) and row["kl_to_last"] < 1e-5
        assert row["cosine_to_last"] == pytest.approx(1, abs=1e-5) and row["agrees_with_last"] == 1
    assert all(row["change"] < 1e-4 and row["settled"] == 1 for row in rows[1:-1])
    assert settled["tokens"] == {"1": 96, "2": 0, "3": 0, "4": 0} and settled["moved_to_the_end"] == 0
    assert set(claims.values()) == {"kept"}


def test_a_state_that_settles_at_the_second_loop() -> None:
    rows, settled, claims = said(Course([0.0, 1.5, 1.5, 1.5, 1.5]))
    assert settled["tokens"] == {"1": 0, "2": 96, "3": 0, "4": 0} and settled["moved_to_the_end"] == 0
    assert [row["settled"] for row in rows] == [0, 1, 1, 1, None]
    assert rows[1]["change"] == pytest.approx(2 * np.sin(0.75), abs=1e-5)  # a chord of 1.5 radians
    assert [row["change"] for row in rows[2:]] == [0, 0, 0] and rows[0]["change"] is None
    assert rows[0]["cosine_to_last"] == pytest.approx(np.cos(1.5), abs=1e-5)
    assert claims["the state moves less with every iteration"] == "kept"


def test_a_state_that_never_settles() -> None:
    rows, settled, claims = said(Course([0.0, 0.2, 0.5, 0.9, 1.4]))
    assert settled["moved_to_the_end"] == 96 and sum(settled["tokens"].values()) == 0
    assert [row["settled"] for row in rows[:-1]] == [0, 0, 0, 0]
    assert claims["the state moves less with every iteration"] == "refuted"


def test_figures_are_what_their_names_say() -> None:
    """Against the formulas, from one token's logits."""
    subject, given = Course([0.0, 0.4, 0.9]), blocks(2, 3)
    readings = read(subject, given)
    states, _ = subject.course(torch.from_numpy(given[:, :-1]))
    p = [torch.softmax(subject.logits(s).double(), -1)[1, 2].numpy() for s in states]
    for k in range(3):
        assert readings.loss[k, 1, 2] == pytest.approx(-np.log(p[k][given[1, 3]]), rel=1e-5)
        assert readings.entropy[k, 1, 2] == pytest.approx(-(p[k] * np.log(p[k])).sum(), rel=1e-5)
        assert readings.kl[k, 1, 2] == pytest.approx((p[2] * np.log(p[2] / p[k])).sum(), abs=1e-5)
        assert readings.likeliest[k, 1, 2] == p[k].argmax()
        logits = np.sort(subject.logits(states[k])[1, 2].numpy())
        assert readings.lead[k, 1, 2] == pytest.approx(logits[-1] - logits[-2], rel=1e-4)
        if k:
            assert readings.kl_to_before[k, 1, 2] == pytest.approx((p[k] * np.log(p[k] / p[k - 1])).sum(), abs=1e-5)
    assert readings.overlap is None and readings.brake is None and np.isnan(readings.kl_to_before[0]).all()


def test_exits_are_those_of_the_rules() -> None:
    """Ouro's brake is what its own exits compare; a threshold of the change gives the depths that the model's rule gives."""
    model = lively_ouro(total_ut_steps=LOOPS)
    readings = read(Looped(model), blocks(vocabulary=65))
    found = frontiers(readings)
    assert list(found["rules"]) == ["gate", "change", "entropy", "KL", "lead", "Prophet"]
    assert found["fixed"] == pytest.approx(readings.loss.mean((1, 2)).tolist())
    for name, score in scores(readings).items():
        for row in found["rules"][name]["rows"]:
            depth = [[next((k for k in range(LOOPS - 1) if score[k, i, t] >= row["threshold"]), LOOPS - 1)
                      for t in range(16)] for i in range(6)]  # fmt: skip
            picked = np.take_along_axis(readings.loss, np.array(depth)[None], 0)
            assert row["loss"] == pytest.approx(picked.mean()) and row["mean_iterations"] == np.mean(depth) + 1
        assert found["rules"][name]["rows"][-1]["mean_iterations"] > found["rules"][name]["rows"][0]["mean_iterations"]
    assert readings.brake is not None
    reader = Looped(model).reader
    with torch.no_grad():
        own = reader.read(torch.from_numpy(blocks(vocabulary=65)[:, :-1])).gates
    assert own is not None
    assert np.allclose(readings.brake, 1 - torch.sigmoid(-own).cumprod(0).numpy(), atol=1e-6)
    assert np.isneginf(scores(readings)["change"][0]).all()


def test_settled_is_where_the_next_change_is_small() -> None:
    change = np.array([[np.nan] * 4, [0.5, 0.01, 0.5, 0.5], [0.01, 0.5, 0.5, 0.5], [0.01, 0.5, 0.05, 0.5]])
    assert settled_at(change, 0.1).tolist() == [2, 1, 3, 4]


def test_layers_of_a_gpt_are_read_through_its_last_norm() -> None:
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=VOCABULARY, d_model=16, n_heads=2, n_layers=3, block_size=16)).eval()
    subject = Layered(model)
    tokens = torch.from_numpy(blocks()[:, :-1])
    states, _ = subject.course(tokens)
    with torch.no_grad():
        assert torch.allclose(subject.logits(states[-1]), model(tokens), atol=1e-6)
    assert len(states) == 3
    assert not any(torch.allclose(a, b) for a, b in itertools.pairwise(states))


def test_experts_in_common_and_codes_given_back() -> None:
    model = lively_model(small_config())
    before = {name: t.clone() for name, t in model.state_dict().items()}
    subject = Looped(model)
    readings = read(subject, blocks(vocabulary=37))
    assert readings.overlap is not None and readings.overlap.shape == (5, 5)
    assert np.allclose(readings.overlap.diagonal(), 1) and np.allclose(readings.overlap, readings.overlap.T)
    assert 0 < readings.overlap[0, 4] < 1 and model.block.experts.observer is None
    found = diversity.exchanged(subject, blocks(2, vocabulary=37))
    assert found is not None
    assert np.allclose(np.diag(found["loss"]), read(subject, blocks(2, vocabulary=37)).loss[-1].mean(), atol=1e-5)
    assert len(np.unique(np.round(found["loss"], 6))) == 21  # every exchange changes something, and only the others do
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert diversity.exchanged(Looped(lively_ouro()), blocks(2, vocabulary=65)) is None


def test_a_model_of_boards_is_refused() -> None:
    with pytest.raises(UserError, match=r"^model_type trm: reads no texts"):
        Looped(load_checkpoint(ROOT / "models" / "trm-sudoku"))


def test_ngrams_are_witten_bells() -> None:
    """Against the formula written out, on a text of three letters; the probabilities of all letters add up to 1."""
    ids = np.random.default_rng(1).integers(0, 3, 60)
    judge = difficulty.NGrams(ids, 3)
    texts = [tuple(ids[i : i + n].tolist()) for n in range(1, 6) for i in range(len(ids) - n + 1)]

    def p(context: tuple[int, ...], token: int) -> float:
        lower = p(context[1:], token) if context else 1 / 3
        following = [t[-1] for t in texts if len(t) == len(context) + 1 and t[:-1] == context]
        if not following:
            return lower
        types = len(set(following))
        return (following.count(token) + types * lower) / (len(following) + types)

    row = np.array([[0, 1, 2, 2, 1, 0, 0]])
    losses = judge.losses(row[:, :-1], row[:, 1:])[0]
    for t in range(6):
        context = tuple(row[0, max(0, t - 3) : t + 1].tolist())
        assert losses[t] == pytest.approx(-np.log(p(context, int(row[0, t + 1]))), rel=1e-9)
    every = [judge.losses(row[:, :-1], np.concatenate([row[:, 1:-1], [[token]]], 1))[0, -1] for token in range(3)]
    assert np.exp(-np.array(every)).sum() == pytest.approx(1)


def test_ngrams_of_a_large_vocabulary_are_shorter() -> None:
    ids = np.random.default_rng(0).integers(0, 200_000, 400)
    judge = difficulty.NGrams(ids, 200_000)
    assert len(judge.tables) == 3 and all((grams >= 0).all() for *_, grams, _ in judge.tables)


def test_correlation_takes_rarity_out() -> None:
    draw = np.random.default_rng(0)
    rare, own = draw.standard_normal((40, 50)), draw.standard_normal((40, 50))
    noise = draw.standard_normal((40, 50))
    by_rarity = difficulty.correlation(rare + 0.3 * noise, rare + 0.3 * own, rare, 0)
    assert by_rarity["spearman"] > 0.85 and abs(by_rarity["given_rarity"]) < 0.06
    low, high = by_rarity["given_rarity_interval"]
    assert low < 0 < high
    by_itself = difficulty.correlation(own + 0.3 * noise, own, rare, 0)
    assert by_itself["given_rarity"] > 0.9 and by_itself["given_rarity_interval"][0] > 0.9
    assert by_itself["settled_by_tenth"] == sorted(by_itself["settled_by_tenth"])
    flat = difficulty.correlation(np.full((4, 5), 3), own[:4, :5], rare[:4, :5], 0)
    assert flat["spearman"] == 0
