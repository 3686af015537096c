"""What the parity gate holds packages against: the PyTorch model over a whole text at once.

There is no host in it, no cache, no ring, no plan of calls and no state handed on: `TextModel.whole_text` gives what the
model says of all positions. The runtimes of packages share their host with the runtime of checkpoints
(runtimes/host/text.py), so a comparison of two of them cannot see what that does wrong: a key in the wrong slot is wrong on
both sides alike.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from rmse_edge.info import ModelInfo
from rmse_edge.loop.contract import InjectedHits, TextModel
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.engines.torch import TorchMethods
from rmse_edge.runtimes.host.base import Arrays
from rmse_edge.runtimes.host.calls import longest_prefix

MARGIN = 1e-4  # below it the reference is undecided
LEAST_POSITIONS = 256  # that are compared at any setting, of a model that is not too large
PRODUCTS = 400_000_000_000  # multiplications of weights in one setting: a minute of one core, for the reference
ROUNDED = 32  # of the first, on which `Reference.rounding` is found
PREFIX_TOKENS = 24  # of texts that are compared with a prefix
SINGLES = 32  # of them fed one by one: through the graphs that decode, over a segment's end


@dataclass(frozen=True)
class Course:
    """What n tokens of a text gave."""

    logits: np.ndarray  # (n, V)
    depth: np.ndarray  # (n,)
    surprise: np.ndarray  # (n,) at the last position of every segment, 0 elsewhere


@dataclass(frozen=True)
class ReferenceCourse(Course):
    """The reference's, with what it hung by."""

    margin: np.ndarray  # (n,) smallest distance of each position to another decision
    scores: Mapping[str, np.ndarray] = field(default_factory=dict)  # see `WholeText.scores`, (K, n) each

    def first(self, count: int) -> ReferenceCourse:
        """Of the first `count` positions."""
        values = {f.name: getattr(self, f.name)[:count] for f in dataclasses.fields(self) if f.name != "scores"}
        return ReferenceCourse(**values, scores={name: of_loops[:, :count] for name, of_loops in self.scores.items()})


# What a text is told beside its tokens: the name of an argument of `whole_text` and `LoopRuntime.feed`, and its value.
Told = tuple[tuple[str, int], ...]
# Courses by dials, what the text was told, and text, exit states of segments by text.
Known = tuple[dict[tuple[Dials, Told, bytes], ReferenceCourse], dict[bytes, list[np.ndarray]]]


class Reference:
    """A model, and what it has said so far: a text is computed once per setting, whoever is compared with it.

    Args:
        text: the longest text that is going to be asked for, where that is known: with its first beginning that is asked
            for, all of it is computed.
    """

    def __init__(self, model: TextModel, info: ModelInfo, text: np.ndarray | None = None) -> None:
        if isinstance(model, torch.nn.Module):
            model.eval()
        self.model = model
        self.info = info
        self.methods = TorchMethods(model)
        self._text = np.zeros(0, np.int64) if text is None else text[: info.room]
        self._courses: dict[tuple[Dials, Told, bytes], ReferenceCourse] = {}
        self._segments: dict[bytes, list[np.ndarray]] = {}

    def course(self, tokens: np.ndarray, dials: Dials, told: Told = ()) -> ReferenceCourse:
        """All of `tokens` from an empty past, with hits where `conversation` has them.

        Args:
            told: of the tokens, how many are a prefix, or how many a plan is made of.
        """
        count, whole = len(tokens), self._text
        begins = np.array_equal(whole[:count], tokens)
        if not begins or conversation(count, self.info) != conversation(len(whole), self.info):
            whole = tokens
        key = dials, told, whole.tobytes()
        if key not in self._courses:
            self._courses[key] = self._course(whole, dials, told)
        return self._courses[key].first(count)

    def _course(self, tokens: np.ndarray, dials: Dials, told: Told) -> ReferenceCourse:
        hits = made_up_hits(self.info)
        given = None
        if hits is not None:
            vectors, cosines = (torch.from_numpy(a) for a in hits)
            given = InjectedHits(conversation(len(tokens), self.info)[0], vectors, cosines)
        text, scalars = torch.from_numpy(tokens), self.scalars(dials)
        found = cast(Any, self.model).whole_text(text, scalars, given, **dict(told))
        surprise = np.zeros(len(tokens))
        if (segment := self.info.segment) is not None:
            surprise[segment - 1 :: segment][: len(found.surprise)] = found.surprise.numpy()
        return ReferenceCourse(
            found.logits.numpy(),
            found.depth.numpy(),
            surprise,
            found.margin.numpy(),
            {name: score.numpy() for name, score in found.scores.items()},
        )

    @cached_property
    def rounding(self) -> float:
        """What another order of rounding changes a logit by, about: the most that any of the first positions' changes where
        every weight of a norm, and every other vector of weights, is moved by a rounding of itself. 0: not to be found.
        """
        tokens, full = torch.from_numpy(self._text[:ROUNDED]), self.scalars(self.info.full_depth)
        if not len(tokens):
            return 0.0
        before = self.model.whole_text(tokens, full).logits
        with vectors_moved(self.model):
            return float((self.model.whole_text(tokens, full).logits - before).abs().max())

    def segments(self, tokens: np.ndarray) -> list[np.ndarray]:
        """The exit states (1, 64, d) of every whole segment of `tokens` at full depth: what a memory is taught."""
        key, segment = tokens.tobytes(), self.info.segment
        assert segment is not None
        if key not in self._segments:
            whole = tokens[: len(tokens) // segment * segment]
            h = self.model.whole_text(torch.from_numpy(whole), self.scalars(self.info.full_depth)).h.numpy()
            self._segments[key] = [part[None] for part in h.reshape(-1, segment, h.shape[-1])]
        return self._segments[key]

    def known(self) -> Known:
        """What has been computed so far, for another reference of the same model; see `learn`."""
        return self._courses, self._segments

    def learn(self, known: Known) -> None:
        courses, segments = known
        self._courses |= courses
        self._segments |= segments

    def scalars(self, dials: Dials) -> dict[str, torch.Tensor]:
        """The dials as the model takes them."""
        arrays: Arrays = dials.arrays()
        return {name: torch.from_numpy(arrays[name]) for name in self.model.spec(1).dials}


@contextmanager
def vectors_moved(model: object) -> Iterator[None]:
    """The model with every weight of a norm, and every other vector of weights, a rounding of itself away. These stand in all
    of its layers, so this is about what another order of rounding in each of them does.
    """
    vectors = [p for p in model.parameters() if p.dim() == 1] if isinstance(model, torch.nn.Module) else []
    kept, draw = [p.detach().clone() for p in vectors], torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in vectors:
                p.mul_(1 + (2 * torch.randint(0, 2, p.shape, generator=draw) - 1) * 2.0**-23)
        yield
    finally:
        with torch.no_grad():
            for p, value in zip(vectors, kept):
                p.copy_(value)


def least_positions(info: ModelInfo) -> int:
    """Positions that are compared at least: those that every part of a host needs to take part, so that its rings wrap and a
    memory is read, and up to `LEAST_POSITIONS` where they are affordable.
    """
    length = stretch(info)
    return max(min(LEAST_POSITIONS, affordable(info)), (-(-max(info.window or 0, length) // length) + 2) * length)


def affordable(info: ModelInfo) -> int:
    """Positions for which `PRODUCTS` are enough at full depth."""
    return PRODUCTS // max(1, info.max_loops * info.loop_weights + info.once_weights)


def stretch(info: ModelInfo) -> int:
    """Positions of a segment; of a model without segments, of its largest call."""
    return info.segment or info.chunks[-1]


def conversation(count: int, info: ModelInfo) -> tuple[int, int]:
    """How a text of `count` tokens is fed, as a conversation is: prompts up to the first position given here, then token by
    token up to the second, then a prompt again.

    So large, padded and single-row calls all take part, and each kind reads what the others left behind. The places are
    the same in all texts but short ones, so that one text can be the beginning of another.
    """
    least, length = least_positions(info), stretch(info)
    # Behind a whole window, and so far into a segment that both what comes before and the single tokens pass its end.
    # In a text that is no longer than that, the prompt ends within a call, so that padded ones take part there, too.
    short = count * 2 // 3
    first = least - 2 * length + length * 2 // 3 if count >= least else short - (short > 0 == short % length)
    return first, min(first + SINGLES, count)


def told_prefix(count: int, info: ModelInfo) -> int:
    """Tokens of the prefix with which a text of `count` tokens is compared, too, or that a plan is made of: a part of its first
    call.
    """
    first, length = conversation(count, info)[0], stretch(info)
    return min(PREFIX_TOKENS, longest_prefix(info.chunks, info.segment), first - length if first > length else first)


def made_up_hits(info: ModelInfo) -> tuple[np.ndarray, np.ndarray] | None:
    """As many hits as the model takes but one: vectors (n, slots, d) of mean square 1 and cosines (n,) falling from 0.9.

    None for a model without retrieval.
    """
    space = info.retrieval
    if space is None:
        return None
    shape = (max(1, int(space["hits"]) - 1), int(space["slots"]), info.width)
    vectors = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return vectors, np.linspace(0.9, 0.3, len(vectors)).astype(np.float32)
