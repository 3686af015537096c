"""Questions about made-up facts: what retrieval is trained and measured on.

Text is chatter, word following word by a fixed random chain. Now and then it asks:

    chatter ... Q first last relation A value . chatter ...        passage: first last relation value .

Subjects (first, last) are drawn anew for every question and their facts are random, so no answer can be learned: it has
to be fetched and read. The passages of a question, the right one among distractors, are embedded by the model itself;
a segment's query learns to find its passage among all passages of the batch (van den Oord et al. 2018, InfoNCE), and the
answer teaches how to read what was found. One subject in ten is never drawn in training.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.arch.rmse.model import RMSE, Hits
from rmse_edge.errors import ConfigError
from rmse_edge.files import new_file
from rmse_edge.numbers import SEGMENT
from rmse_edge.schema import check_fields

from .sources import IGNORED, Batch, Part, Plural, Seed, Sized, check_memory

QUESTION, ANSWER, STOP = 0, 1, 2  # tokens; then first names, last names, relations, values, words
ASKED = 5  # tokens from Q to A
PASSAGE = 5  # tokens
TEMPERATURE = 0.05  # of the contrastive loss
HELD_OUT = 10  # every so many-th subject


@dataclass(frozen=True)
class Facts:
    """Sizes of the made-up world."""

    names: Plural = 64  # first names, and as many last names
    relations: Sized = 8
    values: Plural = 64
    words: Sized = 48
    segments: Sized = 3  # of a training sequence
    ask: Part = 0.8  # share of segments with a question
    across: Part = 0.3  # of them, how many are answered in the next segment
    empty: Part = 0.1  # of them, how many find nothing; what they should answer is not asked
    hits: Plural = 4  # passages injected, the right one and distractors

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @property
    def offsets(self) -> dict[str, int]:
        """The first token of each kind."""
        sizes = {"first": self.names, "last": self.names, "relation": self.relations, "value": self.values, "word": 0}
        found, at = {}, STOP + 1
        for kind, size in sizes.items():
            found[kind], at = at, at + size
        return found

    @property
    def vocab_size(self) -> int:
        return self.offsets["word"] + self.words

    def check_model(self, config: Any) -> None:
        check_memory("facts", self.vocab_size, config)
        if not config.retrieval_slots:
            raise ConfigError("model.retrieval_slots: got 0, the task facts needs at least 1")
        if self.hits > config.retrieval_hits:
            raise ConfigError(
                f"task facts: hits: got {self.hits}, expected at most retrieval_hits ({config.retrieval_hits})"
            )

    def vocabulary(self) -> list[str]:
        """A word for every token, so that the model can be talked to: "? Bada Kobo likes >" is answered by a noun."""
        names = (*made_up_words(self.names, "aeiou", "bdfgklmn"), *made_up_words(self.names, "oaiue", "prstvzhj"))
        relations = "likes fears sells paints owns guards seeks builds".split()
        relations += [f"relates{i}" for i in range(len(relations), self.relations)]
        nouns = [f"{word}on" for word in made_up_words(self.values, "eaoiu", "klmnbrst")]
        chat = [f"{word}s" for word in made_up_words(self.words, "iouae", "gtnmrbdp")]
        return ["?", ">", ".", *(n.capitalize() for n in names), *relations[: self.relations], *nouns, *chat]

    @property
    def fingerprint(self) -> str:
        return json.dumps({"task": "facts"} | dataclasses.asdict(self))

    # ------------------------------------------------------------------------------------------------ the world

    def chatter(self, draw: np.random.Generator, count: int, length: int) -> np.ndarray:
        """(count, length) tokens: each word has three successors, the first of them seven times out of ten."""
        chain = np.random.default_rng(12345).integers(0, self.words, (self.words, 3))
        text = np.zeros((count, length), np.int64)
        word = draw.integers(0, self.words, count)
        for i in range(length):
            word = chain[word, draw.choice(3, count, p=[0.7, 0.2, 0.1])]
            text[:, i] = word
        return text + self.offsets["word"]

    def fact(self, draw: np.random.Generator, held_out: bool) -> np.ndarray:
        """(PASSAGE,) tokens."""
        while True:
            first, last = (int(n) for n in draw.integers(0, self.names, 2))
            if ((first * self.names + last) % HELD_OUT == 0) == held_out:
                break
        at = self.offsets
        relation, value = draw.integers(0, self.relations), draw.integers(0, self.values)
        return np.array([at["first"] + first, at["last"] + last, at["relation"] + relation, at["value"] + value, STOP])

    def passages(self, draw: np.random.Generator, fact: np.ndarray, held_out: bool) -> tuple[np.ndarray, int]:
        """`hits` passages, (hits, PASSAGE), and which of them is `fact`: the others share its subject or relation."""
        found = [fact]
        while len(found) < self.hits:
            other = self.fact(draw, held_out)
            kind = draw.integers(3)
            if kind == 0:
                other[:2] = fact[:2]
            elif kind == 1:
                other[[0, 2]] = fact[[0, 2]]
            if not (other[:3] == fact[:3]).all():
                found.append(other)
        order = draw.permutation(self.hits)
        return np.stack(found)[order], int(np.flatnonzero(order == 0)[0])

    # ------------------------------------------------------------------------------------------------ examples

    def batch(self, count: int, seed: Seed) -> Batch:
        return self.draw(np.random.default_rng(seed), count)

    def validation(self, count: int) -> Batch:
        return self.draw(np.random.default_rng(2**31), count, held_out=True)

    def calibration(self) -> Tensor:
        """Chatter without questions."""
        return torch.from_numpy(self.chatter(np.random.default_rng(2**31 + 1), 16, 8 * SEGMENT))

    def draw(self, draw: np.random.Generator, count: int, held_out: bool = False) -> Batch:
        """`count` sequences with their passages.

        Returns:
            Beside tokens and targets, for each of the S segments: passages (B, S, hits, PASSAGE); valid (B, S) bool,
            whether they are injected; since (B, S), from which row on; truth (B, S), which of them the segment's query
            should find, -1 for none; rows (B, S), how many rows the query is made of.
        """
        shape = (count, self.segments)
        text = self.chatter(draw, count, self.segments * SEGMENT + 1)
        tokens, targets = text[:, :-1].copy(), text[:, 1:].copy()
        targets[draw.random(targets.shape) > 0.05] = IGNORED  # chatter would outweigh the answers
        passages = np.full((*shape, self.hits, PASSAGE), STOP, np.int64)
        valid, since = np.zeros(shape, bool), np.zeros(shape, np.int64)
        truth, rows = np.full(shape, -1), np.ones(shape, np.int64)
        for b in range(count):
            taken = False  # the segment's beginning answers the question of the one before
            for s in range(self.segments):
                if taken or draw.random() > self.ask:
                    taken = False
                    continue
                fact = self.fact(draw, held_out)
                found, which = self.passages(draw, fact, held_out)
                taken = s + 1 < self.segments and draw.random() < self.across
                seen = s + taken  # the segment that gets the hits
                passages[b, s], truth[b, s] = found, which
                passages[b, seen] = found
                row = SEGMENT - (ASKED - 1) if taken else int(draw.integers(0, SEGMENT - ASKED - 2))
                rows[b, s] = SEGMENT if taken else row + ASKED - 1
                since[b, seen] = 0 if taken else row + ASKED - 1
                valid[b, seen] = draw.random() >= self.empty
                at = s * SEGMENT + row
                tokens[b, at : at + ASKED + 2] = [QUESTION, *fact[:3], ANSWER, fact[3], STOP]
                targets[b, at : at + ASKED + 2] = IGNORED
                if valid[b, seen]:
                    targets[b, at + ASKED - 1] = fact[3]
        arrays = dict(
            tokens=tokens, targets=targets, passages=passages, valid=valid, since=since, truth=truth, rows=rows
        )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    # ------------------------------------------------------------------------------------------------ measuring

    @torch.no_grad()
    def evaluate(self, model: RMSE, questions: int = 256, filler: int = 20) -> dict[str, Any]:
        """Share of right answers about subjects never seen in training, by what the knowledge base holds.

        Each question stands after `filler` words of chatter. The knowledge base holds two facts for each: the one asked
        for and a distractor. "swapped" asks the same questions of another knowledge base and wants its answers.
        """
        model.eval()
        draw = np.random.default_rng(2**31 + 2)
        asked = {tuple(fact[:3]): fact for fact in (self.fact(draw, True) for _ in range(questions))}
        facts = np.stack(list(asked.values()))
        choices = [self.passages(draw, fact, True) for fact in facts]
        others = np.stack([passages[(which + 1) % self.hits] for passages, which in choices])
        clash = np.array([tuple(other[:3]) in asked for other in others])
        swapped = facts.copy()
        values = facts[:, 3] - self.offsets["value"]
        swapped[:, 3] = (
            self.offsets["value"] + (values + 1 + draw.integers(0, self.values - 1, len(facts))) % self.values
        )
        chatter = self.chatter(draw, len(facts), filler)
        asks = np.concatenate([np.full((len(facts), 1), QUESTION), facts[:, :3]], 1)
        prompts = torch.from_numpy(np.concatenate([chatter, asks, np.full((len(facts), 1), ANSWER)], 1))
        result: dict[str, Any] = {"questions": len(facts), "chance": 1 / self.values}
        for name, base in (("with", facts), ("swapped", swapped)):
            known = torch.from_numpy(np.concatenate([base, others[~clash]]))
            answers, found = self.answer(model, prompts, known)
            result[name] = float((answers == torch.from_numpy(base[:, 3])).float().mean())
            result[f"found_{name}"] = float((found == torch.arange(len(base))[:, None]).any(1).float().mean())
        answers, _ = self.answer(model, prompts, None)
        result["without"] = float((answers == torch.from_numpy(facts[:, 3])).float().mean())
        return result

    def answer(self, model: RMSE, prompts: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """The likeliest token after each prompt (n, T), and which passages of `known` (N, PASSAGE) it was given."""
        assert model.retrieval is not None
        states, _, _ = model.trajectory(prompts)
        if known is None:
            return model.head_proj(states[-1][:, -1]).argmax(-1), torch.zeros(len(prompts), 0, dtype=torch.int64)
        keys, values = embed_passages(model, known, model.config.max_loops)
        rows = torch.full((len(prompts),), prompts.shape[1] - 1)
        query = model.retrieval.embed(states[-1], rows)[1]
        scores, found = (query @ keys.T).topk(self.hits, 1)
        each = scores.repeat_interleave(values.shape[1], 1)[:, None]  # (n, 1, hits * slots)
        hits = Hits(values[found].flatten(1, 2)[:, None], each, torch.ones_like(each, dtype=torch.bool), rows[:, None])
        states, _, _ = model.trajectory(prompts, hits=hits)
        return model.head_proj(states[-1][:, -1]).argmax(-1), found

    def draw_plot(self, result: dict[str, Any], picture: Path, window: int) -> None:
        """Answers by knowledge base."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(5, 3.5))
        names = ("with", "swapped", "without")
        bars = axis.bar(
            ["with its\nknowledge base", "with another\n(its answers)", "without"], [result[n] for n in names]
        )
        axis.bar_label(bars, [f"{result[n]:.1%}" for n in names])
        axis.axhline(result["chance"], color="grey", lw=0.8, ls=":")
        axis.set_ylabel("right answers")
        axis.set_ylim(0, 1.1)
        figure.tight_layout()
        with new_file(picture) as part:
            figure.savefig(part, dpi=110)
        plt.close(figure)


def made_up_words(count: int, vowels: str, consonants: str) -> list[str]:
    """`count` different words of two syllables or more."""
    syllables = [c + v for c in consonants for v in vowels]
    draw = np.random.default_rng(len(vowels) * 1000 + ord(consonants[0]))
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(draw.choice(syllables, 2 if len(words) < 1000 else 3))] = None
    return list(words)


def embed_passages(model: RMSE, passages: Tensor, loops: int) -> tuple[Tensor, Tensor]:
    """(N, T) tokens, T at most 64 -> keys (N, retrieval_dim) and values (N, slots, d), each read from an empty past."""
    assert model.retrieval is not None
    states, _, _ = model.trajectory(passages, loops)
    count = torch.full((len(passages),), passages.shape[1], device=passages.device)
    key, _, value = model.retrieval.embed(states[-1], count)
    return key, value


def fetched(model: RMSE, batch: Batch, loops: int) -> tuple[Hits, Tensor]:
    """Embed the passages of a batch: what each segment is given, and all keys (B, S, hits, retrieval_dim).

    The hits are scored by the queries of a first pass without hits, as a host would; no gradient flows there.
    """
    shape = batch["passages"].shape[:3]
    keys, values = (t.unflatten(0, shape) for t in embed_passages(model, batch["passages"].flatten(0, 2), loops))
    with torch.no_grad():
        states, _, _ = model.trajectory(batch["tokens"], loops)
        query = queries(model, states[-1], batch["rows"])  # (B, S, retrieval_dim)
        # A segment that only gets an answer is given what the one before it asked for.
        before = torch.cat([query[:, :1], query[:, :-1]], 1)
        query = torch.where((batch["truth"] >= 0).unsqueeze(-1), query, before)
        scores = (keys @ query.unsqueeze(-1)).squeeze(-1)  # (B, S, hits)
    scores = scores.repeat_interleave(values.shape[3], 2)
    return Hits(values.flatten(2, 3), scores, batch["valid"].unsqueeze(-1).expand(scores.shape), batch["since"]), keys


def queries(model: RMSE, state: Tensor, rows: Tensor) -> Tensor:
    """What every segment searches for: normed states (B, T, d) and rows (B, S) -> (B, S, retrieval_dim)."""
    assert model.retrieval is not None
    segments = state.unflatten(1, (-1, SEGMENT)).flatten(0, 1)
    return model.retrieval.embed(segments, rows.flatten())[1].unflatten(0, rows.shape)


def search_loss(model: RMSE, state: Tensor, batch: Batch, keys: Tensor) -> Tensor:
    """-log softmax of a query's own passage among all passages of the batch, mean over the segments that ask.

    Args:
        state: (B, T, d) normed exit states.
        keys: (B, S, hits, retrieval_dim).
    """
    asks = batch["truth"] >= 0  # (B, S); a segment that only gets an answer has the passages of the one before
    query = queries(model, state, batch["rows"])[asks]
    own = keys[asks]  # (n, hits, retrieval_dim)
    scores = query @ own.flatten(0, 1).T / TEMPERATURE
    truth = torch.arange(len(own), device=state.device) * own.shape[1] + batch["truth"][asks]
    return F.cross_entropy(scores, truth)
