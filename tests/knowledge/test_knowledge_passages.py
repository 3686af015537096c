"""Cutting texts: within the limit, at the best place, and no character lost."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from paths import ROOT

from rmse_edge.errors import TextError
from rmse_edge.knowledge import Passage
from rmse_edge.knowledge.passages import split_line, split_text
from rmse_edge.text import Tokenizer, train_character_tokenizer

SHIPPED = ROOT / "models" / "rmse-shakespeare"


def characters(text: str) -> list[int]:
    return [ord(c) for c in text]


def words(text: str) -> list[str]:
    """A tokenizer where a text can have more tokens than a longer one: a known word is one, an unknown one by letter."""
    known = {"knowledge", "retrieval", "mountain"}
    return [t for w in text.split() for t in ([w] if w.strip(".,!?") in known else list(w))]


def bytes_of(text: str) -> list[int]:
    return list(text.encode())


def test_a_line_is_a_passage() -> None:
    text = "One fact.\n\n   Another,   with spaces. \r\n\t\nThe last"
    assert list(split_text(text, "a.txt", characters)) == [
        Passage("One fact.", "a.txt", 1), Passage("Another,   with spaces.", "a.txt", 3), Passage("The last", "a.txt", 5)
    ]  # fmt: skip
    assert [p.place for p in split_text(text, "a.txt", characters)] == ["a.txt:1", "a.txt:3", "a.txt:5"]
    assert not list(split_text(" \n\n\t", "a.txt", characters))


@pytest.mark.parametrize(
    ("line", "limit", "pieces"),
    [
        ("It is late. Go home now. Sleep well.", 26, ["It is late. Go home now.", "Sleep well."]),
        ("It is late. Go home now.", 24, ["It is late. Go home now."]),
        ("It is late. Go home now.", 23, ["It is late.", "Go home now."]),
        ('He said "No." Then he left us.', 20, ['He said "No."', "Then he left us."]),
        ("version 3.14 is what we use", 12, ["version 3.14", "is what we", "use"]),
        ("no sentence ends in here", 12, ["no sentence", "ends in here"]),
        ("aaaaaaaaaaaa bbb", 5, ["aaaaa", "aaaaa", "aa", "bbb"]),
        ("今日は晴れ。明日は雨。", 8, ["今日は晴れ。", "明日は雨。"]),
        ("x", 1, ["x"]),
    ],
)
def test_where_a_long_line_is_cut(line: str, limit: int, pieces: list[str]) -> None:
    assert list(split_line(line, characters, limit)) == pieces


@pytest.mark.parametrize("encode", [characters, words, bytes_of])
def test_nothing_is_lost_and_everything_fits(encode: Callable) -> None:
    generator = random.Random(3)
    alphabet = [
        "knowledge",
        "retrieval",
        "mountain.",
        "a",
        "is",
        "of!",
        "Paris",
        "été",
        "。",
        "\n",
        "x" * 90,
        "?",
        "\t",
    ]
    for _ in range(60):
        text = "".join(generator.choice(alphabet) + generator.choice(["", " ", "  "]) for _ in range(80))
        passages = list(split_text(text, "t", encode, 16))
        assert "".join("".join(p.text.split()) for p in passages) == "".join(text.split())
        lines = text.split("\n")
        for passage in passages:
            assert passage.text in lines[passage.line - 1] and passage.text == passage.text.strip() != ""
            assert len(encode(passage.text)) <= 16
        assert passages == list(split_text(text, "t", encode, 16))


def test_a_character_larger_than_the_limit_is_a_passage() -> None:
    assert list(split_line("a🙂b", bytes_of, 2)) == ["a", "🙂", "b"]


def test_a_long_line_is_cut_in_linear_time() -> None:
    encoded = 0

    def counting(text: str) -> list[int]:
        nonlocal encoded
        encoded += len(text)
        return characters(text)

    pieces = list(split_line("word " * 20_000, counting, 64))
    assert sum(map(len, pieces)) > 75_000 and encoded < 100_000 * 20


def test_a_play_in_passages() -> None:
    """The shipped sample: speakers, blank lines, and lines of every length up to some longer than a passage."""
    text = (SHIPPED / "sample.txt").read_text()
    tokenizer = Tokenizer(SHIPPED / "tokenizer.json")
    for limit in (64, 32):
        passages = list(split_text(text, "s.txt", tokenizer.encode, limit))
        assert "".join("".join(p.text.split()) for p in passages) == "".join(text.split())
        assert max(len(tokenizer.encode(p.text)) for p in passages) <= limit
        assert passages[0] == Passage("ROMEO:", "s.txt", 1)
        assert passages[0].id == Passage("ROMEO:", "s.txt").id


def test_an_unknown_character_is_named_with_its_line(tmp_path: Path) -> None:
    train_character_tokenizer("abc \n", tmp_path / "tokenizer.json")
    tokenizer = Tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(TextError, match=r"^notes.txt:3: the tokenizer has no token for 'x'; it knows  ?abc"):
        list(split_text("abc\n\nab x", "notes.txt", tokenizer.encode))


def test_ids_depend_on_source_and_text_alone() -> None:
    assert Passage("a", "b", 1).id == Passage("a", "b", 7).id
    others = [Passage("a", "b"), Passage("b", "a"), Passage("", "ab"), Passage("ab", ""), Passage("a", "bb")]
    assert len({p.id for p in others}) == len(others) and all(0 <= p.id < 2**63 for p in others)
    assert Passage("Paris is the capital of France.", "facts.txt").id == 6381466465125937665, "ids are for ever"
