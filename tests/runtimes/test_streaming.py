"""Text across cuts: what is streamed, saved and gone on with is what decoding all at once gives, wherever it is cut."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from helpers import mixed_model, write_checkpoint
from small_tokenizers import BOS, byte_fallback, byte_level, with_bos

from rmse_edge.cli.run import main
from rmse_edge.runtimes.engines.torch import TorchRuntime
from rmse_edge.runtimes.host.tail import Tail
from rmse_edge.runtimes.text.generate import PATIENCE, Generation, Span, TextStream
from rmse_edge.runtimes.text.sampling import Sampler, Sampling
from rmse_edge.text import Tokenizer

pytestmark = pytest.mark.slow

KINDS = {
    "byte fallback": byte_fallback(),
    "byte fallback, metaspace": byte_fallback(metaspace=True),
    "byte level": byte_level(),
}
TEXTS = ["日本語", "a 日本語 b😀 é\nhe said: è", "😀😁👩‍👩‍👧 日木", "he, a.", "  a  日 ", "\ufffd日\ufffd\ufffda"]


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    return opened(KINDS[request.param], tmp_path)


def opened(tokenizer: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return Tokenizer(path)


def streamed(tokenizer: Tokenizer, ids: Sequence[int], cuts: Sequence[int] = ()) -> str:
    """The text of `ids`, each part between cuts by a stream that knows only the tail of the one before."""
    text, tail = "", Tail()
    for first, last in zip((0, *cuts), (*cuts, len(ids))):
        stream = TextStream(tokenizer, tail=tail)
        for token in ids[first:last]:
            text += shown(stream.push(token, 1))
        text += shown(stream.finish(whole=last == len(ids)))
        tail = stream.tail
    return text


def shown(spans: Sequence[Span]) -> str:
    return "".join(span.text for span in spans)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_cut_anywhere_is_the_text(tokenizer: Tokenizer, text: str):
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    assert streamed(tokenizer, ids) == whole
    for cut in range(len(ids) + 1):
        assert streamed(tokenizer, ids, [cut]) == whole, cut
    assert streamed(tokenizer, ids, range(1, len(ids))) == whole


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_goes_on_from_a_prompt_that_ends_anywhere(tokenizer: Tokenizer, text: str):
    """The prompt's whole characters are its own; one that it began belongs to what completes it."""
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        prompt, made = TextStream(tokenizer), TextStream(tokenizer)
        given = shown([span for token in ids[:cut] for span in prompt.push(token, 1)])
        made.skip(ids[:cut])
        rest = shown([span for token in ids[cut:] for span in made.push(token, 1)] + made.finish())
        assert given + rest == tokenizer.decode(ids), cut


def broken(tokenizer: Tokenizer, chance: random.Random) -> list[int]:
    """Tokens of which many are bytes that are no characters."""
    ids: list[int] = []
    for _ in range(6):
        piece = tokenizer.encode_more(chance.choice(["日", "a", "😀", "he é", "x"]))
        kind = chance.random()
        ids += piece if kind < 0.4 else piece[: chance.randint(1, len(piece))] if kind < 0.7 else piece[::-1]
    return ids


def test_broken_bytes_are_streamed_as_they_are_decoded(tmp_path: Path):
    tokenizer, chance = opened(KINDS["byte level"], tmp_path), random.Random(0)
    for _ in range(300):
        ids = broken(tokenizer, chance)
        whole = tokenizer.decode(ids)
        assert streamed(tokenizer, ids) == whole, ids
        assert streamed(tokenizer, ids, range(1, len(ids))) == whole, ids


def test_a_cut_changes_nothing_in_broken_bytes(tokenizer: Tokenizer):
    chance = random.Random(1)
    for _ in range(100):
        ids = broken(tokenizer, chance)
        whole = streamed(tokenizer, ids)
        assert all(streamed(tokenizer, ids, [cut]) == whole for cut in range(len(ids) + 1)), ids


@pytest.mark.parametrize("metaspace", [False, True])
def test_broken_runs_of_byte_fallback(tmp_path: Path, metaspace: bool):
    """A run that is broken from its first character on is decoded byte for byte, as the library does it; characters that
    were shown before a run broke stay, which the library would take back."""
    tokenizer = opened(byte_fallback(metaspace=metaspace), tmp_path)

    def run(*values: int) -> list[int]:
        return [tokenizer.encode_more(BOS)[0] + 4 + value for value in values]  # the bytes' tokens follow five others

    day, letter = run(*"日".encode()), tokenizer.encode_more("b")
    assert tokenizer.decode([*letter, *day]) == "b日"
    for ids in (
        run(0xFF),
        [*run(0xFF), *day],
        [*letter, *day[:2], *letter],
        [*letter, *run(0xFF, 0xFE), *day, *letter],
    ):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids) and "\ufffd" in streamed(tokenizer, ids)
    ids = [*day, *run(0xFF), *letter]
    assert tokenizer.decode(ids) == "\ufffd" * 4 + "b"
    assert streamed(tokenizer, ids) == "日\ufffdb"


def test_a_rut_of_broken_bytes_is_shown_before_its_end(tokenizer: Tokenizer):
    token = tokenizer.encode_more("日")[-1]
    stream = TextStream(tokenizer)
    given = [shown(stream.push(token, 1)) for _ in range(3 * PATIENCE)]
    assert "".join(given) == "\ufffd" * 3 * PATIENCE
    assert len(stream.tail.context) <= PATIENCE and not stream.tail.open


# ----------------------------------------------------------------------------------------------------- with a model


class Dictated:
    """Picks given tokens, whatever the model thinks."""

    sampling = Sampling()

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)

    def pick(self, logits: Any, unused: Any) -> int:
        return self.tokens.pop(0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the vocabulary of these tokenizers, and the one with byte fallback that begins a text with <s>."""
    folder = write_checkpoint(mixed_model(vocab_size=320), tmp_path_factory.mktemp("wide") / "wide")
    with_bos(byte_fallback()).save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("stop", [(), ("語a",), ("never",)])
def test_generation_shows_prompt_and_text_whole(tokenizer: Tokenizer, checkpoint: Path, stop: tuple[str, ...]):
    runtime = TorchRuntime.open(checkpoint)
    ids = tokenizer.encode("a 日本語a😀")
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        runtime.reset()
        made = Generation(
            runtime, tokenizer, ids[:cut], runtime.info.dials, Dictated(ids[cut:]), len(ids) - cut, stop=stop
        )  # type: ignore[arg-type]
        spans = [*made.spans(with_prompt=True), *made.rest()]
        assert shown(spans) == (whole if made.finish_reason == "length" else whole.split(stop[0])[0]), cut
        assert all(1 <= span.depth <= 4 for span in spans)


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[str, dict[str, Any]]:
    assert main([*map(str, argv), "-o", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    return document["text"], document


@pytest.mark.parametrize("first", range(1, 10))
def test_a_session_goes_on_inside_a_character(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, first: int
):
    tokenizer = Tokenizer(checkpoint / "tokenizer.json")
    said = tokenizer.encode_more("日b語😀")
    session = tmp_path / "s.session"

    def dictate(tokens: Sequence[int]) -> None:
        monkeypatch.setattr(Sampler, "pick", Dictated(tokens).pick)

    dictate(said[:first])
    begun, _ = run(capsys, checkpoint, "-p", "he said", "-n", first, "--save-session", session)
    dictate(said[first:])
    went_on, _ = run(capsys, checkpoint, "-p", "", "-n", len(said) - first, "--session", session)
    assert begun + went_on == "日b語😀"


def test_a_text_that_goes_on_is_not_begun_again(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Neither with <s> nor with a space: the two halves are read as the whole text is."""
    tokenizer = Tokenizer(checkpoint / "tokenizer.json")
    bos = tokenizer.encode("")
    assert tokenizer.decode(bos) == BOS and tokenizer.encode_more("a") == tokenizer.encode("ba")[-1:]
    session = tmp_path / "s.session"
    _, first = run(capsys, checkpoint, "-p", "he sa", "-n", 1, "--save-session", session)
    _, second = run(capsys, checkpoint, "-p", "id", "-n", 5, "--session", session, "--seed", 3)
    runtime = TorchRuntime.open(checkpoint)
    ids = [*tokenizer.encode("he sa"), *first["tokens"], *tokenizer.encode_more("id")]
    assert ids.count(bos[0]) == 1
    sampler = Sampler(Sampling(seed=3, temperature=0.8))
    expected = Generation(runtime, tokenizer, ids, runtime.info.dials, sampler, 5)
    list(expected.spans())
    assert second["tokens"] == expected.tokens
    assert second["prompt_tokens"] == 1 + 2  # the last token of before, and two letters
