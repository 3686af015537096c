"""Text generation on any `Runtime`: tokens with the loops they took, streamed as text, with statistics.

The depth of a generated token is the number of iterations of the position whose logits produced it: the prompt's last
position for the first token, the token before for every other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from ..errors import UserError
from .base import Dials, Runtime
from .sampling import Sampler

if TYPE_CHECKING:
    from .librarian import Librarian

CONTEXT = 8  # tokens of the prompt that decoding the first generated ones takes into account


class Decodes(Protocol):
    """The part of a tokenizer that streaming needs."""

    def decode(self, ids: list[int]) -> str: ...


class Span(NamedTuple):
    """Text of one token, or of the few tokens that make one character, with its depth (the deepest of them)."""

    text: str
    depth: int


class TextStream:
    """Turns tokens into text as early as it is certain.

    Tokens may be pieces of a UTF-8 character: such text is held back until the character is whole. Text that may yet
    become a stop string is held back too; of a stop string nothing is ever given out.
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        """`context`: the tokens before the first, which decide whether it begins with a space."""
        if "" in stop:
            raise UserError("--stop: got an empty string, expected the text to stop at")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = list(context)  # the tokens that became text last, then the new ones: decoders look at neighbours
        self._shown = len(self._ids)  # of them, those that became text
        self._depth = 0  # the deepest of the new ones
        self._held: list[Span] = []

    def push(self, token: int, depth: int) -> list[Span]:
        """Take a token; returns what can be shown now."""
        self._ids.append(token)
        self._depth = max(self._depth, depth)
        text = self._fresh_text()
        if not text or text.endswith("\N{REPLACEMENT CHARACTER}"):  # nothing, or the last character is not whole
            return []
        return self._release(text)

    def finish(self) -> list[Span]:
        """What was held back and is now certain not to be followed by more."""
        text = self._fresh_text()
        spans = self._release(text) if text and not self.stopped else []
        if not self.stopped:
            spans += self._held
        self._held = []
        return spans

    def _fresh_text(self) -> str:
        known = self._tokenizer.decode(self._ids[: self._shown]) if self._shown else ""
        return self._tokenizer.decode(self._ids)[len(known) :]

    def _release(self, text: str) -> list[Span]:
        """Move `text` into what is held, and out of it what no stop string can claim any more."""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        self._held.append(Span(text, self._depth))
        self._depth = 0
        held = "".join(span.text for span in self._held)
        found = [held.find(s) for s in self._stop if s in held]
        if found:
            self.stopped = True
            return self._take(min(found))
        longest = max((n for s in self._stop for n in range(1, len(s)) if held.endswith(s[:n])), default=0)
        return self._take(len(held) - longest)

    def _take(self, count: int) -> list[Span]:
        """The first `count` characters of what is held."""
        taken = []
        while count > 0:
            span = self._held.pop(0)
            if len(span.text) > count:
                self._held.insert(0, Span(span.text[count:], span.depth))
                span = Span(span.text[:count], span.depth)
            taken.append(span)
            count -= len(span.text)
        return taken


@dataclass
class Generation:
    """One run of the model on one prompt: iterate `spans()`, then `rest()`, then read the fields and `statistics()`."""

    runtime: Runtime
    tokenizer: Decodes
    prompt: Sequence[int]
    dials: Dials
    sampler: Sampler
    max_new_tokens: int
    eos: int | None = None  # the token that ends the text; None to go on regardless
    stop: Sequence[str] = ()
    librarian: Librarian | None = None  # is asked before the prompt's last token

    made: list[tuple[int, int]] = field(init=False, default_factory=list)  # (token, depth), see `tokens` and `depth`
    prompt_depth: list[int] = field(init=False, default_factory=list)
    text: str = field(init=False, default="")  # what was given out
    finish_reason: str = field(init=False, default="interrupted")  # then "length", "eos", "stop" or "max_seq_len"
    first_token_s: float | None = field(init=False, default=None)  # from the start to the first token
    decode_s: float = field(init=False, default=0.0)  # spent on all further tokens

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.stop, self.prompt[-CONTEXT:])

    @property
    def tokens(self) -> list[int]:
        """The generated tokens, with those that made a stop string and the end token."""
        return [token for token, _ in self.made]

    @property
    def depth(self) -> list[int]:
        """Iterations behind each generated token."""
        return [depth for _, depth in self.made]

    def steps(self) -> Iterator[tuple[int, int]]:
        """(token, depth) one by one until `max_new_tokens`, the end token, or the end of the package's sequence."""
        limit = self.runtime.info.max_seq_len
        fed: Sequence[int] = self.prompt
        spent = 0.0
        if self.librarian is not None and len(fed) > 1:
            start = perf_counter()
            self.prompt_depth = self.runtime.feed(fed[:-1], self.dials, logits="last").depth.tolist()
            self.librarian.ask()  # so that the first new token knows what was found
            fed, spent = fed[-1:], perf_counter() - start
        while len(self.made) < self.max_new_tokens:
            if self.made and limit is not None and self.runtime.position >= limit:
                self.finish_reason = "max_seq_len"
                return
            start = perf_counter()
            result = self.runtime.feed(fed, self.dials, logits="last")
            token = self.sampler.pick(result.logits[-1])
            seconds = perf_counter() - start
            if self.made:
                self.decode_s += seconds
            else:
                self.first_token_s = spent + seconds
                self.prompt_depth += [int(d) for d in result.depth]
            self.made.append((token, int(result.depth[-1])))
            yield self.made[-1]
            if token == self.eos:
                self.finish_reason = "eos"
                return
            fed = [token]
        self.finish_reason = "length"

    def spans(self, with_prompt: bool = False) -> Iterator[Span]:
        """The text as it becomes certain, after that of the prompt if asked for; then read `rest()`.

        May be broken off at any point, by Ctrl-C too: `rest()` and the statistics hold for what was made until then.
        """
        for token, depth in self.steps():
            if with_prompt and len(self.made) == 1:
                yield from self.prompt_spans()
            if token == self.eos:
                continue
            yield from self._given(self._stream.push(token, depth))
            if self._stream.stopped:
                self.finish_reason = "stop"
                return

    def prompt_spans(self) -> Iterator[Span]:
        """The prompt with the depths of its own positions; empty before the first step."""
        stream = TextStream(self.tokenizer)
        for token, depth in zip(self.prompt, self.prompt_depth):
            yield from stream.push(token, depth)
        yield from stream.finish()

    def rest(self) -> Iterator[Span]:
        """Text that was held back and that nothing more will follow."""
        yield from self._given(self._stream.finish())

    def _given(self, spans: list[Span]) -> Iterator[Span]:
        for span in spans:
            self.text += span.text
            yield span

    def statistics(self) -> dict[str, Any]:
        """Counts, speeds (tokens/s), time to the first token (s) and loops; None where there was nothing to measure.

        `histogram[k - 1]` counts the generated tokens of depth k; `iterations_saved` is their share of iterations that
        full depth would have run and these did not.
        """
        full = self.runtime.info.max_loops
        mean = float(np.mean(self.depth)) if self.made else None
        decoded = len(self.made) - 1
        return {
            "prompt_tokens": len(self.prompt),
            "prompt_mean_loops": float(np.mean(self.prompt_depth)) if self.prompt_depth else None,
            "prompt_tokens_per_s": len(self.prompt) / self.first_token_s if self.first_token_s else None,
            "time_to_first_token_s": self.first_token_s,
            "generated_tokens": len(self.made),
            "tokens_per_s": decoded / self.decode_s if self.decode_s else None,
            "mean_loops": mean,
            "max_loops": full,
            "iterations_saved": None if mean is None else 1 - mean / full,
            "histogram": np.bincount(self.depth, minlength=full + 1)[1:].tolist() if self.made else [0] * full,
            "finish_reason": self.finish_reason,
        } | ({} if self.librarian is None else self._retrieval(self.librarian))

    @staticmethod
    def _retrieval(librarian: Librarian) -> dict[str, Any]:
        looked = [found.to_json() for found in librarian.consultations]
        return {"surprises_heard": librarian.heard, "consultations": looked, "retrieval_failed": librarian.failed}
