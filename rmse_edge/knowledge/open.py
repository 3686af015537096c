"""Which kind of knowledge base a location names, and opening it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from .base import TIMEOUT_S, Retriever

SERVER_SCHEMES = ("s3", "gs", "az", "db", "lance")


def is_server(location: str | Path) -> bool:
    """Whether `location` is server-backed: "s3://...", "gs://...", "az://...", "db://..." or "lance:PATH"."""
    return str(location).partition(":")[0] in SERVER_SCHEMES and ":" in str(location)


def open_retriever(
    location: str | Path, timeout_s: float = TIMEOUT_S, options: Mapping[str, str] | None = None
) -> Retriever:
    """The knowledge base at a folder or server location, for searching.

    Args:
        timeout_s: seconds that a server may take for an answer.
        options: of a server's storage, as LanceDB names them ("aws_region", "endpoint", ...).
    Raises:
        KnowledgeError: not there, damaged, of another version, or not answering; one line.
    """
    if is_server(location):
        from .server import ServerKnowledge

        return ServerKnowledge.open(str(location), timeout_s, options)
    from .store import KnowledgeBase

    return KnowledgeBase.open(location)
