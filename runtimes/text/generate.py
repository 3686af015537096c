"""Text generation on any `Runtime`: tokens with the loops they took, streamed as text, with statistics.

The depth of a generated token is the number of iterations of the position whose logits produced it: the prompt's last
position for the first token, the token before for every other.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.dials import Dials
from rmse_edge.runtimes.host.base import Runtime
from rmse_edge.runtimes.host.tail import BEGINNING, Tail
from rmse_edge.runtimes.host.text import LoopRuntime

from .sampling import Sampler
from .speculation import Speculation, Speculator

if TYPE_CHECKING:
    from .librarian import Librarian

BROKEN = "\N{REPLACEMENT CHARACTER}"  # stands for bytes that are no character, or not yet
PATIENCE = 64  # tokens without one whole character after which it is taken for certain that there is none


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

    What is given out is what decoding all tokens at once gives, with one exception: a decoder with byte fallback turns
    every byte of a run into U+FFFD where a part of it is no UTF-8, and characters that were shown stay.

    (`tokenizers.decoders.DecodeStream` cannot be used here: it raises an exception on such a run, repeats all text before
    when it starts inside a character, and neither gives out nor tells what it holds back at the end.)
    """

    def __init__(self, tokenizer: Decodes, stop: Sequence[str] = (), tail: Tail = BEGINNING) -> None:
        """`tail`: of the stream that this one goes on from."""
        if "" in stop:
            raise ArgumentError("stop", "got an empty string, expected the text to stop at")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids = [*tail.context, *tail.open]
        self._shown = len(tail.context)  # of `_ids`, those that became text
        self._depth = 0  # the deepest of the others
        self._held: list[Span] = []

    @property
    def tail(self) -> Tail:
        return Tail(tuple(self._ids[: self._shown]), tuple(self._ids[self._shown :]))

    def skip(self, tokens: Sequence[int]) -> None:
        """Take tokens whose text is not wanted, such as a prompt's.

        Only the last of them are decoded: nothing before a token of whole characters matters to what follows it.
        """
        first = len(tokens) - 1
        while first > 0 and not self._is_whole(tokens[first]):
            first -= 1
        if len(tokens) and self._is_whole(tokens[first]):
            self._ids, self._shown = [], 0
        for token in tokens[max(first, 0) :]:
            self._ids.append(token)
            if not self._is_open(self._fresh_text()):
                self._advance()

    def push(self, token: int, depth: int) -> list[Span]:
        """Take a token; returns what can be shown now."""
        self._ids.append(token)
        self._depth = max(self._depth, depth)
        text = self._fresh_text()
        return [] if self._is_open(text) else self._release(text)

    def finish(self, whole: bool = True) -> list[Span]:
        """What was held back and is now certain not to be followed by more.

        Args:
            whole: the text ends here, so what was begun is broken; False leaves it to the stream that goes on from `tail`.
        """
        text = self._fresh_text() if whole else ""
        spans = self._release(text) if text and not self.stopped else []
        if not self.stopped:
            spans += self._held
        self._held = []
        return spans

    def _is_whole(self, token: int) -> bool:
        text = self._tokenizer.decode([token])
        return bool(text) and BROKEN not in text

    def _is_open(self, text: str) -> bool:
        """Whether tokens to come may change `text`, that of the newest tokens: it is nothing, or no whole character yet."""
        return (not text or text.endswith(BROKEN)) and len(self._ids) - self._shown < PATIENCE

    def _fresh_text(self) -> str:
        known = self._tokenizer.decode(self._ids[: self._shown]) if self._shown else ""
        text = self._tokenizer.decode(self._ids)
        if text.startswith(known):
            return text[len(known) :]
        return self._tokenizer.decode(
            self._ids[self._shown :]
        )  # the newest broke a run of bytes, but not what was shown

    def _advance(self) -> None:
        """The newest tokens have become text."""
        self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)

    def _release(self, text: str) -> list[Span]:
        """Move `text` into what is held, and out of it what no stop string can claim any more."""
        self._advance()
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
    eos: Collection[int] = ()  # tokens that end the text, each of them; none to go on regardless
    stop: Sequence[str] = ()
    librarian: Librarian | None = None  # is asked before the prompt's last token
    tail: Tail = BEGINNING  # of the text that the prompt goes on from
    told: int = 0  # tokens at the prompt's beginning that are in `tail` already
    prefix: int = 0  # of the prompt's first tokens, how many see each other whatever their order
    speculation: Speculation | None = None  # the runtime is a `LoopRuntime` then

    made: list[tuple[int, int]] = field(init=False, default_factory=list)  # (token, depth), see `tokens` and `depth`
    prompt_depth: list[int] = field(init=False, default_factory=list)
    text: str = field(init=False, default="")  # what was given out
    finish_reason: str = field(init=False, default="interrupted")  # then "length", "eos", "stop" or "max_seq_len"
    first_token_s: float | None = field(init=False, default=None)  # from the start to the first token
    decode_s: float = field(init=False, default=0.0)  # spent on all further tokens

    def __post_init__(self) -> None:
        self._stream = TextStream(self.tokenizer, self.stop, self.tail)
        self._stream.skip(self.prompt[self.told :])
        self._pushed = 0  # of `made`
        self._speculator: Speculator | None = None
        if self.speculation is not None:
            assert isinstance(self.runtime, LoopRuntime)
            self._speculator = Speculator(self.runtime, self.sampler, self.speculation)

    @property
    def tokens(self) -> list[int]:
        """The generated tokens, with those that made a stop string and the end token."""
        return [token for token, _ in self.made]

    @property
    def depth(self) -> list[int]:
        """Iterations behind each generated token."""
        return [depth for _, depth in self.made]

    @property
    def iterations(self) -> list[int]:
        """Of every call behind the prompt's, drafts left out."""
        return self.depth[1:] if self._speculator is None else self._speculator.iterations

    def steps(self) -> Iterator[tuple[int, int]]:
        """(token, depth) one by one until `max_new_tokens`, the end token, or the end of the package's sequence."""
        limit = self.runtime.info.longest
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
            first = {"prefix": self.prefix} if self.prefix and not self.made else {}
            result = self.runtime.feed(fed, self.dials, logits="last", **first)
            token = self.sampler.pick(result.logits[-1], self.runtime.info.language.unused_token_ids)
            seconds = perf_counter() - start
            if self.made:
                self.decode_s += seconds
            else:
                self.first_token_s = spent + seconds
                self.prompt_depth += [int(d) for d in result.depth]
            self.made.append((token, int(result.depth[-1])))
            yield self.made[-1]
            if token in self.eos:
                self.finish_reason = "eos"
                return
            if self._speculator is not None:
                yield from self._speculated(self._speculator)
                return
            fed = [token]
        self.finish_reason = "length"

    def _speculated(self, speculator: Speculator) -> Iterator[tuple[int, int]]:
        """All tokens after the first, by speculation."""
        limit = self.runtime.info.longest
        while (most := self.max_new_tokens - len(self.made)) > 0:
            self.settle()
            if limit is not None and self.runtime.position >= limit:
                self.finish_reason = "max_seq_len"
                return
            start = perf_counter()
            for made in speculator.round(self.made[-1][0], self.dials, most, self.eos):
                self.decode_s += perf_counter() - start
                self.made.append(made)
                yield made
                if made[0] in self.eos:
                    self.finish_reason = "eos"
                    self.settle()
                    return
                start = perf_counter()
        self.finish_reason = "length"
        self.settle()

    def settle(self) -> None:
        """Have the runtime know of speculation what was taken of it, and nothing else; `rest` does it, too."""
        if self._speculator is not None:
            start = perf_counter()
            self._speculator.settle()
            self.decode_s += perf_counter() - start

    def spans(self, with_prompt: bool = False) -> Iterator[Span]:
        """The text as it becomes certain, after that of the prompt if asked for; then read `rest()`.

        May be broken off at any point, by Ctrl-C too: `rest()` and the statistics hold for what was made until then.
        """
        for piece in self.pieces(with_prompt):
            yield from piece

    def pieces(self, with_prompt: bool = False) -> Iterator[Iterator[Span]]:
        """The same token by token: what each makes certain, often nothing. Each is to be read before the next."""
        for _ in self.steps():
            fresh = self._fresh_spans()
            yield chain(self.prompt_spans(), fresh) if with_prompt and len(self.made) == 1 else fresh
            if self._stream.stopped:
                self.finish_reason = "stop"
                return

    def prompt_spans(self) -> Iterator[Span]:
        """The prompt with the depths of its own positions, but for a character that only the new tokens complete.

        Empty before the first step.
        """
        stream = TextStream(self.tokenizer, tail=self.tail)
        for token, depth in list(zip(self.prompt, self.prompt_depth))[self.told :]:
            yield from stream.push(token, depth)

    def rest(self, whole: bool = True) -> Iterator[Span]:
        """Text that was held back and that nothing more will follow; `whole`: as of `TextStream.finish`."""
        self.settle()
        yield from self._fresh_spans()  # Ctrl-C may have come between a token and its text
        yield from self._given(self._stream.finish(whole))

    @property
    def end(self) -> Tail:
        """Where the text has got to, for `tail` of what goes on from here; read `rest(whole=False)` before."""
        return self._stream.tail

    def _fresh_spans(self) -> Iterator[Span]:
        while self._pushed < len(self.made) and not self._stream.stopped:
            token, depth = self.made[self._pushed]
            self._pushed += 1
            if token not in self.eos:
                yield from self._given(self._stream.push(token, depth))

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
            **({} if self._speculator is None else {"speculation": self._speculator.statistics()}),
            **({} if self.librarian is None else self._retrieval(self.librarian)),
        }

    @staticmethod
    def _retrieval(librarian: Librarian) -> dict[str, Any]:
        looked = [found.to_json() for found in librarian.consultations]
        return {"surprises_heard": librarian.heard, "consultations": looked, "retrieval_failed": librarian.failed}
