"""Text in, ids out: bad files in one line, a tokenizer that gives back what it took, and blocks that repeat."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import ALPHABET
from paths import ROOT
from small_models import small_recipe
from small_tokenizers import BOS, EOS, byte_fallback, byte_level, cut_short, with_bos

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
from rmse_edge.train.download import TEXTS


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


def test_the_byte_order_mark_of_some_editors_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes("a\ufeffé\r\n".encode("utf-8-sig"))
    assert read_text(tmp_path / "text.txt") == "a\ufeffé\r\n"


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


def test_the_shipped_tokenizer_is_the_one_of_its_characters(tmp_path: Path) -> None:
    """Byte for byte, in whatever order they come; it reads and writes the shipped sample."""
    shipped = ROOT / "models" / "rmse-shakespeare"
    characters = list(json.loads((shipped / "tokenizer.json").read_text())["model"]["vocab"])
    train_character_tokenizer("".join(reversed(characters)) * 2, tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == (shipped / "tokenizer.json").read_bytes()
    tokenizer = Tokenizer(shipped / "tokenizer.json")
    assert tokenizer.vocab_size == len(characters) == 65
    text = read_text(shipped / "sample.txt")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) and tokenizer.decode(ids) == text


def test_tiny_shakespeare_is_split_where_nanogpt_splits_it() -> None:
    ids = np.arange(TEXTS["shakespeare"].bytes)  # ASCII: a character is a byte
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


# ------------------------------------------------------------------------------- what the last call left in the file


def test_stored_truncation_and_padding_are_left_out(tmp_path: Path) -> None:
    train_character_tokenizer(ALPHABET, tmp_path / "tokenizer.json")
    whole = Tokenizer(tmp_path / "tokenizer.json").encode(ALPHABET)
    tokenizer = Tokenizer(cut_short(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(ALPHABET) == tokenizer.encode_more(ALPHABET) == whole and len(whole) == 65
    assert (
        tokenizer.encode("AB") == Tokenizer(tmp_path / "tokenizer.json").encode("AB")
        and len(tokenizer.encode("AB")) == 2
    )


@pytest.fixture
def cut(checkpoint: Path, tmp_path: Path) -> Path:
    """`checkpoint`, saved with a tokenizer that was called with `truncation=True, padding="max_length"`."""
    folder = shutil.copytree(checkpoint, tmp_path / "cut")
    cut_short(folder / "tokenizer.json")
    return folder


def test_prompts_are_read_whole(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rmse_edge.cli.run import main

    assert main([str(cut), "-p", ALPHABET[1:] * 3, "-n", "1", "-o", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["prompt_tokens"] == 64 * 3


def test_texts_are_scored_whole(cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rmse_edge.cli.evaluate import main

    assert main([str(cut), "-o", "json", "--max-loops", "1"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 1999


def test_texts_are_indexed_whole(remembering: Path, tmp_path: Path) -> None:
    pytest.importorskip("usearch", reason="needs usearch: pip install 'rmse-edge[knowledge]'")
    from rmse_edge.cli.index import model_embedder
    from rmse_edge.knowledge.building import cut_files

    folder = shutil.copytree(remembering, tmp_path / "cut")
    cut_short(folder / "tokenizer.json")
    (tmp_path / "text.txt").write_text("A" * 150 + "\n")
    embedder = model_embedder(
        Namespace(model=folder, runtime=None, device="cpu", threads=1, expert_ram=None, dtype=None)
    )
    (passages,) = cut_files([tmp_path / "text.txt"], embedder).values()
    assert [len(passage.text) for passage in passages] == [
        64,
        64,
        22,
    ]  # one of 150, were a passage cut short to 16 tokens


def test_texts_are_trained_on_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rmse_edge.cli.train import main

    train_character_tokenizer(ALPHABET, tmp_path / "tokenizer.json")
    values: dict[str, Any] = json.loads(small_recipe(steps=3, gate_steps=1, exit_steps=1).to_json())
    del values["model"]["vocab_size"]
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    (tmp_path / "text.txt").write_text(ALPHABET * 60)
    paths = {"--text": "text.txt", "--recipe": "recipe.json", "--tokenizer": "tokenizer.json", "-o": "run"}
    cut_short(tmp_path / "tokenizer.json")
    argv = [part for flag, name in paths.items() for part in (flag, str(tmp_path / name))]
    assert main([*argv, "--stop-at", "1"]) == 0, capsys.readouterr().err


# ----------------------------------------------------------------------------------------- where a text does not begin


@pytest.mark.parametrize("kind", [byte_fallback, lambda: byte_fallback(metaspace=True), byte_level])
def test_a_text_that_goes_on_has_no_beginning(tmp_path: Path, kind: Any) -> None:
    with_bos(kind()).save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    begin = tokenizer.encode("")
    assert tokenizer.decode(begin) == BOS
    whole = tokenizer.encode("to be x said 日本, he")
    assert (
        whole[: len(begin)] == begin and tokenizer.encode("to", special=False) == tokenizer.encode("to")[len(begin) :]
    )
    for cut in range(1, len("to be x said 日本, he")):
        first, rest = "to be x said 日本, he"[:cut], "to be x said 日本, he"[cut:]
        ids = tokenizer.encode(first) + tokenizer.encode_more(rest)
        assert ids.count(begin[0]) == 1
        assert tokenizer.decode(ids) == tokenizer.decode(whole)
    named = BOS + "to be"
    assert tokenizer.encode(named) == tokenizer.encode(named, special=False), "what it names itself is not added again"
    kind().save(str(tmp_path / "plain.json"))
    twice = Tokenizer(tmp_path / "plain.json").encode(EOS + EOS)  # nothing was added, so nothing is taken away
    assert len(twice) == 2 and twice[0] == twice[1]
    named = "x</s> he said<|im_end|>"
    assert tokenizer.encode("a" + named, special=False)[-6:] == tokenizer.encode_more(named)[-6:]
    assert tokenizer.leading_token(named) is None and tokenizer.leading_token(named[1:]) == "</s>"


def test_text_that_is_no_unicode_is_named(tmp_path: Path) -> None:
    """How Python holds bytes of the command line that are not UTF-8."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TextError, match=r"^the text is not UTF-8 at character 1; convert it first"):
        Tokenizer(tmp_path / "tokenizer.json").encode("a\udcff")
