"""What a caller of `RMSEForCausalLM` gives, checked before anything is computed and brought into the model's form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.errors import UserError
from rmse_edge.loop.contract import DIALS, Tensors

# Arguments of other models -> what to do here instead.
INSTEAD = {
    "inputs_embeds": "; give input_ids",
    "position_ids": "; positions follow from attention_mask and the cache",
    "output_attentions": "",
    "output_hidden_states": "; rmse_edge.arch.rmse.model.RMSE.trajectory returns the states of every loop",
}


def refuse_arguments(given: dict[str, Any]) -> None:
    """Raise a `UserError` for the first argument that asks for something; None and False ask for nothing."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise UserError(f"{name}: RMS-E does not take it" + INSTEAD.get(name, ""))


def resolve_dials(config: RMSEConfig, given: dict[str, Any], device: torch.device) -> Tensors:
    """The dials of one call as 0-d tensors: those given (not None), else the configuration's.

    A `max_loops` below the configuration's `min_loops` lowers the latter with it.

    Raises:
        UserError: a dial out of range, or one that this model does not have.
    """
    given = {name: value for name, value in given.items() if value is not None}
    values = {name: given.get(name, getattr(config, name)) for name in DIALS}
    if "min_loops" not in given:
        values["min_loops"] = min(values["min_loops"], max(values["max_loops"], 1))
    for name, limit, meaning in (
        ("max_loops", config.max_loops, "the trained depth"),
        ("min_loops", values["max_loops"], "max_loops"),
    ):
        if int(values[name]) != values[name] or not 1 <= values[name] <= limit:
            raise UserError(f"{name}: got {values[name]}, expected a whole number in 1..{limit} ({meaning})")
    if not values["exit_threshold"] > 0:
        raise UserError(f"exit_threshold: got {values['exit_threshold']}, expected a positive number (1 disables it)")
    for name in ("exit_epsilon", "exit_entropy"):
        if not values[name] >= 0:
            raise UserError(f"{name}: got {values[name]}, expected 0 (off) or a positive number")
    if "entropy" not in config.exit_rules:
        if "exit_entropy" in given:
            raise UserError("exit_entropy: this model has no entropy rule (exit_rules in its config.json)")
        del values["exit_entropy"]
    return {name: torch.tensor(value, dtype=DIALS[name][0], device=device) for name, value in values.items()}


def valid_columns(input_ids: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """Which columns of this call are not padding, (B, T) bool.

    Args:
        mask: (B, T), or (B, past + T) with the columns of earlier calls first; nonzero where valid. None: all are.
    """
    batch, count = input_ids.shape
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] not in (count, past + count):
        raise UserError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected ({batch}, {past + count}): the columns so far and "
            "those of input_ids"
        )
    return mask[:, mask.shape[1] - count :].to(input_ids.device) != 0


def checked_tokens(input_ids: Tensor, valid: Tensor, vocab_size: int) -> Tensor:
    """The tokens (B, T), with padding as 0, so that a pad token may lie outside the vocabulary."""
    tokens = torch.where(valid, input_ids, 0)
    wrong = (tokens < 0) | (tokens >= vocab_size)
    if bool(wrong.any()):
        raise UserError(f"input_ids: token {int(tokens[wrong][0])} is outside the vocabulary (0..{vocab_size - 1})")
    return tokens
