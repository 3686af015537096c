"""What states may know of a text beside its next token: labels that linear probes are trained on."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

NONE = -1
SPEAKERS = 10  # of them, the ones with most characters
LONGEST = 5  # places in a word from there on are one class
DEEPEST = 8
SPEECH = re.compile(r"^([A-Z][A-Za-z' ]{1,30}):\n(.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
OPEN, CLOSED = "([{<", ")]}>"


def of_characters(text: str) -> dict[str, np.ndarray]:
    """A class for every character of a text, `NONE` where there is none: name -> (characters,) int64. What a text does not have
    is left out.
    """
    found = {"speaker": _speakers(text), "place in word": _places(text), "bracket depth": _depths(text)}
    return {name: labels for name, labels in found.items() if len(np.unique(labels[labels != NONE])) > 1}


def of_tokens(labels: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Each token has the label of its last character; `ends` (N,): where it ends, exclusive."""
    return np.where(ends > 0, labels[np.maximum(ends, 1) - 1], NONE)


def _speakers(text: str) -> np.ndarray:
    """Who is speaking, by plays that put a name and a colon on a line of their own; the names themselves have no label."""
    speeches = [(m[1], m.start(2), m.end(2)) for m in SPEECH.finditer(text)]
    size = Counter[str]()
    for name, first, last in speeches:
        size[name] += last - first
    known = {name: i for i, (name, _) in enumerate(size.most_common(SPEAKERS))}
    labels = np.full(len(text), NONE)
    for name, first, last in speeches:
        labels[first:last] = known.get(name, NONE)
    return labels


def _places(text: str) -> np.ndarray:
    """How many letters of its word stand before a letter, `LONGEST` for more."""
    labels = np.full(len(text), NONE)
    for word in re.finditer(r"[^\W\d_]+", text):
        labels[word.start() : word.end()] = np.minimum(np.arange(word.end() - word.start()), LONGEST)
    return labels


def _depths(text: str) -> np.ndarray:
    """Brackets open behind a character, in lines that have any."""
    labels = np.full(len(text), NONE)
    start = 0
    for line in text.splitlines(keepends=True):
        if any(c in OPEN + CLOSED for c in line):
            signs = np.array([(c in OPEN) - (c in CLOSED) for c in line])
            labels[start : start + len(line)] = np.clip(signs.cumsum(), 0, DEEPEST)
        start += len(line)
    return labels
