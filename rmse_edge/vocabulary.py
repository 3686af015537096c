"""Which tokens may be drawn, and which of them end a text: what a checkpoint folder says beside its weights.

generation_config.json  `eos_token_id` counts for generation, whatever config.json says, as in transformers
tokenizer.json          ids that it lacks are rows of a head that was made larger, to a round number: they mean nothing
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, TextError
from .numbers import token_ids
from .schema import read_json
from .text import Tokenizer

GENERATION_FILE = "generation_config.json"
TOKENIZER_FILE = "tokenizer.json"

Ranges = tuple[tuple[int, int], ...]  # of ids, each [first, end), ascending


@dataclass(frozen=True)
class Vocabulary:
    """What a host needs to know about a model's tokens."""

    eos_token_ids: tuple[int, ...] = ()  # each of them ends a text
    unused_token_ids: Ranges = ()  # never to be drawn

    @classmethod
    def of_model(cls, eos_token_id: int | Iterable[int] | None) -> Vocabulary:
        """Of a model alone, without the files beside it: `eos_token_id` as its configuration has it."""
        return cls(token_ids(eos_token_id, "eos_token_id"))

    @classmethod
    def of_folder(cls, folder: Path, vocab_size: int, eos_token_id: int | Iterable[int] | None) -> Vocabulary:
        """Of a checkpoint folder, which need not have a tokenizer: then every id may be drawn.

        Args:
            vocab_size, eos_token_id: as the model's configuration has them.
        Raises:
            CheckpointError: generation_config.json cannot be read, or its `eos_token_id` is none of the model.
            TextError: tokenizer.json cannot be read, or is of another model.
        """
        eos = cls.of_model(eos_token_id).eos_token_ids
        generation = folder / GENERATION_FILE
        if generation.is_file():
            eos = token_ids(_read(generation).get("eos_token_id"), f"{generation}: eos_token_id")
            if beyond := [token for token in eos if token >= vocab_size]:
                raise CheckpointError(
                    f"{generation}: eos_token_id: got {beyond[0]}, expected below vocab_size ({vocab_size})"
                )
        tokenizer = folder / TOKENIZER_FILE
        if not tokenizer.is_file():
            return cls(eos)
        # A model may have learned to end with a token that its tokenizer has no text for.
        return cls(eos, unused(tokenizer, Tokenizer(tokenizer).ids(), vocab_size, eos))


def unused(where: object, ids: Iterable[int], vocab_size: int, eos: Sequence[int] = ()) -> Ranges:
    """The ids below `vocab_size` that are neither among a tokenizer's `ids`, which may have gaps, nor in `eos`.

    Raises:
        TextError: naming `where`, if the tokenizer has no token below `vocab_size`.
    """
    known = sorted({token for token in (*ids, *eos) if 0 <= token < vocab_size})
    if not known:
        raise TextError(f"{where}: has no token for the model; use the tokenizer the model was trained with")
    edges = zip((-1, *known), (*known, vocab_size))
    return tuple((before + 1, after) for before, after in edges if before + 1 < after)


def _read(path: Path) -> dict[str, Any]:
    values = read_json(path, CheckpointError)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object of settings")
    return values
