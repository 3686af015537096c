"""The core's numbers and tokens: those that every language's are held against."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from kotlin_core import Core
from paths import ROOT
from small_tokenizers import byte_fallback, byte_level

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


@pytest.mark.parametrize(
    ("made", "kind"), [(byte_level, "BPE, split by ByteLevel"), (byte_fallback, "BPE")], ids=["bytes", "fallback"]
)
def test_another_tokenizer_is_refused_by_its_name(core: Core, tmp_path: Path, made: object, kind: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(made().to_str())  # type: ignore[operator]
    line = core.refusal("tokens", path, "a")
    assert line.startswith(f"{path}: a tokenizer of the kind {kind}; this app reads")
