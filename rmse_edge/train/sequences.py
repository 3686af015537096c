"""What tasks of made-up sequences have in common, by which mixers are compared: any model of texts learns them, none by heart.

Targets stand at some positions; the answer is not in the text there. What is measured is the share of them whose likeliest token is
the target, on sequences longer and fuller than those of training, too.
"""

from __future__ import annotations

import dataclasses
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from rmse_edge.arch.common.recursive import RecursiveConfig
from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.errors import ConfigError
from rmse_edge.files import new_file
from rmse_edge.schema import Expected, check_fields

from .sources import IGNORED, Batch, Seed, Sized, check_words

HELD_OUT = 2**31  # seeds from here on are not those of training
ROWS = 16  # sequences that are measured together

Lengths = Annotated[tuple[Sized, ...], Field(min_length=1), Expected("a list of lengths")]


@dataclass(frozen=True)
class Sequences(ABC):
    """A task; its options are the fields of its class."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)

    @property
    @abstractmethod
    def longest(self) -> int:
        """Positions of its longest sequences, those of the evaluation included."""

    @property
    @abstractmethod
    def words(self) -> int:
        """Tokens there are."""

    @property
    def vocab_size(self) -> int:
        return self.words

    def check_model(self, config: Any) -> None:
        if isinstance(config, RecursiveConfig):
            raise ConfigError(f"architecture: got {config.model_type!r}, the task {self.name} needs a model of texts")
        check_words(self.name, self.words, config)
        if getattr(config, "memory", "none") != "none":
            raise ConfigError(f"model.memory: got {config.memory!r}, the task {self.name} needs 'none': see recall")
        limits = () if isinstance(config, RMSEConfig) else ("max_position_embeddings", "block_size")
        for room in limits:  # to RMS-E block_size is a length of training, no limit
            if (most := getattr(config, room, None)) is not None and most < self.longest:
                raise ConfigError(f"model.{room}: got {most}, the task {self.name} needs at least {self.longest}")

    @property
    def fingerprint(self) -> str:
        return json.dumps({"task": self.name} | dataclasses.asdict(self))

    def vocabulary(self) -> list[str]:
        return [f"t{i}" for i in range(self.words)]

    def calibration(self) -> Tensor | None:
        return None

    @abstractmethod
    def batch(self, count: int, seed: Seed) -> Batch:
        """As `Source.batch`."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, Any]:
        """As `Task.evaluate`."""

    @abstractmethod
    def curves(self, result: dict[str, Any]) -> tuple[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]:
        """What `draw_plot` shows: (what x is, of every line x and y by its label)."""

    def draw_plot(self, result: dict[str, Any], picture: Path, window: int) -> None:
        """Right answers against what makes the task hard."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        figure, axis = plt.subplots(figsize=(7, 4))
        label, lines = self.curves(result)
        for name, (x, y) in lines.items():
            axis.plot(x, y, "o-", label=name)
        axis.axhline(result["chance"], color="grey", lw=0.8, ls=":", label="chance")
        axis.set_xscale("log", base=2)
        axis.set_xlabel(label)
        axis.set_ylabel("right answers")
        axis.set_ylim(-0.02, 1.04)
        axis.legend(fontsize=8)
        figure.tight_layout()
        with new_file(picture) as part:
            figure.savefig(part, dpi=110)
        plt.close(figure)


@dataclass(frozen=True)
class OfLengths(Sequences):
    """A task whose training sequences have any length up to one, and whose measured ones have given lengths."""

    shortest: ClassVar[int]

    train: int  # positions of a training sequence, at most
    test: Lengths

    @property
    def longest(self) -> int:
        return max(self.train, *self.test)

    @abstractmethod
    def draw(self, draw: np.random.Generator, count: int, length: int) -> Batch:
        """Sequences of one length."""

    def batch(self, count: int, seed: Seed) -> Batch:
        draw = np.random.default_rng(seed)
        return self.draw(draw, count, int(draw.integers(self.shortest, self.train + 1)))

    def validation(self, count: int) -> Batch:
        """Of the longest training sequences."""
        return self.draw(np.random.default_rng(HELD_OUT), count, self.train)


def lines(
    found: Sequence[Mapping[str, Any]], x: str, label: Callable[[Mapping[str, Any]], str]
) -> dict[str, tuple[list[float], list[float]]]:
    """What was right, against `x`: a line for every label, as `Sequences.curves` gives them."""
    by_label: dict[str, tuple[list[float], list[float]]] = {}
    for row in found:
        of_x, of_y = by_label.setdefault(label(row), ([], []))
        of_x.append(row[x])
        of_y.append(row["right"])
    return by_label


def as_batch(tokens: np.ndarray, targets: np.ndarray) -> Batch:
    return {"tokens": torch.from_numpy(tokens), "targets": torch.from_numpy(targets)}


@torch.no_grad()
def right(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of every position (B, T): whether the likeliest token is its target, and whether it has one."""
    model.eval()
    found = []
    for tokens in batch["tokens"].split(ROWS):
        states, _, _ = model.trajectory(tokens, every=False)
        found.append(model.read_out(states[-1]).argmax(-1))
    asked = batch["targets"] != IGNORED
    return (torch.cat(found) == batch["targets"]) & asked, asked


def share_right(model: Any, batch: Batch) -> float:
    """Of the positions that are asked."""
    hits, asked = right(model, batch)
    return float(hits.sum() / asked.sum())
