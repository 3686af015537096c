"""An embedder without a network: hashed letter groups, projected. Texts that share words get near keys."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rmse_edge.errors import TextError
from rmse_edge.knowledge import Entry, KnowledgeInfo, Passage
from rmse_edge.knowledge.passages import split_text

BUCKETS = 2048
FACTS = """\
Paris is the capital of France.
Rome is the capital of Italy, and its largest city.

Water boils at 100 degrees Celsius at sea level.
The heart pumps blood through the body.
A triangle has three sides and three angles.
Mount Everest is the highest mountain on Earth.
Honey bees make honey from the nectar of flowers.
"""


class HashedEmbedder:
    """Groups of three letters, counted in hashed buckets; key and value are fixed random projections of the counts."""

    def __init__(self, key_dims: int = 48, slots: int = 2, d_model: int = 16, model: str = "hashed-letters-1") -> None:
        self.info = KnowledgeInfo(key_dims, slots, d_model, model)
        random = np.random.default_rng(7)
        self._to_key = random.standard_normal((BUCKETS, key_dims)).astype(np.float32)
        self._to_value = random.standard_normal((BUCKETS, slots * d_model)).astype(np.float32)
        self.embedded = 0

    def encode(self, text: str) -> list[int]:
        for c in text:
            if not " " <= c <= "~":
                raise TextError(f"the tokenizer has no token for {c!r}; it knows ASCII")
        return [ord(c) for c in text]

    def embed(self, tokens: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        assert 1 <= len(tokens) <= 64
        self.embedded += 1
        text = f" {''.join(map(chr, tokens)).lower()} "
        counts = np.zeros(BUCKETS, np.float32)
        for i in range(len(text) - 2):
            counts[zlib.crc32(text[i : i + 3].encode()) % BUCKETS] += 1
        counts /= np.linalg.norm(counts)
        key = counts @ self._to_key
        return key / np.linalg.norm(key), (counts @ self._to_value).reshape(self.info.slots, self.info.d_model)

    def embed_query(self, tokens: Sequence[int]) -> np.ndarray:
        return self.embed(tokens)[0]

    def key(self, text: str) -> np.ndarray:
        return self.embed(self.encode(text))[0]

    def entries(self, text: str = FACTS, source: str = "facts.txt") -> list[Entry]:
        """The passages of a text, embedded."""
        return [(p, *self.embed(self.encode(p.text))) for p in split_text(text, source, self.encode)]


def random_entries(info: KnowledgeInfo, count: int, source: str = "random.txt", seed: int = 0) -> list[Entry]:
    """Passages with random keys and values."""
    random = np.random.default_rng(seed)
    keys = random.standard_normal((count, info.key_dims)).astype(np.float32)
    values = random.standard_normal((count, info.slots, info.d_model)).astype(np.float32)
    return [(Passage(f"passage {i} of {source}", source, i + 1), keys[i], values[i]) for i in range(count)]


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}
