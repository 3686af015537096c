"""Where a stream of tokens stands in its text: sessions keep it, streams of text go on from it."""

from __future__ import annotations

from typing import NamedTuple


class Tail(NamedTuple):
    """All that another stream needs to go on from there."""

    context: tuple[int, ...] = ()  # the tokens that became text last: decoders look at neighbours
    open: tuple[int, ...] = ()  # the tokens after them, the beginning of a character


BEGINNING = Tail()  # of a text
