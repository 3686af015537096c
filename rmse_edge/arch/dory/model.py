"""Dory: input layers, recurrent layers that are applied up to K times, output layers, and a head.

    x0 = input layers(embed(tokens))
    h = x0
    for k = 1..K:
        h = recurrent layers(unit(h) + unit(x0))
        stop a position by one of its exit rules
    logits = scale * head(unit(output layers(h)))              a learned scale for every token

Layers attend to a window or to everything, each kind with angles of its own. Source: NVIDIA Nemotron-Labs-Dory, as
`modeling_dory.py` of transformers 5.24.0 computes it; the layers are in rmse_edge/arch/dory/layers.py. The published code runs
all loops always. What stops a position here needs no training; a call is that of rmse_edge/arch/common/recurrent_model.py.

**kv_policy** is "repeat" by itself. Every loop begins from unit(h) + unit(x0), of which x0 is the same: where h hardly changes
any more, so does what *each* of the many recurrent layers reads, and its keys and values of the last loop are close to those
that a deeper loop would have made. "propagate" projects the state that a loop is entered with in every layer, which is exact
for the first alone.

**recurrent_kv_cache_mode "last_loop"** keeps one set of keys and values for all loops, those of the last. In the published code
earlier loops attend to these of the past, and to their own of the call: so its numbers depend on how a prompt is cut. Here a
call has one position, which is what the published code gives when it reads token by token. A position that stopped leaves
those of the last loop that it ran.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.arch.common.recurrent_model import RecurrentDepth, Stacks
from rmse_edge.layers.norm import unit
from rmse_edge.layers.rope import given_angles
from rmse_edge.loop.contract import InjectedHits, Tensors, WholeText
from rmse_edge.loop.whole import one_by_one

from .config import DoryConfig
from .layers import Backbone


class Dory(RecurrentDepth):
    """The model, as a `TextModel` for runtimes and exporters."""

    def __init__(self, config: DoryConfig) -> None:
        super().__init__(config, config.hidden_size, config.max_position_embeddings)
        self.backbone = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.logit_scale = nn.Parameter(torch.full((config.vocab_size,), config.initializer_range))
        if config.tie_word_embeddings:
            self.lm_head.weight = self.backbone.embeddings.weight
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights whose rows are of about norm 1. Learned scales have their first values already."""
        self.normal_weights()
        self.backbone.embeddings.weight.normal_(std=self.config.hidden_size**-0.5)

    # ------------------------------------------------------------------------------------------------ its own parts

    @property
    def stacks(self) -> Stacks:
        return self.backbone.stacks

    def angles(self, positions: np.ndarray) -> Mapping[str, np.ndarray]:
        c = self.config
        return given_angles(positions, c.head_dim, c.rope_theta, c.further_thetas)

    def embedded(self, tokens: Tensor) -> Tensor:
        return self.backbone.embeddings(tokens)

    def first_state(self, tensors: Tensors) -> Tensor:
        return tensors["x0"]

    def injected(self, state: Tensor, x0: Tensor) -> Tensor:
        return unit(state) + unit(x0)

    def out_of_coda(self, y: Tensor) -> Tensor:
        return unit(y)

    def logits(self, y: Tensor) -> Tensor:
        return self.lm_head(y) * (self.lm_head.logit_scale * (1 / self.config.initializer_range))

    # ------------------------------------------------------------------------------------------------ TextModel

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        core = self.stacks.core
        if not core.shared:
            return super().whole_text(tokens, dials, hits)

        def left(last: Tensors) -> Tensors:
            of_core = enumerate(("keys", "values"))
            return {name: core.cache.to_cache(last[f"new_{name}"][None], which)[0] for which, name in of_core}

        return one_by_one(self, tokens, self.told(len(tokens)), dials, left, hits)
