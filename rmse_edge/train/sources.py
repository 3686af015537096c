"""Where training examples come from: a text, or a task that makes them up.

A `Batch` is a dictionary of tensors whose first axis is the sequence:

    tokens   (B, T) int64
    targets  (B, T) int64, what each position is to predict; `IGNORED` where nothing is asked

and, for models with retrieval (rmse_edge/train/facts.py), the passages to fetch. Everything a source gives depends on
the seed alone, so a resumed run sees exactly the examples it would have seen.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.errors import ConfigError
from rmse_edge.schema import Expected
from rmse_edge.text import consecutive_blocks, random_blocks, spread

IGNORED = -100
Batch = dict[str, Tensor]
Seed = tuple[int, ...]

Sized = Annotated[int, Field(ge=1, le=2**20)]  # how many of something a made-up world has
Plural = Annotated[int, Field(ge=2, le=2**20)]
Part = Annotated[float, Field(ge=0, le=1), Expected("a share in 0..1")]


class Source(Protocol):
    """Training examples without end, and a fixed set to validate on."""

    fingerprint: str  # changes when the examples do

    def batch(self, count: int, seed: Seed) -> Batch:
        """`count` training examples, a function of `seed`."""

    def validation(self, count: int) -> Batch:
        """At most `count` examples that training never draws."""


@runtime_checkable
class Supervises(Protocol):
    """A source with an objective of its own, in place of that of next tokens."""

    def objective(self, model: Any, recipe: Any) -> nn.Module:
        """As `Objective` (rmse_edge/train/objective.py). Its buffers, those of `model` aside, are kept between steps."""

    def lr_scales(self) -> dict[str, float]:
        """How the names of parameters begin -> their learning rate beside the recipe's."""


class Task(Source, Protocol):
    """A source that makes its examples up, and knows what to measure."""

    vocab_size: int

    def vocabulary(self) -> list[str]:
        """A word for every token, for the checkpoint's tokenizer; empty: it gets none."""

    def check_model(self, config: Any) -> None:
        """Fail where a model of this configuration cannot do the task.

        Raises:
            ConfigError: names the field of the model.
        """

    def calibration(self) -> Tensor | None:
        """(n, T) tokens of the ordinary kind, by which a memory learns how much surprise to expect; None: there is none."""

    def evaluate(self, model: Any) -> dict[str, Any]:
        """What the task measures on a trained model; JSON-able."""

    def draw_plot(self, result: dict[str, Any], picture: Path, window: int) -> None:
        """Draw what `evaluate` returned."""


def next_tokens(blocks: Tensor) -> Batch:
    """(B, T + 1) -> every position predicts the one after it."""
    return {"tokens": blocks[:, :-1], "targets": blocks[:, 1:]}


class TextSource:
    """Random windows of a token array; consecutive ones of another to validate on."""

    def __init__(self, train: np.ndarray, validation: np.ndarray, block: int) -> None:
        self.train, self.block = train, block
        self.blocks = consecutive_blocks(validation, block)
        self.fingerprint = hashlib.sha256(np.concatenate([train, validation]).astype("<i8").tobytes()).hexdigest()

    def batch(self, count: int, seed: Seed) -> Batch:
        return next_tokens(torch.from_numpy(random_blocks(self.train, count, self.block, seed)))

    def validation(self, count: int) -> Batch:
        return next_tokens(torch.from_numpy(self.blocks[spread(len(self.blocks), count)]))


def check_memory(name: str, vocab_size: int, config: Any) -> None:
    """Fail where a model of this configuration cannot do the task `name`, which has so many tokens and needs a memory.

    Raises:
        ConfigError: names the field of the model.
    """
    if not isinstance(config, RMSEConfig):
        raise ConfigError(f"architecture: got {config.model_type!r}, the task {name} needs {RMSEConfig.model_type}")
    check_words(name, vocab_size, config)
    if config.memory == "none":
        raise ConfigError(f"model.memory: got 'none', the task {name} needs one (titans or atlas)")


def check_words(name: str, vocab_size: int, config: Any) -> None:
    """Fail where a model of this configuration has fewer tokens than the task `name`.

    Raises:
        ConfigError: names the field of the model.
    """
    if vocab_size > config.vocab_size:
        raise ConfigError(f"model.vocab_size: got {config.vocab_size}, the task {name} needs {vocab_size}")


def require(task: object, name: str, ok: bool, expected: str) -> None:
    """Raise a `ConfigError` about the option `name` of a task unless `ok`."""
    if not ok:
        raise ConfigError(f"{name}: got {getattr(task, name)!r}, expected {expected}")
