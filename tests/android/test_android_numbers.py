"""The core's numbers and tokens: those that every language's are held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from kotlin_core import Core
from paths import ROOT
from small_tokenizers import BOS, CUTS, SPECIAL, byte_fallback, byte_level, byte_pairs, with_bos

from rmse_edge.errors import TextError
from rmse_edge.text import Tokenizer, train_character_tokenizer, word_tokenizer

pytestmark = [pytest.mark.android, pytest.mark.slow]

GOLDEN = ROOT / "tests" / "data" / "sampler.json"
RESULTS = {"words": "words", "uniform": "numbers", "noise": "numbers", "tokens": "tokens"}


def test_random_numbers_and_sampled_tokens_are_those_on_record(core: Core) -> None:
    known, found = json.loads(GOLDEN.read_text()), core.document("numbers", GOLDEN)
    for part, result in RESULTS.items():
        assert found[part] == [case[result] for case in known[part]], part


@pytest.fixture(params=["characters", "words"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    if request.param == "characters":
        train_character_tokenizer("a tower\nof\tüber 😀日本", path)
    else:
        path.write_text(word_tokenizer(["to", "be", "日本", "or"]))
    return path


def test_tokens_are_those_of_the_tokenizers_library(core: Core, tokenizer: Path) -> None:
    """Characters beyond two bytes, and white space of every kind between words."""
    python = Tokenizer(tokenizer)
    texts = [text for text in ("to be or 日本", " to\u2003be\n", "towerüber 😀日本\n", "") if _takes(python, text)]
    assert len(texts) > 2
    assert core.document("tokens", tokenizer, *texts) == [python.encode(text) for text in texts]


def _takes(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except TextError:
        return False
    return True


@pytest.mark.parametrize("text", ["to ]", "日\r"], ids=str)
def test_a_text_outside_the_vocabulary_is_refused_as_python_does(core: Core, tokenizer: Path, text: str) -> None:
    with pytest.raises(TextError) as caught:
        Tokenizer(tokenizer).encode(text)
    assert core.refusal("tokens", tokenizer, text) == str(caught.value)


WORDS = [
    "To be, or not to be: that's the question.",
    "we'll say 1234 things\r\n",
    "日本語 é ﬁne naïve",
    "x-ray y-axis 10-12",
]
LETTERS = [
    *"abe toTO'sSLl,.-\n\r\t 019²½",
    "é",
    "e\u0301",
    "ﬁ",
    "日",
    "本",
    "😀",
    "\u2003",
    "\u00a0",
    "ſ",
    "\u0663",
    *SPECIAL,
    "<tool>",
    " now",
]


@pytest.mark.parametrize("cut", CUTS)
def test_pairs_of_bytes_are_those_of_the_tokenizers_library(core: Core, cut: str, tmp_path: Path) -> None:
    """At a text's beginning and behind another one, of random texts; and back, of random tokens, which are bytes in any order."""
    path = tmp_path / "tokenizer.json"
    made = byte_pairs(cut, WORDS * 9, normalized=cut == "digits", whole_words=cut == "three digits")
    (with_bos(made) if cut in ("gpt-2", "removed") else made).save(str(path))
    python, random = Tokenizer(path), Random(5)
    texts = ["", *WORDS, *("".join(random.choices(LETTERS, k=random.randrange(40))) for _ in range(300))]
    texts += [BOS + text for text in texts[:9]]
    assert core.document("tokens", path, *texts) == [python.encode(text) for text in texts]
    assert core.document("more tokens", path, *texts) == [python.encode_more(text) for text in texts]
    tokens = [random.choices(sorted(python.ids()), k=random.randrange(1, 9)) for _ in range(300)]
    assert core.document("texts", path, *(" ".join(map(str, ids)) for ids in tokens)) == list(
        map(python.decode, tokens)
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda spec: spec["pre_tokenizer"].update(type="Metaspace"),
            "pre_tokenizer: got Metaspace, expected ByteLevel",
        ),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "normalizer: got Lowercase, expected NFD"),
        (lambda spec: spec["added_tokens"][1].update(lstrip=True), "lstrip: got true, expected false"),
        (lambda spec: spec["model"].update(byte_fallback=True), "byte_fallback: got true, expected false"),
        (lambda spec: spec["model"]["merges"].append(["t", "Ω"]), "got t Ω, expected pieces of the vocabulary"),
        (lambda spec: spec["model"]["merges"].append(["t"]), 'got ["t"], expected two pieces'),
        (lambda spec: spec.update(post_processor={"type": "BertProcessing"}), "got BertProcessing, expected ByteLevel"),
    ],
)
def test_what_is_not_read_of_such_a_tokenizer_is_refused(
    core: Core, change: Callable[[Any], None], said: str, tmp_path: Path
) -> None:
    spec = json.loads(byte_level().to_str())
    change(spec)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(spec))
    assert said in core.refusal("tokens", path, "a")


def test_another_tokenizer_is_refused_by_its_name(core: Core, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(byte_fallback().to_str())
    assert core.refusal("tokens", path, "a").startswith(f"{path}: a tokenizer of the kind BPE; this app reads")
