"""What a caller of a `LoopedForCausalLM` gives, checked before anything is computed and brought into the model's form."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.contract import LoopSpec, Tensors
from rmse_edge.loop.dials import DIALS, Dials
from rmse_edge.loop.generator import MASK

# Arguments of other models -> what to do here instead.
INSTEAD = {
    "inputs_embeds": "; give input_ids",
    "cache_params": "; give cache",
    "position_ids": "; positions follow from attention_mask and the cache",
    "output_attentions": "",
    "output_hidden_states": "; the model's `trajectory` returns the states of every loop",
}


def refuse_arguments(model: str, given: dict[str, Any]) -> None:
    """Raise an `ArgumentError` for the first argument that asks for something; None and False ask for nothing.

    Args:
        model: what it is called.
    """
    for name, value in given.items():
        if value is not None and value is not False:
            raise ArgumentError(name, f"{model} does not take it" + INSTEAD.get(name, ""))


def given_cache(cache: Any, past_key_values: Any) -> Any:
    """The cache of a call, by whichever of its names it was given: transformers renamed it in 5.24.0.

    Raises:
        ArgumentError: by both. transformers takes `cache` then and drops the other, so that a text may lose its beginning.
    """
    if past_key_values is None:
        return cache
    if cache is not None:
        raise ArgumentError("past_key_values", "got a cache by this name and one as cache; give cache alone")
    warnings.warn("past_key_values: transformers calls it cache since 5.24.0; give cache", FutureWarning, stacklevel=2)
    return past_key_values


def resolve_dials(
    spec: LoopSpec, own: Dials, given: dict[str, Any], device: torch.device, untrained: int | None = None
) -> Tensors:
    """The dials of one call as 0-d tensors: those given (not None), else the model's `own`.

    Raises:
        ArgumentError: a dial out of range, or one that this model does not have.
    """
    given = {name: value for name, value in given.items() if value is not None}
    for name in sorted(given.keys() - set(spec.dials)):
        if DIALS[name].enables(given.pop(name)):
            raise ArgumentError(name, f"this model has no {DIALS[name].rule} rule (exit_rules in its config.json)")
    dials = own.changed(spec.max_loops, untrained, **given)
    types = {name: getattr(torch, DIALS[name].dtype) for name in spec.dials}
    return {name: torch.tensor(getattr(dials, name), dtype=dtype, device=device) for name, dtype in types.items()}


def resolve_seed(spec: LoopSpec, seed: int | None) -> int:
    """The seed of what a model begins from where that is noise; 0 by default.

    Raises:
        ArgumentError: it is none, or this model begins from no noise.
    """
    if seed is None:
        return 0
    if not spec.noise:
        raise ArgumentError("noise_seed", "this model begins from no noise")
    if not isinstance(seed, int) or not 0 <= seed <= MASK:
        raise ArgumentError("noise_seed", f"got {seed!r}, expected a whole number from 0 to 2**64 - 1")
    return seed


def valid_columns(input_ids: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """Which columns of this call are not padding, (B, T) bool.

    Args:
        mask: (B, T), or (B, past + T) with the columns of earlier calls first; nonzero where valid. None: all are.
    """
    batch, count = input_ids.shape
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (count, past + count):
        raise ArgumentError(
            "attention_mask",
            f"got shape {tuple(mask.shape)}, expected ({batch}, {past + count}): the columns so far and those of input_ids",
        )
    return mask[:, mask.shape[1] - count :].to(input_ids.device) != 0


def prefix_lengths(types: Tensor | None, valid: Tensor, begun: bool) -> np.ndarray:
    """How many of each row's first positions see each other whatever their order, (B,): those of type 1, as of HRM-Text.

    Args:
        types: `token_type_ids` (B, T); None: none.
        valid: (B, T) bool, columns that are not padding.
        begun: the texts have begun in earlier calls: then no position is of a prefix, as transformers has it.
    Raises:
        ArgumentError: of another shape, or ones behind other types.
    """
    if types is None or begun:
        return np.zeros(len(valid), np.int64)
    if types.shape != valid.shape:
        raise ArgumentError("token_type_ids", f"got shape {tuple(types.shape)}, expected {tuple(valid.shape)}")
    inside = (types == 1).to(valid.device) & valid
    length = inside.sum(1)
    if not bool((inside == (valid & (valid.cumsum(1) <= length[:, None]))).all()):
        raise ArgumentError(
            "token_type_ids", "got ones behind other types, expected them at the beginning of each text"
        )
    return length.cpu().numpy()


def checked_tokens(input_ids: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
    """The tokens (B, T), with padding as 0, so that a pad token may lie outside the vocabulary."""
    tokens = torch.where(valid, input_ids, 0)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if bool(wrong.any()):
        raise ArgumentError(
            "input_ids", f"token {int(tokens[wrong][0])} is outside the vocabulary (0..{vocab_size - 1})"
        )
    return tokens
