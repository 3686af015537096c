"""Problems, labels and linear probes."""

from __future__ import annotations

import numpy as np
import pytest

from rmse_edge.probe import labels, linear
from rmse_edge.probe.problems import HARDEST, PROBLEMS, drawn, mixed


@pytest.mark.parametrize("name", PROBLEMS)
def test_answers_are_right(name: str) -> None:
    """Worked out again from the question."""
    problems = drawn(name, 200, 3)
    assert problems == drawn(name, 200, 3) != drawn(name, 200, 4)
    assert sorted(p.difficulty for p in problems) == sorted(1 + i % HARDEST for i in range(200))
    assert len({p.text for p in problems}) > 150
    for p in problems:
        question, answer = p.text[: p.answer - 1], p.answered
        assert p.text == f"{question}={answer}\n"
        if name == "hops":
            pairs, asked = question.split("|")
            image = dict(pair for pair in pairs.split())
            at = asked[0]
            for _ in range(int(asked[1:])):
                at = image[at]
            assert (at, int(asked[1:])) == (answer, p.difficulty) and sorted(image) == sorted(image.values())
        elif name == "addition":
            first, second = (part[::-1] for part in question.split("+"))
            assert str(int(first) + int(second)) == answer[::-1] and len(first) == len(second) == p.difficulty
        else:
            stack = []
            for c in question + answer:
                if c in "([{<":
                    stack.append(c)
                else:
                    assert "([{<".index(stack.pop()) == ")]}>".index(c)
            assert not stack and len(answer) == p.difficulty


def test_a_text_with_problems_between_its_paragraphs() -> None:
    text = "\n\n".join(f"Paragraph {i}, {'long ' * (i % 7)}and done." for i in range(400))
    found = mixed(text, 0.3, ["hops", "brackets"], 0)
    parts = found.split("\n\n")
    of_text = [part for part in parts if part.startswith("Paragraph")]
    assert "\n\n".join(of_text) == text and found == mixed(text, 0.3, ["hops", "brackets"], 0)
    assert 0.28 < 1 - len(text) / len(found) < 0.32
    assert {"|" in part for part in set(parts) - set(of_text)} == {True, False}


def test_labels_of_a_play() -> None:
    text = "ANNA:\nAh, (two [words]) here.\n\nBEN:\nNo.\n\nANNA:\nYes"
    found = labels.of_characters(text)
    assert list(found) == ["speaker", "place in word", "bracket depth"]
    assert [found["speaker"][text.index(word)] for word in ("ANNA", "two", "No", "Yes")] == [-1, 0, 1, 0]
    assert found["place in word"][text.index("words") :][:6].tolist() == [0, 1, 2, 3, 4, -1]
    depths = found["bracket depth"]
    assert [depths[text.index(c)] for c in ("Ah", "two", "words", "here", "No")] == [0, 1, 2, 0, -1]
    ends = np.array([0, 4, 8, len(text)])
    assert labels.of_tokens(found["speaker"], ends).tolist() == [-1, -1, 0, 0]
    assert labels.of_characters("12 34") == {}


def test_probes_read_what_is_there_and_nothing_else() -> None:
    draw = np.random.default_rng(0)
    tokens = draw.integers(0, 7, (12, 60))
    classes = draw.integers(0, 3, (12, 60))
    classes[0, :5] = 9  # a class of too few positions
    noise = draw.standard_normal((12, 60, 8)).astype(np.float32)
    known = noise.copy()
    known[..., :3] += 8 * np.eye(3)[np.minimum(classes, 2)]
    found = linear.probed([noise, known], tokens, classes, 0)
    assert found is not None and found["classes"] == 3 and found["positions"] == [355, 360]
    assert found["by_iteration"][1] > 0.99 and found["gain"] > 0.5 > 10 * found["gain_error"]
    assert max(found["by_iteration"][0], found["token"], found["shuffled"]) < 0.45
    again = linear.probed([noise, known], tokens, tokens, 0)
    assert again is not None and again["token"] == 1
    assert linear.probed([noise], tokens, np.zeros_like(tokens), 0) is None
