"""Text in, ids out: bad files in one line, a tokenizer that gives back what it took, and blocks that repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rmse_edge.errors import TextError
from rmse_edge.text import (
    Tokenizer,
    consecutive_blocks,
    random_blocks,
    read_text,
    split,
    train_character_tokenizer,
    word_tokenizer,
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"abc\xff", r"not UTF-8 at byte 3; convert it first \(iconv -t UTF-8\)"),
        ("été".encode("utf-16"), "not UTF-8 at byte 0"),
    ],
)
def test_unreadable_texts(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        read_text(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="cannot be read"):
        read_text(tmp_path)


def test_the_character_tokenizer_gives_back_what_it_took(tmp_path: Path) -> None:
    text = "To be,\n\n  or not\tto be: é 🙂 é!\r\n"
    path = tmp_path / "tokenizer.json"
    train_character_tokenizer(text, path)
    tokenizer = Tokenizer(path)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.vocab_size == len(set(text))
    assert tokenizer.decode(ids) == text
    assert [tokenizer.decode([i]) for i in ids] == list(text)
    assert tokenizer.encode("".join(sorted(set(text)))) == list(range(tokenizer.vocab_size)), "code-point order"


def test_a_character_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    train_character_tokenizer("abc", tmp_path / "tokenizer.json")
    with pytest.raises(TextError, match="the tokenizer has no token for 'x'; it knows abc"):
        Tokenizer(tmp_path / "tokenizer.json").encode("abxc")


def test_a_broken_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="no such file; expected the model's tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match="not a tokenizer"):
        Tokenizer(tmp_path / "tokenizer.json")


def test_the_split_is_ninety_to_ten() -> None:
    ids = np.arange(105)
    assert len(split(ids, "train")) == 94 and len(split(ids, "validation")) == 11
    assert np.array_equal(np.concatenate([split(ids, "train"), split(ids, "validation")]), split(ids, "all"))
    with pytest.raises(TextError, match="split: got 'test', expected one of train, validation, all"):
        split(ids, "test")


def test_shakespeare_has_65_characters_and_the_known_split(shakespeare: Path, tmp_path: Path) -> None:
    text = read_text(shakespeare)
    train_character_tokenizer(text, tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    ids = np.array(tokenizer.encode(text))
    assert tokenizer.vocab_size == 65
    assert (len(split(ids, "train")), len(split(ids, "validation"))) == (1003854, 111540)


def test_random_blocks_depend_on_the_seed_alone() -> None:
    ids = np.arange(1000)
    blocks = random_blocks(ids, 5, 16, (7, 3))
    assert blocks.shape == (5, 17) and blocks.dtype == np.int64
    assert (np.diff(blocks, axis=1) == 1).all()
    assert np.array_equal(blocks, random_blocks(ids, 5, 16, (7, 3)))
    assert not np.array_equal(blocks, random_blocks(ids, 5, 16, (7, 4)))
    exact = random_blocks(np.arange(17), 4, 16, (0,))
    assert (exact == np.arange(17)).all(), "a text of one block has one place to start"
    with pytest.raises(TextError, match="the text has 16 tokens, too few for blocks of 16"):
        random_blocks(np.arange(16), 1, 16, (0,))


def test_consecutive_blocks_cover_every_target_once() -> None:
    blocks = consecutive_blocks(np.arange(50), 16)
    assert blocks.shape == (3, 17)
    assert np.array_equal(blocks[:, 1:].ravel(), np.arange(1, 49))
    with pytest.raises(TextError, match="too few for one block of 16"):
        consecutive_blocks(np.arange(16), 16)


def test_words_are_tokens_and_unknown_ones_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(word_tokenizer(["?", ">", "Naga", "likes", "senoon"]), encoding="utf-8")
    tokenizer = Tokenizer(path)
    assert tokenizer.encode("? Naga likes >") == [0, 2, 3, 1] and tokenizer.decode([2, 3, 4]) == "Naga likes senoon"
    with pytest.raises(TextError, match=r"^the tokenizer has no token for 'hates'; it knows 5 words$"):
        tokenizer.encode("Naga hates senoon")
