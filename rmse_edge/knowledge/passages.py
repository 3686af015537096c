"""Cutting texts into passages of at most 64 tokens, the segment that a model looks up and takes in."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

from rmse_edge.errors import TextError
from rmse_edge.numbers import SEGMENT

from .base import Passage

Encode = Callable[[str], Sequence[int]]

# After a full stop and what closes the sentence with it; Chinese and Japanese put no space there.
SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s)|[。！？]+[”’」』）]*""")
WORD_END = re.compile(r"(?<=\S)(?=\s)")


def split_text(text: str, source: str, encode: Encode, limit: int = SEGMENT) -> Iterator[Passage]:
    """The passages of a text in order, each with the line it starts on.

    A line that is not blank is a passage. One of more than `limit` tokens is cut after the last sentence that fits, or
    else the last word, or else the last character. No character is lost or said twice, except white space at the cuts.

    Args:
        source: what the passages are said to come from, a file name.
        encode: the model's tokenizer, text to token ids.
    Raises:
        TextError: a character that the tokenizer does not know; the message names source and line.
    """
    for number, line in enumerate(text.split("\n"), 1):
        try:
            yield from (Passage(piece, source, number) for piece in split_line(line, encode, limit))
        except TextError as error:
            raise TextError(f"{source}:{number}: {error}") from None


def split_line(line: str, encode: Encode, limit: int = SEGMENT) -> Iterator[str]:
    """The pieces of one line, without white space around them."""
    rest = line.strip()
    while rest:
        longest = fitting(rest, encode, limit)
        cut = len(rest) if longest == len(rest) else best_cut(rest, longest, encode, limit)
        yield rest[:cut].rstrip()
        rest = rest[cut:].lstrip()


def fitting(text: str, encode: Encode, limit: int) -> int:
    """How many characters from the start on make at most `limit` tokens; 1 at least, however many tokens it makes."""

    def fits(count: int) -> bool:
        return len(encode(text[:count])) <= limit

    low, high = 1, min(len(text), limit)
    while high < len(text) and fits(high):
        low, high = high, min(len(text), 2 * high)
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def best_cut(text: str, longest: int, encode: Encode, limit: int) -> int:
    """Where to cut `text`, of which `longest` characters fit: the last sentence end, word end, or character."""
    window = text[: longest + 1]  # one more, to see whether a space follows
    for ends in (SENTENCE_END, WORD_END):
        places = [match.end() for match in ends.finditer(window)]
        for place in reversed(places[: bisect_right(places, longest)]):
            # A shorter text can have more tokens: its last word may be known to the tokenizer only when whole.
            if len(encode(text[:place])) <= limit:
                return place
    return longest
