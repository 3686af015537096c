"""Retrieval at run time: a surprised memory sends for passages.

At the end of every segment, and once more before the last token of a prompt, the surprise is compared with what the text
so far made one expect. Above mean + gamma x deviation, the segment's query goes to the knowledge base and the nearest
passages are injected: all tokens up to the next multiple of 64 positions read them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rmse_edge.errors import ArgumentError, UserError
from rmse_edge.knowledge import Hit, KnowledgeError, Retriever, check_fits
from rmse_edge.runtimes.host.base import Surprise
from rmse_edge.runtimes.host.text import LoopRuntime


@dataclass(frozen=True)
class Consultation:
    """One look into the knowledge base."""

    surprise: Surprise
    hits: list[Hit]

    def to_json(self) -> dict[str, Any]:
        found = [{"score": hit.score, "source": hit.source, "text": hit.text} for hit in self.hits]
        return {**vars(self.surprise), "hits": found}


@dataclass
class Librarian:
    """Watches a runtime and fetches passages for it; make one with `attach`."""

    runtime: LoopRuntime
    retriever: Retriever
    gamma: float
    hits: int
    optional: bool  # go on without retrieval where the knowledge base fails
    warn: Callable[[str], object]
    heard: int = field(init=False, default=0)  # surprises that were compared
    consultations: list[Consultation] = field(init=False, default_factory=list)
    failed: str | None = field(init=False, default=None)  # why retrieval ended, where it did

    @classmethod
    def attach(
        cls,
        runtime: LoopRuntime,
        retriever: Retriever,
        where: object,
        gamma: float | None = None,
        hits: int | None = None,
        optional: bool = False,
        warn: Callable[[str], object] = lambda _: None,
    ) -> Librarian:
        """A librarian who listens to `runtime` from now on.

        Args:
            where: the knowledge base, as the user named it.
            gamma: deviations above the mean that call for help; None: the model's own setting.
            hits: passages to inject; None: as many as the model has room for.
            optional: a knowledge base that fails ends retrieval, through `warn`, instead of the text.
        Raises:
            UserError: the model has no retrieval head, or a setting is out of range.
            KnowledgeError: the knowledge base was made by another model.
        """
        space = runtime.info.retrieval
        if space is None:
            raise UserError(f"{runtime.info.name} has no retrieval head (retrieval_slots in its config.json)")
        room = int(space["hits"])
        hits = room if hits is None else hits
        if not 1 <= hits <= room:
            raise ArgumentError("hits", f"got {hits}, expected 1..{room} (retrieval_hits in the model's config.json)")
        gamma = float(space["gamma"]) if gamma is None else gamma
        if not math.isfinite(gamma):
            raise ArgumentError("gamma", f"got {gamma}, expected a number")
        width = runtime.info.width
        check_fits(retriever.info, int(space["key_dims"]), int(space["slots"]), width, runtime.info.fingerprint, where)
        librarian = cls(runtime, retriever, gamma, hits, optional, warn)
        runtime.on_surprise = librarian.hear
        return librarian

    def begin(self) -> None:
        """Another text begins: what was found for the one before is forgotten, and a knowledge base that failed asked again."""
        self.heard, self.consultations, self.failed = 0, [], None

    def hear(self, surprise: Surprise) -> None:
        """A segment has ended."""
        self.heard += 1
        if self.failed is None and surprise.above(self.gamma):
            self.fetch(surprise)

    def ask(self) -> None:
        """Before the last token of a prompt: the unfinished segment may already be surprising."""
        surprise = self.runtime.peek()
        if surprise is not None:
            self.hear(surprise)

    def fetch(self, surprise: Surprise) -> None:
        try:
            found = self.retriever.search(self.runtime.query(), self.hits)
        except KnowledgeError as error:
            if not self.optional:
                raise
            self.failed = str(error)
            self.warn(f"going on without retrieval: {error}")
            return
        self.consultations.append(Consultation(surprise, found))
        if found:
            self.runtime.inject(np.stack([hit.value for hit in found]), np.array([hit.score for hit in found]))
