"""Knowledge bases: passages of text, found by the key of what a model is reading, with values to put into the model."""

from __future__ import annotations

from .base import (
    TIMEOUT_S,
    Entry,
    Hit,
    KnowledgeError,
    KnowledgeInfo,
    Passage,
    Retriever,
    Store,
    check_fits,
)
from .open import is_server, open_retriever

__all__ = [
    "TIMEOUT_S",
    "Entry",
    "Hit",
    "KnowledgeError",
    "KnowledgeInfo",
    "Passage",
    "Retriever",
    "Store",
    "check_fits",
    "is_server",
    "open_retriever",
]
