"""HRM-Text: a slow stack H and a fast stack L by turns, and a head.

    z_H = embedding_scale * embed(tokens);  z_L = z_L_init     the latter alike at every position
    for h = 1..H_cycles:
        for l = 1..L_cycles:  z_L = L(z_L + z_H)
        z_H = H(z_H + z_L)
        stop a position by one of its exit rules
    logits = head(z_H)

Source: HRM-Text, arXiv 2605.20613, as `modeling_hrm_text.py` of transformers 5.24.0 computes it; the layers are in
rmse_edge/arch/hrm_text/layers.py. The published code runs all cycles always. What stops a position here needs no training
(rmse_edge/arch/common/exits.py), but for an exit gate that may be added.

**One iteration is one cycle of H**: L_cycles calls of L and one of H. So one graph holds both sets of weights, each call has
keys and values of its own in the cache of the iteration, side by side as those of layers, and a position may stop wherever
there is a z_H for the head to read. An iteration per call would need a choice between two stacks inside of it, which not
every target can export, or two graphs and a driver that knows when to take which.

**The state** h is z_H, which the head reads and the exit rules compare; z_L goes on beside it, as `low`. Where z_L starts from
zeros it changes completely in the first cycle, so a rule that saw it would say little.

**kv_policy** is "repeat" by itself: exact in no call, and free. "propagate" projects the state that a position stopped with:
z_H + z_L in the first layer of a call, and behind it the half that is the stack's own, as it was after its last norm. That is
exact for the first layer of the first call of L.

**A prefix**, where `prefix_lm` is on, is how many of the first positions see each other whatever their order (Dong et al.
2019, Unified Language Model Pre-training, "sequence-to-sequence" masks); all positions behind it are causal. The published
code is told by `token_type_ids`, at the first call alone. Here it is `prefix` of the context, 0 for a text without one, and
all of it must be in one call: a layer reads of a position what the layer before made of the whole prefix.

Gradients go through all calls; the published training goes back through the last `L_bp_cycles` of L alone.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.arch.common.exits import ExitRules
from rmse_edge.errors import ConfigError
from rmse_edge.layers.rope import given_angles
from rmse_edge.layers.stack import context, mask_specs, masks_of
from rmse_edge.layers.trajectory import of_one_text, trajectory, whole_masks
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.predictions import carried
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT

from .config import HrmTextConfig
from .layers import HrmTextModel


class HrmText(ExitRules):
    """The model, as a `TextModel` for runtimes and exporters and as a trajectory of states for training."""

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__(config, config.hidden_size)
        self.model = HrmTextModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights; embeddings that are of size 1 once they are scaled."""
        self.normal_weights()
        self.model.embed_tokens.weight.normal_(std=1 / self.config.embedding_scale)

    # ----------------------------------------------------------------------------------------------------- LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        c = self.config
        sizes = sorted({1, SEGMENT, max(SEGMENT, c.longest_prefix)})
        return tuple(dict.fromkeys(min(size, c.max_position_embeddings) for size in sizes))

    def spec(self, chunk: int) -> LoopSpec:
        c, core = self.config, self.model.core
        capacity = c.max_position_embeddings
        if not 1 <= chunk <= capacity:
            raise ConfigError(f"chunk: got {chunk}, expected 1..max_position_embeddings ({capacity})")
        vector = TensorSpec("h", (1, chunk, self.width))
        position = min(40, capacity - chunk)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64),),
            prelude=(TensorSpec("x0", vector.shape),),
            context=context(chunk, c.head_dim, capacity, prefix=c.prefix_lm),
            state=core.state("", capacity, "loop"),
            h=vector,
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(
                *((TensorSpec("log_survival", (1, chunk)),) if c.gated else ()),
                *core.carried(chunk, 2 * self.width),
                *(() if self._runs_on else (TensorSpec("low", vector.shape),)),
                *carried(c.rules, chunk, c.vocab_size),
            ),
            invariants=mask_specs(chunk, capacity),
            emits=(*core.emits(chunk), *((TensorSpec("new_low", vector.shape),) if self._propagates else ())),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=core.commits(chunk),
            dials=("max_loops", "min_loops", *c.rules),
            ids={"tokens": c.vocab_size},
            # A prefix that ends within the call.
            examples={"position": [position], "n_valid": [max(1, chunk - 3)], "prefix": [position + chunk // 2]},
        )

    @property
    def _runs_on(self) -> bool:
        """Whether positions that have stopped are computed on; what they give is then carried as `running`."""
        return self.model.core.policy == "all"

    @property
    def _propagates(self) -> bool:
        return self.model.core.policy == "propagate"

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.model.embed_tokens(tensors["tokens"]) * self.config.embedding_scale}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0 = tensors["x0"]
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < tensors["n_valid"][:, None]  # (B, C)
        low = self._first_low(x0)
        carry = self.model.core.first_carry(torch.cat([x0, low], -1), valid)
        carry |= {"h": x0} if self._runs_on else {"h": x0, "low": low}
        return carry | self.first_of_rules(x0, self.config.vocab_size), masks_of(tensors, count)

    def _first_low(self, x0: Tensor) -> Tensor:
        """z_L of every position, (B, C, d). A sum: a target would store what is only repeated."""
        return x0 * 0 + self.model.z_L_init

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        core = self.model.core
        both = {} if self._runs_on else {"h": torch.cat([carry["h"], carry["low"]], -1)}
        stream, runs = core.entering(carry | both)
        found, pair = core.iterate(stream, k, carry, past, fixed, runs)
        after, low = found.chunk(2, -1)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        logits = self.lm_head(h) if self.compares else None
        stop, new = self.judged(k, carry, stream[..., : self.width], after, runs, dials, logits)
        new |= core.next_carry(carry, h, found, runs, stop, pair)
        emitted = {"new_keys": pair[0], "new_values": pair[1]}
        if not self._runs_on:
            new["low"] = torch.where(runs.unsqueeze(-1), low, carry["low"])
        if self._propagates:
            emitted["new_low"] = new["low"]
        return new, emitted

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        h = tensors["h"]  # what a loop would be entered with is read by "propagate" alone
        if self._propagates:
            low = tensors["new_low"].index_select(0, (tensors["iterations"] - 1).reshape(1)).squeeze(0)
            h = torch.cat([h, low], -1)
        return self.model.core.filled(tensors, h)

    # ----------------------------------------------------------------------------------------------------- TextModel

    def whole_text(
        self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None, prefix: int = 0
    ) -> WholeText:
        told = self.angles_of(len(tokens)) | ({"prefix": torch.tensor([prefix])} if self.config.prefix_lm else {})
        return in_one_call(self, tokens, told, dials, hits)

    def angles_of(self, count: int) -> Tensors:
        """Of the first `count` positions, (1, count, hd/2)."""
        return of_one_text(given_angles(np.arange(count), self.config.head_dim, self.config.rope_theta))

    # ------------------------------------------------------------------------------------------------------ training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All z_H of whole sequences, which have no prefix, from an empty past; arguments and result as of `HasTrajectory` and,
        in detail, of `Ouro.trajectory`.
        """
        count, device = tokens.shape[1], tokens.device
        x0 = self.prelude({"tokens": tokens})["x0"]

        def high(state: Tensor) -> Tensor:
            return state[..., : self.width]

        states, gates, depth = trajectory(
            self.model.core,
            torch.cat([x0, self._first_low(x0)], -1),
            {name: t.to(device) for name, t in self.angles_of(count).items()} | whole_masks(count, device),
            self.config.trained_loops if loops is None else loops,
            enter=lambda state: state,
            leave=lambda state: state,
            gate=(lambda before, after: self.gate(high(before), high(after))) if self.config.gated else None,
            stop=None if stop is None else lambda k, before, after, s: stop(k, high(before), high(after), s),
            every=every,
            watcher=watcher,
        )
        return [high(state) for state in states], gates, depth

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, d) of a trajectory."""
        return self.lm_head(state)
