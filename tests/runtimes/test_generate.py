"""Generation on any runtime: streamed text, stop strings, which depth belongs to which token, statistics."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import ALPHABET, mixed_model

from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.tail import Tail
from rmse_edge.runtimes.text.generate import Generation, Span, TextStream
from rmse_edge.runtimes.text.sampling import Sampler, Sampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


class ByteTokenizer:
    """Tokens are UTF-8 bytes; what is not a whole character decodes to U+FFFD, as in byte-level tokenizers."""

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", errors="replace")


class PieceTokenizer:
    """Token i is the i-th of some pieces."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self.pieces = pieces

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.pieces[i] for i in ids)


@pytest.fixture(scope="module")
def runtime() -> TorchRuntime:
    return TorchRuntime(mixed_model(), "tiny")


def generation(runtime: TorchRuntime, count: int = 40, seed: int = 1, **options: Any) -> Generation:
    runtime.reset()
    sampler = Sampler(Sampling(seed=seed))
    return Generation(runtime, PieceTokenizer(ALPHABET), PROMPT, runtime.info.dials, sampler, count, **options)


def shown(spans: Iterable[Span]) -> str:
    return "".join(span.text for span in spans)


# ---------------------------------------------------------------------------------------------------------- streaming


def stream(tokenizer: Any, ids: Sequence[int], stop: Sequence[str] = ()) -> tuple[list[str], TextStream]:
    """What each token gives out, and what comes at the end; stops where generation would."""
    text, given = TextStream(tokenizer, stop), []
    for token in ids:
        given.append(shown(text.push(token, 1)))
        if text.stopped:
            break
    return [*given, shown(text.finish())], text


def test_characters_in_pieces_are_shown_whole():
    given, _ = stream(ByteTokenizer(), "aé€😀b".encode())
    assert given == ["a", "", "é", "", "", "€", "", "", "", "😀", "b", ""]


def test_bytes_that_are_no_character_are_shown_in_the_end():
    given, _ = stream(ByteTokenizer(), b"a\xff\xffb\xe2\x82")
    assert "".join(given) == "a\ufffd\ufffdb\ufffd"
    assert given[-1] == "\ufffd"


def test_depth_of_a_character_is_that_of_its_deepest_token():
    text = TextStream(ByteTokenizer())
    spans = [span for byte, depth in zip("é!".encode(), (4, 2, 1)) for span in text.push(byte, depth)]
    assert spans == [Span("é", 4), Span("!", 1)]


def test_a_tokenizer_sees_what_came_before():
    """Decoders may treat the first token of a text differently: a leading space is dropped only there."""

    class Words(PieceTokenizer):
        def decode(self, ids: Sequence[int]) -> str:
            return super().decode(ids).removeprefix(" ")

    words = Words([" one", " two", " three"])
    assert shown(TextStream(words).push(1, 1)) == "two"
    text = TextStream(words, tail=Tail(context=(0,)))
    assert [shown(text.push(i, 1)) for i in (1, 2, 0)] == [" two", " three", " one"]


def test_stop_string_across_tokens():
    given, text = stream(PieceTokenizer(["ab", "c", "d", "e"]), [0, 1, 2, 3], ["bcd"])
    assert given == ["a", "", "", ""]
    assert text.stopped


def test_what_only_began_like_a_stop_string_is_shown():
    given, text = stream(PieceTokenizer(["ab", "c", "x", "b"]), [0, 1, 2, 3], ["bcd"])
    assert given == ["a", "", "bcx", "", "b"]
    assert not text.stopped


def test_the_first_stop_string_in_the_text_counts():
    given, _ = stream(PieceTokenizer(["one two three"]), [0], ["three", "two"])
    assert given == ["one ", ""]


def test_any_text_in_any_pieces_ends_before_its_stop_string():
    """Against the definition, on texts of few letters, where stop strings overlap themselves."""
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choices("aab\n", k=30))
        cuts = sorted({0, len(text), *chance.choices(range(30), k=12)})
        pieces = [text[a:b] for a, b in pairwise(cuts)]
        stop = "".join(chance.choices("aab\n", k=chance.randint(1, 4)))
        given, _ = stream(PieceTokenizer(pieces), range(len(pieces)), [stop])
        assert "".join(given) == text.split(stop)[0]


def test_depths_stay_with_their_characters_when_text_is_held_back():
    text = TextStream(PieceTokenizer(["a", "b", "c", "x"]), ["abcd"])
    spans = [span for token, depth in zip((0, 1, 2, 3), (1, 2, 3, 4)) for span in text.push(token, depth)]
    assert spans == [Span("a", 1), Span("b", 2), Span("c", 3), Span("x", 4)]


# --------------------------------------------------------------------------------------------------------- generation


def test_depth_belongs_to_the_position_whose_logits_made_the_token(runtime: TorchRuntime):
    made = generation(runtime)
    assert list(made.steps()) == list(zip(made.tokens, made.depth))
    runtime.reset()
    fed = runtime.feed([*PROMPT, *made.tokens[:-1]], runtime.info.dials)
    assert made.depth == fed.depth[len(PROMPT) - 1 :].tolist()
    assert made.prompt_depth == fed.depth[: len(PROMPT)].tolist()
    assert len(set(made.depth)) > 1
    sampler = Sampler(Sampling(seed=1))
    assert made.tokens == [sampler.pick(row) for row in fed.logits[len(PROMPT) - 1 :]]


def test_text_is_that_of_the_tokens(runtime: TorchRuntime):
    made = generation(runtime)
    assert shown(made.spans()) + shown(made.rest()) == made.text == PieceTokenizer(ALPHABET).decode(made.tokens)
    assert made.finish_reason == "length"


def test_the_end_token_ends_the_text(runtime: TorchRuntime):
    free = generation(runtime)
    list(free.spans())
    eos = free.tokens[10]
    first = free.tokens.index(eos)
    made = generation(runtime, eos=(eos,))
    text = shown(made.spans()) + shown(made.rest())
    assert made.tokens == free.tokens[: first + 1]
    assert text == PieceTokenizer(ALPHABET).decode(free.tokens[:first])
    assert made.finish_reason == "eos"


def test_a_stop_string_ends_the_text_before_it(runtime: TorchRuntime):
    free = generation(runtime)
    list(free.spans())
    stop = free.text[10:13]
    made = generation(runtime, stop=[stop])
    assert shown(made.spans()) + shown(made.rest()) == free.text.split(stop)[0] == made.text
    assert made.finish_reason == "stop"
    assert len(made.tokens) == len(made.depth) == len(made.text) + 3


def test_generation_ends_where_the_package_ends():
    limited = TorchRuntime(mixed_model(), "tiny")
    limited.info = limited.info.with_limit(len(PROMPT) + 5)
    made = generation(limited)
    list(made.spans())
    assert (len(made.tokens), made.finish_reason) == (6, "max_seq_len")  # the last one is not fed any more


def test_statistics(runtime: TorchRuntime):
    made = generation(runtime, 25)
    list(made.spans())
    statistics = made.statistics()
    assert statistics["prompt_tokens"] == len(PROMPT)
    assert statistics["generated_tokens"] == 25 == sum(statistics["histogram"])
    assert statistics["mean_loops"] == pytest.approx(np.mean(made.depth))
    assert sum(k * count for k, count in enumerate(statistics["histogram"], 1)) == sum(made.depth)
    assert statistics["iterations_saved"] == pytest.approx(1 - np.mean(made.depth) / 4)
    for name in ("time_to_first_token_s", "prompt_tokens_per_s", "tokens_per_s"):
        assert statistics[name] > 0
    assert statistics["tokens_per_s"] == pytest.approx(24 / made.decode_s)


def test_statistics_before_anything_was_made(runtime: TorchRuntime):
    statistics = generation(runtime).statistics()
    assert statistics["mean_loops"] is None and statistics["tokens_per_s"] is None
    assert statistics["histogram"] == [0] * 4
    assert statistics["finish_reason"] == "interrupted"
