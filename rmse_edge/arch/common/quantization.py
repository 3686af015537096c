"""What an architecture says of its weights to whoever quantises and stores them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from rmse_edge.errors import UserError

# How a quantised weight is read: as a matrix that is multiplied with, by looking up rows, as experts of which few are read.
Use = Literal["matrix", "rows", "experts"]


@dataclass(frozen=True)
class QuantTable:
    """Which tensors are quantised, in which order, and how they are read. Names are patterns: "layers.*.q_proj.weight".

    What decides (routers, exit gates) and what scales (norms, step encodings) had better stay float: a rounding there
    changes *which* computation is done.
    """

    # What is quantised together, in the order of the data flow: each stage sees the inputs that those before it make.
    stages: tuple[tuple[str, ...], ...]
    float: tuple[str, ...]  # what stays float; a name that neither has is refused, so that none is forgotten
    experts: tuple[str, ...] = ()  # of `stages`: stacks (E, N, K) of `rmse_edge.layers.experts.SparseExperts`
    once: tuple[str, ...] = ()  # of `stages`: read in front of the loop and nowhere else
    embedding: str | None = None  # of which rows are looked up by token; a stage of its own, by its full name
    head: str | None = None  # whose product is the logits

    def __post_init__(self) -> None:
        if self.embedding is not None and (self.embedding,) not in self.stages:
            raise ValueError(f"{self.embedding}: the embedding is no stage of its own")

    def quantizes(self, name: str) -> bool:
        """Whether a tensor is quantised.

        Raises:
            UserError: the table has no line for it.
        """
        if any(_among(name, stage) for stage in self.stages):
            return True
        if _among(name, self.float):
            return False
        raise UserError(
            f"{name}: the quantiser does not know this tensor; say in its architecture's table whether it stays float"
        )

    def use(self, name: str) -> Use:
        """How a tensor is read, first of all: a tied embedding is the head's matrix, too."""
        if _among(name, self.experts):
            return "experts"
        return "rows" if name == self.embedding else "matrix"

    def is_once(self, name: str) -> bool:
        """Whether the loop does not read a tensor."""
        return _among(name, self.once)

    def in_order(self, names: Iterable[str]) -> list[list[str]]:
        """Tensors that are quantised, stage by stage."""
        left = dict.fromkeys(names)
        found = []
        for stage in self.stages:
            chosen = [name for pattern in stage for name in left if fnmatchcase(name, pattern)]
            found.append(list(dict.fromkeys(chosen)))
            for name in found[-1]:
                del left[name]
        assert not left, f"a quantised tensor has no stage: {', '.join(left)}"
        return [stage for stage in found if stage]


def _among(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
