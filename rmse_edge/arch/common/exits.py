"""The exit rules of recurrent-depth models, whatever their loop is made of: what is carried for them, and who stops.

**An exit gate** is no part of the published models: the rule "gate" adds one, a linear layer that reads the state, brought to
one size, and by how much the loop has changed it. `rmse-train --stage gate` trains it with all else frozen.
"""

from __future__ import annotations

from math import log
from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.layers.dense import normal_by_fan_in
from rmse_edge.layers.norm import rms
from rmse_edge.loop.contract import Tensors
from rmse_edge.loop.predictions import carry_after, change_stops, compares, first_carry
from rmse_edge.loop.stop import add_log_survival, cosine_stops, delta_stops, gate_stops


class ExitRules(nn.Module):
    """A model whose configuration is a `RecurrentConfig`: its gate, if it has one, and its rules."""

    def __init__(self, config: Any, width: int) -> None:
        """
        Args:
            config: a `RecurrentConfig`.
            width: channels of a state, d.
        """
        super().__init__()
        self.config, self.width = config, width
        self.compares = compares(config.rules)  # whether its rules read predictions
        if config.gated:
            self.exit_gate = nn.Linear(width + 1, 1)

    @torch.no_grad()
    def normal_weights(self) -> None:
        """Give every linear layer normal weights of variance 1 / inputs, but for the gate: it begins at 1/K, which gives every
        loop a similar share of the exit distribution.
        """
        normal_by_fan_in(self)
        if self.config.gated:
            self.exit_gate.weight.zero_()
            self.exit_gate.bias.fill_(-log(max(self.config.trained_loops - 1, 1)))

    def first_of_rules(self, x0: Tensor, vocab_size: int) -> Tensors:
        """What the first carry has for the rules, of a call whose positions are those of x0 (B, C, d)."""
        survival = {"log_survival": torch.zeros_like(x0[..., 0], dtype=torch.float32)} if self.config.gated else {}
        return survival | first_carry(self.config.rules, x0, vocab_size)

    def gate(self, before: Tensor, after: Tensor) -> Tensor:
        """The exit gate's logit, (B, C), of the states (B, C, d) on both sides of a loop."""
        moved, size = ((t.square().sum(-1, keepdim=True)) for t in (after - before, after))
        change = (moved / size.clamp_min(1e-30)).clamp_min(1e-12).sqrt()  # its slope stays finite where nothing moved
        return self.exit_gate(torch.cat([rms(after), change], -1)).squeeze(-1)

    def judged(
        self,
        k: int | Tensor,
        carry: Tensors,
        before: Tensor,
        after: Tensor,
        runs: Tensor,
        dials: Tensors,
        logits: Tensor | None,
    ) -> tuple[Tensor, Tensors]:
        """Which positions stop after loop k (from 0), (B, C) bool, and what is carried on for the rules.

        Args:
            carry: before the loop.
            before, after: states (B, C, d) on both sides of it.
            runs: (B, C) bool, the positions that had not stopped.
            dials: scalars; it may be given those of rules that the model has not.
            logits: (B, C, V) of `after`, for a model whose rules read predictions.
        """
        new: Tensors = {}
        rules = {name: dials[name] for name in self.config.rules}
        stop = torch.zeros_like(runs)
        if "exit_threshold" in rules:
            new["log_survival"] = add_log_survival(carry["log_survival"], self.gate(before, after), runs)
            stop = stop | gate_stops(new["log_survival"], rules["exit_threshold"])
        if "exit_epsilon" in rules:
            stop = stop | delta_stops(before, after, rules["exit_epsilon"])
        if "exit_cosine" in rules:
            stop = stop | cosine_stops(before, after, rules["exit_cosine"])
        if logits is not None:
            of_loop = carry_after(k, carry, logits)
            stop = stop | change_stops(k, carry, of_loop, rules)
            new |= of_loop
        return stop & (k + 1 >= dials["min_loops"]), new
