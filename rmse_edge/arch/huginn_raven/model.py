"""Huginn: a prelude of layers, a core block that is applied up to K times, a coda, and a head.

    e = prelude(sqrt(d) embed(tokens))                         two layers
    s = noise, or zeros                                        of its own for every position, at every call
    for k = 1..K:
        s = core(adapter([s ; e]))                             four layers; s is not normed between loops
        stop a position by one of its exit rules
    logits = head(norm(coda(norm(s))))                         two layers; the head's weight is the embedding's

Each layer norms what it reads and what it gives, sums included ("sandwich"). Source: Geiping et al. 2025, Scaling up
Test-Time Compute with Latent Reasoning, arXiv 2502.05171, section 3, and the published `raven_modeling_minimal.py`.

**The start** is drawn from a normal distribution of variance 2/5, truncated at three deviations. The published code draws it anew at
every call from PyTorch's generator. Here it is the project's own seeded noise (rmse_edge/loop/generator.py), which belongs to a
position whatever the calls are, cut off at three deviations; so outputs can be repeated, and are not those of the published
code unless both are given the same start, or `state_init` is "zero".

What it does in a call, and its exit rules, are in rmse_edge/arch/common/recurrent_model.py. Of the published rules "minp-kl" is not here:
it drops tokens of less than a tenth of the largest probability, so its score jumps where one crosses that line, and engines
that are a millionth apart stop at other loops.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.arch.common.recurrent_model import RecurrentDepth, Stacks
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.contract import Tensors

from .config import HuginnConfig
from .layers import HuginnModel

START = 0.4**0.5  # standard deviation of the start, before it is truncated
TRUNCATED = 3.0  # deviations


class Huginn(RecurrentDepth):
    """The model, as a `TextModel` for runtimes and exporters."""

    def __init__(self, config: HuginnConfig) -> None:
        super().__init__(config, config.n_embd, config.block_size)
        self.transformer = HuginnModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        if config.state_init == "like-init":
            self.noise = {"start": START}
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights; embeddings that are of size 1 once they are scaled."""
        self.normal_weights()
        self.transformer.wte.weight.normal_(std=self.config.n_embd**-0.5)

    # ------------------------------------------------------------------------------------------------ its own parts

    @property
    def stacks(self) -> Stacks:
        m = self.transformer
        return Stacks(m.prelude, m.core_block, m.coda)

    def angles(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        return given_angles(positions, self.config.head_width, self.config.rope_base)

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.transformer.wte(tokens) * self.config.n_embd**0.5

    def drawn(self, tensors: Tensors) -> Tensors:
        most = TRUNCATED * START
        return {"first_state": tensors["start"].clamp(-most, most)} if "start" in tensors else {}

    def first_state(self, tensors: Tensors) -> Tensor:
        return tensors["first_state"] if self.config.state_init == "like-init" else tensors["x0"] * 0

    def injected(self, state: Tensor, x0: Tensor) -> Tensor:
        return self.transformer.adapter(torch.cat([state, x0], -1))

    def into_coda(self, h: Tensor) -> Tensor:
        return self.transformer.ln_f(h)

    def out_of_coda(self, y: Tensor) -> Tensor:
        return self.transformer.ln_f(y)

    def logits(self, y: Tensor) -> Tensor:
        return self.lm_head(y)
