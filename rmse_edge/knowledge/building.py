"""From text files to a knowledge base: cut, leave out what is there, embed, put in. What rmse-index does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rmse_edge.errors import ArgumentError, TextError, UserError
from rmse_edge.numbers import SEGMENT
from rmse_edge.text import Tokenizer, read_text

from .base import TIMEOUT_S, Entry, Hit, KnowledgeError, KnowledgeInfo, Passage, Store, check_fits
from .open import is_server
from .passages import split_text


class Embedder(Protocol):
    """Makes keys and values of texts."""

    info: KnowledgeInfo  # of a knowledge base it can make

    def encode(self, text: str) -> Sequence[int]:
        """Token ids of a text."""

    def embed(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Key (key_dims,) and value (slots, d_model) of 1 to 64 tokens."""

    def embed_query(self, tokens: Sequence[int]) -> np.ndarray:
        """What 1 to 64 tokens search for: (key_dims,), to be compared with keys."""


class ModelEmbedder:
    """A model with a retrieval head, on any runtime.

    Raises:
        UserError: the model has none.
    """

    def __init__(self, runtime: Any, tokenizer: Tokenizer, name: object) -> None:
        shape = runtime.info.retrieval
        if shape is None:
            raise UserError(f"{name} has no retrieval head (retrieval_slots in its config.json)")
        self.info = KnowledgeInfo(
            int(shape["key_dims"]), int(shape["slots"]), runtime.info.width, runtime.info.fingerprint
        )
        self.encode = tokenizer.encode
        self.embed = runtime.embed
        self.embed_query = runtime.embed_query


@dataclass(frozen=True)
class Summary:
    """What indexing did, in passages."""

    added: int
    skipped: int  # there already, or twice in the texts
    removed: int


def open_store(
    location: str, info: KnowledgeInfo | None = None, timeout_s: float = TIMEOUT_S,
    options: Mapping[str, str] | None = None,
) -> Store:  # fmt: skip
    """The knowledge base at a folder or server location, to be changed.

    Args:
        info: of the model in use. It must have built what is there; where nothing is, an empty knowledge base is made.
    Raises:
        KnowledgeError: built by another model, damaged, not answering; or not there, without `info`.
    """
    store: Store
    if is_server(location):
        from .server import ServerKnowledge

        store = ServerKnowledge.open(location, timeout_s, options, create=info)
    else:
        from .store import KnowledgeBase

        folder = Path(location)
        empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
        store = KnowledgeBase.open(folder) if info is None or not empty else KnowledgeBase.create(folder, info)
    if info is not None:
        try:
            check_fits(store.info, info.key_dims, info.slots, info.d_model, info.model, location)
        except KnowledgeError:
            store.close()
            raise
    return store


def cut_files(paths: Sequence[Path], embedder: Embedder) -> dict[str, list[Passage]]:
    """The passages of each file; every file is read and cut before anything is written.

    Raises:
        TextError: a file cannot be read, or a character is not in the tokenizer's vocabulary (names FILE:LINE).
    """
    files = {}
    for path in paths:
        name = str(path)
        if not name.isprintable():
            raise TextError(f"{name!r}: not a printable file name; passages are kept under it, rename the file")
        files[name] = list(split_text(read_text(path), name, embedder.encode))
    return files


def index_files(
    store: Store,
    embedder: Embedder,
    files: Mapping[str, Sequence[Passage]],
    replace: bool = False,
    progress: Callable[[int], object] = lambda _: None,
) -> Summary:
    """Embed the passages of `files` and put them in.

    Args:
        replace: take out what the store has of each file, in the same transaction. Without it, passages that are there
            are not embedded again.
        progress: called with the number of passages done.
    Raises:
        KnowledgeError: what the store raises; batches committed before stay.
        KeyboardInterrupt: Ctrl-C; what was embedded before stays, except of a file that was being replaced.
    """
    interrupted = False

    def embedded(passages: Sequence[Passage]) -> Iterator[Entry]:
        for passage in passages:
            yield (passage, *embedder.embed(embedder.encode(passage.text)))
            progress(1)

    def until_interrupted(entries: Iterator[Entry]) -> Iterator[Entry]:
        """Ctrl-C ends the passages, so that those embedded before it are still put in."""
        nonlocal interrupted
        try:
            yield from entries
        except KeyboardInterrupt:
            interrupted = True

    total, added, removed = sum(map(len, files.values())), 0, 0
    if replace:
        for name, passages in files.items():
            wanted = distinct(passages)
            progress(len(passages) - len(wanted))
            came, went = store.replace(name, embedded(wanted))
            added, removed = added + came, removed + went
    else:
        wanted = distinct(p for passages in files.values() for p in passages)
        known = store.known([p.id for p in wanted])
        wanted = [p for p in wanted if p.id not in known]
        progress(total - len(wanted))
        if wanted:
            added = store.add(until_interrupted(embedded(wanted)))
        if interrupted:
            raise KeyboardInterrupt
    return Summary(added, total - added, removed)


def distinct(passages: Iterable[Passage]) -> list[Passage]:
    """In their order, and of those with the same text and source only the first."""
    first: dict[int, Passage] = {}
    for passage in passages:
        first.setdefault(passage.id, passage)
    return list(first.values())


def query(store: Store, embedder: Embedder, text: str, n: int) -> list[Hit]:
    """The `n` passages nearest to a text.

    Raises:
        ArgumentError: the text is empty or has more than 64 tokens.
    """
    tokens = embedder.encode(text.strip())
    if not 1 <= len(tokens) <= SEGMENT:
        raise ArgumentError("text", f"the text has {len(tokens)} tokens, expected 1 to {SEGMENT}")
    return store.search(embedder.embed_query(tokens), n)
