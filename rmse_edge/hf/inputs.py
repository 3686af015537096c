"""What a caller of `RMSEForCausalLM` gives, checked before anything is computed and brought into the model's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.errors import ArgumentError
from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.dials import DIALS, Dials

# Arguments of other models -> what to do here instead.
INSTEAD = {
    "inputs_embeds": "; give input_ids",
    "position_ids": "; positions follow from attention_mask and the cache",
    "output_attentions": "",
    "output_hidden_states": "; rmse_edge.RMSE.trajectory returns the states of every loop",
}


def refuse_arguments(given: dict[str, Any]) -> None:
    """Raise an `ArgumentError` for the first argument that asks for something; None and False ask for nothing."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ArgumentError(name, "RMS-E does not take it" + INSTEAD.get(name, ""))


def resolve_dials(config: RMSEConfig, given: dict[str, Any], device: torch.device) -> Tensors:
    """The dials of one call as 0-d tensors: those given (not None), else the configuration's.

    Raises:
        ArgumentError: a dial out of range, or one that this model does not have.
    """
    names = [name for name in DIALS if name != "exit_entropy" or "entropy" in config.exit_rules]
    if given.get("exit_entropy") is not None and "exit_entropy" not in names:
        raise ArgumentError("exit_entropy", "this model has no entropy rule (exit_rules in its config.json)")
    own = Dials(*(getattr(config, name) for name in DIALS))
    dials = own.changed(config.max_loops, **given)
    types = {name: getattr(torch, DIALS[name].dtype) for name in names}
    return {name: torch.tensor(getattr(dials, name), dtype=types[name], device=device) for name in names}


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


def checked_tokens(input_ids: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
    """The tokens (B, T), with padding as 0, so that a pad token may lie outside the vocabulary."""
    tokens = torch.where(valid, input_ids, 0)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if bool(wrong.any()):
        raise ArgumentError(
            "input_ids", f"token {int(tokens[wrong][0])} is outside the vocabulary (0..{vocab_size - 1})"
        )
    return tokens
