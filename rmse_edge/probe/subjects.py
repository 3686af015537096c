"""What is probed: a looped model of any architecture after every loop, or a plain GPT after every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rmse_edge.arch.registry import arch_of_model
from rmse_edge.checkpoint import load_checkpoint
from rmse_edge.errors import CheckpointError, UserError
from rmse_edge.layers.experts import SparseExperts
from rmse_edge.quantize.reader import reader_of, text_length
from rmse_edge.schema import read_json
from rmse_edge.text import Tokenizer
from rmse_edge.train.gpt import GPT, MODEL_TYPE, load_gpt


class Subject(Protocol):
    """A model whose states can be read off after every iteration."""

    model: Any
    vocab_size: int
    length: int  # positions of a text as it was trained on

    def course(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """(B, T) int64 -> the state after every iteration, (B, T, n), and the logits of the exit gate, (K, B, T); None: no gate."""

    def vectors(self, state: Tensor) -> Tensor:
        """Such a state -> what the head's weight is multiplied with: the state behind the last norm, (B, T, d)."""

    def logits(self, state: Tensor) -> Tensor:
        """Such a state -> (B, T, V)."""


class Looped:
    """A model of the registry, all of its loops run."""

    def __init__(self, model: Any) -> None:
        """
        Raises:
            UserError: it reads no texts, or says nothing of the states between.
        """
        if arch_of_model(model).parts(model).get("text") is None:
            raise UserError(f"model_type {model.config.model_type}: reads no texts; there is nothing to probe")
        self.model, self.reader = model, reader_of(model)
        self.vocab_size, self.length = model.config.vocab_size, text_length(model)

    @torch.no_grad()
    def course(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | None]:
        found = self.reader.read(tokens)
        if len(found.states) < 2:
            raise UserError(
                f"model_type {self.model.config.model_type}: gives one state of a text; probing compares several loops"
            )
        gated = found.gates is not None and bool(torch.isfinite(found.gates).any())
        return found.states, found.gates if gated else None

    @torch.no_grad()
    def vectors(self, state: Tensor) -> Tensor:
        return self.reader.read_by_head(state)

    @torch.no_grad()
    def logits(self, state: Tensor) -> Tensor:
        return self.reader.logits(state)


class Layered:
    """The GPT baseline: its head reads every layer's state through the last norm, as a logit lens does."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.vocab_size, self.length = model.config.vocab_size, model.config.block_size

    @torch.no_grad()
    def course(self, tokens: Tensor) -> tuple[list[Tensor], Tensor | None]:
        found: list[Tensor] = []
        handles = [layer.register_forward_hook(lambda _, __, out: found.append(out)) for layer in self.model.layers]
        try:
            self.model(tokens)
        finally:
            for handle in handles:
                handle.remove()
        return found, None

    @torch.no_grad()
    def vectors(self, state: Tensor) -> Tensor:
        return self.model.norm(state)

    @torch.no_grad()
    def logits(self, state: Tensor) -> Tensor:
        return self.model.head(self.model.norm(state))


def open_subject(folder: Path) -> tuple[Subject, Tokenizer]:
    """The model of a checkpoint folder, and its tokenizer.

    Raises:
        UserError: it is no checkpoint, reads no texts, or its tokenizer is another model's.
    """
    config = read_json(folder / "config.json", CheckpointError)
    subject: Subject
    if config.get("model_type") == MODEL_TYPE:
        subject = Layered(load_gpt(folder))
    else:
        subject = Looped(load_checkpoint(folder).eval())
    return subject, Tokenizer(folder / "tokenizer.json").fitting(subject.vocab_size)


def sparse_layers(model: nn.Module) -> list[SparseExperts]:
    """Its layers of experts, in order."""
    return [m for m in model.modules() if isinstance(m, SparseExperts)]
