"""What every knowledge base is: passages with keys and values, searched by cosine.

A passage's KEY (key_dims,) says what it is about; the model's retrieval head makes it, from the passage when it is
indexed and from the text being read when it is looked up. Its VALUE (slots, d_model) is what goes into the model.
Two kinds: `store.KnowledgeBase`, a folder on the device, and `server.ServerKnowledge`, a table on object storage.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from rmse_edge.errors import UserError

TIMEOUT_S = 10.0  # for one answer of a server
BATCH = 1024  # passages of one transaction, at least


class KnowledgeError(UserError):
    """A knowledge base is missing, damaged, busy, out of reach, or does not fit the model."""


@dataclass(frozen=True)
class Passage:
    """A piece of text and where it stands."""

    text: str
    source: str  # the file
    line: int = 0  # where it starts, from 1; 0: not known

    @property
    def id(self) -> int:
        """63 bits of a hash of source and text.

        So a passage has one id in every knowledge base and for ever, the same text twice in a file is one passage, and
        one that only moved to another line is still the same.
        """
        name = self.source.encode()
        digest = hashlib.sha256(len(name).to_bytes(4, "little") + name + self.text.encode())
        return int.from_bytes(digest.digest()[:8], "little") >> 1

    @property
    def place(self) -> str:
        """FILE:LINE."""
        return f"{self.source}:{self.line}" if self.line else self.source


Entry = tuple[Passage, np.ndarray, np.ndarray]  # with key (key_dims,) and value (slots, d_model)


@dataclass(frozen=True)
class Hit:
    """A passage that was found."""

    id: int
    text: str
    source: str  # FILE:LINE
    score: float  # cosine of the keys, -1 to 1
    value: np.ndarray  # (slots, d_model) float32


@dataclass(frozen=True)
class KnowledgeInfo:
    """Shapes of a knowledge base's vectors and the model that made them."""

    key_dims: int
    slots: int
    d_model: int
    model: str  # fingerprint
    passages: int = 0

    def __post_init__(self) -> None:
        for name in ("key_dims", "slots", "d_model"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise KnowledgeError(f"{name}: got {value!r}, expected a whole number of at least 1")


class Retriever(Protocol):
    """Finds passages."""

    @property
    def info(self) -> KnowledgeInfo:
        """Shapes, model and number of passages."""

    def search(self, key: np.ndarray, n: int) -> list[Hit]:
        """The `n` passages nearest to `key` (key_dims,), best first; fewer if there are not so many.

        Raises:
            KnowledgeError: the key does not fit, or the knowledge base is damaged or does not answer.
        """

    def close(self) -> None:
        """Let go of files and connections."""


class Store(Retriever, Protocol):
    """A knowledge base that can be changed. Each call is all or nothing, except `add`: it is so batch by batch."""

    def add(self, entries: Iterable[Entry], progress: Callable[[int], object] = lambda _: None) -> int:
        """Put in what is not there yet; `progress` gets the number of passages of every batch committed.

        Returns:
            Passages put in; the rest was there before.
        """

    def replace(self, source: str, entries: Iterable[Entry]) -> tuple[int, int]:
        """Take out all of `source` and put in `entries`; returns (passages put in, passages taken out)."""

    def delete(self, source: str | None = None, ids: Sequence[int] = ()) -> int:
        """Take out all of a source, or passages by id; returns how many there were."""

    def known(self, ids: Sequence[int]) -> set[int]:
        """Those of `ids` that are there."""

    def sources(self) -> dict[str, int]:
        """Passages by source, in alphabetical order."""

    def nbytes(self) -> int | None:
        """Bytes on disk, where that can be told."""


# ------------------------------------------------------------------------------------------------------------ checks


def check_fits(info: KnowledgeInfo, key_dims: int, slots: int, d_model: int, fingerprint: str, where: object) -> None:
    """Refuse a knowledge base whose vectors another model made.

    Args:
        where: the knowledge base, as the user named it.
    Raises:
        KnowledgeError: naming the first thing that differs.
    """
    again = "build it again with rmse-index MODEL TEXT..."
    for name, ours in (("key_dims", key_dims), ("slots", slots), ("d_model", d_model)):
        theirs = getattr(info, name)
        if theirs != ours:
            raise KnowledgeError(
                f"{where}: was built by another model ({name} {theirs}, this model's is {ours}); {again}"
            )
    if info.model != fingerprint:
        raise KnowledgeError(
            f"{where}: was built by another model (fingerprint {info.model[:12]}, this model's is {fingerprint[:12]}); "
            f"{again}"
        )


def checked_key(info: KnowledgeInfo, key: np.ndarray, what: str) -> np.ndarray:
    """`key` as (key_dims,) float32 of length 1.

    Raises:
        KnowledgeError: another shape, NaN, infinite, or all zero.
    """
    key = np.asarray(key)
    if key.shape != (info.key_dims,):
        raise KnowledgeError(f"{what}: key of shape {key.shape}, expected ({info.key_dims},)")
    wide = key.astype(np.float64)
    length = float(np.linalg.norm(wide))
    if not math.isfinite(length) or length == 0:
        raise KnowledgeError(f"{what}: the key is {'all zero' if length == 0 else 'NaN or infinite'}; check the model")
    return (wide / length).astype(np.float32)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two keys of length 1; rounding does not carry it beyond -1 to 1."""
    return min(1.0, max(-1.0, float(a @ b)))


def checked_entry(info: KnowledgeInfo, entry: Entry) -> tuple[Passage, np.ndarray, np.ndarray]:
    """The passage, its key as `checked_key` gives it, its value as (slots, d_model) float16.

    Raises:
        KnowledgeError: naming the passage; another shape, or a number that float16 does not hold.
    """
    passage, key, value = entry
    key = checked_key(info, key, passage.place)
    value, shape = np.asarray(value), (info.slots, info.d_model)
    if value.shape != shape:
        raise KnowledgeError(f"{passage.place}: value of shape {value.shape}, expected {shape}")
    with np.errstate(over="ignore"):
        small = value.astype(np.float16)
    if not np.isfinite(small).all():
        raise KnowledgeError(f"{passage.place}: its value is NaN, infinite, or beyond float16 (65504); check the model")
    return passage, key, small


def checked_count(n: int) -> int:
    if n < 1:
        raise KnowledgeError(f"passages to find: got {n}, expected at least 1")
    return n
