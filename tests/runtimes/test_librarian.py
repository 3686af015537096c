"""Retrieval at run time: when the knowledge base is asked, what the model then reads, and what happens when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import ALPHABET, assert_one_line, mixed_model, random_tokens

from rmse_edge.errors import UserError
from rmse_edge.knowledge import Hit, KnowledgeError, KnowledgeInfo
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.base import Surprise
from rmse_edge.runtimes.text.generate import Generation
from rmse_edge.runtimes.text.librarian import Librarian
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.runtimes.text.speculation import Speculation
from rmse_edge.text import Tokenizer, train_character_tokenizer


def reading_model() -> Any:
    model = mixed_model(memory="titans", memory_dim=16, memory_hidden=32, retrieval_slots=2, retrieval_hits=3,
                        retrieval_dim=16)  # fmt: skip
    with torch.no_grad():
        model.memory.surprise_prior.copy_(torch.tensor([0.5, 0.01, 16.0]))
    return model


@pytest.fixture(scope="module")
def shared() -> TorchRuntime:
    return TorchRuntime(reading_model(), "reader")


@pytest.fixture
def runtime(shared: TorchRuntime) -> TorchRuntime:
    shared.reset()
    shared.on_surprise = None
    return shared


class Shelf:
    """Passages of random tokens, embedded by the model and searched one by one: exact, and without an index."""

    def __init__(self, runtime: TorchRuntime, count: int = 12) -> None:
        space = runtime.info.retrieval
        assert space is not None
        self.info = KnowledgeInfo(int(space["key_dims"]), int(space["slots"]), 64, runtime.info.fingerprint, count)
        self.entries = [runtime.embed(random_tokens(5 + i, seed=i)) for i in range(count)]
        self.asked: list[np.ndarray] = []
        self.fails: str | None = None

    def search(self, key: np.ndarray, n: int) -> list[Hit]:
        self.asked.append(key)
        if self.fails:
            raise KnowledgeError(self.fails)
        scores = np.array([float(k @ key) for k, _ in self.entries])
        best = np.argsort(-scores)[:n]
        return [Hit(int(i), f"passage {i}", f"notes.txt:{i}", float(scores[i]), self.entries[i][1]) for i in best]

    def close(self) -> None:
        pass


def feed(runtime: TorchRuntime, count: int, seed: int = 3) -> np.ndarray:
    return runtime.feed(random_tokens(count, seed=seed), runtime.info.dials).logits


def test_above_counts_deviations_and_needs_something_to_compare_with() -> None:
    assert Surprise(64, 0.9, 0.5, 0.1, 3).above(3.9) and not Surprise(64, 0.9, 0.5, 0.1, 3).above(4.1)
    assert not Surprise(64, 0.9, 0.0, 0.0, 0).above(1.0)


def test_a_surprising_segment_is_looked_up_and_read_until_the_next_boundary(runtime: TorchRuntime) -> None:
    shelf = Shelf(runtime)
    plain = feed(runtime, 192)
    runtime.reset()
    asked_at: list[int] = []
    librarian = Librarian.attach(runtime, shelf, "kb", gamma=-1e6)
    runtime.on_surprise = lambda s: (asked_at.append(s.position), s.position == 64 and librarian.hear(s))
    read = feed(runtime, 192)
    assert asked_at == [64, 128, 192] and len(librarian.consultations) == 1 == len(shelf.asked)
    assert np.abs(read[:64] - plain[:64]).max() == 0
    assert np.abs(read[64:128] - plain[64:128]).max(1).min() > 0, "every token up to the boundary reads the hits"
    found = librarian.consultations[0]
    assert [h.id for h in found.hits] == [h.id for h in shelf.search(shelf.asked[0], 3)]
    assert not any(array.any() for array in runtime.retrieved.values()), "forgotten at the next boundary"


@pytest.mark.parametrize(("gamma", "times"), [(-1e6, 3), (1e6, 0)])
def test_gamma_decides_how_often(runtime: TorchRuntime, gamma: float, times: int) -> None:
    librarian = Librarian.attach(runtime, Shelf(runtime), "kb", gamma=gamma)
    feed(runtime, 200)
    assert librarian.heard == 3 and len(librarian.consultations) == times


def test_speculation_asks_when_plain_decoding_asks_and_says_the_same(runtime: TorchRuntime, tmp_path: Path) -> None:
    """Drafts tell the segment nothing, and read the hits that there are."""
    train_character_tokenizer(ALPHABET, tmp_path / "tokenizer.json")
    tokenizer, said = Tokenizer(tmp_path / "tokenizer.json"), []
    for speculation in (None, Speculation(1, 4)):
        runtime.reset()
        librarian = Librarian.attach(runtime, Shelf(runtime), "kb", gamma=-1e6)
        made = Generation(
            runtime, tokenizer, random_tokens(20, seed=5), runtime.info.full_depth, Sampler(Sampling(temperature=0)), 60,
            librarian=librarian, speculation=speculation,
        )  # fmt: skip
        list(made.steps())
        asked = [(c.surprise.position, [hit.text for hit in c.hits]) for c in librarian.consultations]
        said.append((made.tokens, asked))
    assert said[0] == said[1] and [position for position, _ in said[0][1]] == [19, 64]


def test_a_short_question_is_looked_up_before_its_answer(runtime: TorchRuntime, tmp_path: Path) -> None:
    """The segment is not complete, nothing is learned, and already the first new token has read the hits."""
    train_character_tokenizer(ALPHABET, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    prompt = random_tokens(20, seed=5)
    memory = {name: np.array(array) for name, array in runtime.memory.items()}
    made = {}
    for name, gamma in (("asked", -1e6), ("not asked", 1e6)):
        runtime.reset()
        librarian = Librarian.attach(runtime, Shelf(runtime), "kb", gamma=gamma)
        generation = Generation(
            runtime, tokenizer, prompt, runtime.info.dials, Sampler(Sampling(temperature=0)), 1, librarian=librarian
        )
        list(generation.steps())
        assert len(generation.prompt_depth) == 20
        made[name] = generation.statistics()["consultations"]
        after = {name: np.array(array) for name, array in runtime.memory.items()}
        assert all((after[n] == memory[n]).all() for n in memory)
        runtime.reset()
    assert [c["position"] for c in made["asked"]] == [19] and made["not asked"] == []
    by_hand = TorchRuntime(runtime.model, "hand")
    by_hand.feed(prompt[:19], by_hand.info.dials)
    query = by_hand.query()
    hits = Shelf(by_hand).search(query, 3)
    by_hand.inject(np.stack([h.value for h in hits]), np.array([h.score for h in hits]))
    expected = by_hand.feed(prompt[19:], by_hand.info.dials).logits
    runtime.reset()
    Librarian.attach(runtime, Shelf(runtime), "kb", gamma=-1e6)
    runtime.feed(prompt[:19], runtime.info.dials)
    runtime.on_surprise = None
    plain = runtime.feed(prompt[19:], runtime.info.dials).logits
    assert np.abs(expected - plain).max() > 1e-4


def test_better_matches_weigh_more(runtime: TorchRuntime) -> None:
    values = np.stack([runtime.embed(random_tokens(9, seed=i))[1] for i in range(2)])
    results = []
    for scores in ([0.9, -0.9], [-0.9, 0.9]):
        runtime.reset()
        runtime.inject(values, np.array(scores))
        results.append(feed(runtime, 5))
    runtime.reset()
    runtime.inject(values[:1], np.array([0.9]))
    alone = feed(runtime, 5)
    assert np.abs(results[0] - alone).max() < np.abs(results[1] - alone).max()


def test_a_failing_knowledge_base_ends_the_text_unless_it_is_optional(runtime: TorchRuntime) -> None:
    shelf = Shelf(runtime)
    shelf.fails = "kb: does not answer"
    Librarian.attach(runtime, shelf, "kb", gamma=-1e6)
    with pytest.raises(KnowledgeError, match="does not answer"):
        feed(runtime, 130)
    runtime.reset()
    said: list[str] = []
    librarian = Librarian.attach(runtime, shelf, "kb", gamma=-1e6, optional=True, warn=said.append)
    read = feed(runtime, 200)
    assert said == ["going on without retrieval: kb: does not answer"] and librarian.failed == "kb: does not answer"
    runtime.on_surprise = None
    runtime.reset()
    assert np.array_equal(read, feed(runtime, 200))


def test_a_knowledge_base_of_another_model_and_impossible_settings_are_refused(runtime: TorchRuntime) -> None:
    shelf = Shelf(runtime, 1)
    for change in ({"key_dims": 8}, {"slots": 5}, {"model": "0" * 64}):
        other = Shelf(runtime, 1)
        other.info = KnowledgeInfo(**(vars(shelf.info) | change))
        with pytest.raises(KnowledgeError) as error:
            Librarian.attach(runtime, other, "my.kb")
        assert_one_line(str(error.value), "my.kb", "another model")
    with pytest.raises(UserError, match=r"^hits: got 4, expected 1..3"):
        Librarian.attach(runtime, shelf, "kb", hits=4)
    with pytest.raises(UserError, match="has no retrieval head"):
        Librarian.attach(TorchRuntime(mixed_model(), "plain"), shelf, "kb")
