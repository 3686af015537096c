"""Ouro: token embedding, a stack of layers applied up to T times, an exit gate, and a head.

    h = embed(tokens)
    for t = 1..T:
        x = h
        for each layer:  x = x + norm(attention(norm(x)));  x = x + norm(mlp(norm(x)))    # "sandwich": four norms
        h = norm(x)                                  # the normed state is what the next loop begins with
        stop a position when 1 - prod_j (1 - sigmoid(gate(h_j))) >= early_exit_threshold
    logits = head(h)

Source: Zhu et al. 2025, Scaling Latent Reasoning via Looped Language Models, arXiv 2510.25741, section 3, and the published
`modeling_ouro.py`. There every loop runs always, and the threshold only chooses whose state the head reads. Here a
position that stops is not computed any further: `kv_policy` says what deeper loops find of it (rmse_edge/layers/stack.py), and
"all" computes what the published code does. There is no injection and no code of the loop: loops differ in what they are given.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.dense import FullAttention, GatedMLP, Pair, normal_by_fan_in
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.layers.rope import given_angles
from rmse_edge.layers.stack import Stack, context, mask_specs, masks_of
from rmse_edge.layers.trajectory import of_one_text, trajectory, whole_masks
from rmse_edge.loop.contract import InjectedHits, LoopSpec, Tensors, TensorSpec, WholeText
from rmse_edge.loop.course import Stop, Watcher
from rmse_edge.loop.stop import add_log_survival, stops
from rmse_edge.loop.whole import in_one_call
from rmse_edge.numbers import SEGMENT

from .config import OuroConfig


class OuroLayer(nn.Module):
    """x + norm(attention(norm(x))), then x + norm(mlp(norm(x)))."""

    def __init__(self, c: OuroConfig) -> None:
        super().__init__()
        width, eps = c.hidden_size, c.rms_norm_eps
        self.self_attn = FullAttention(width, c.num_attention_heads, c.kv_heads, c.head_width)
        self.mlp = GatedMLP(width, c.intermediate_size)
        self.input_layernorm, self.input_layernorm_2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.post_attention_layernorm, self.post_attention_layernorm_2 = RMSNorm(width, eps), RMSNorm(width, eps)
        self.dropout = nn.Dropout(c.dropout)

    def enter(self, x: Tensor) -> Tensor:
        return self.input_layernorm(x)

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.self_attn.keys_values(entered, cos, sin)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        seen = self.self_attn(entered, cos, sin, own, past, masks)
        x = x + self.dropout(self.input_layernorm_2(seen))
        return x + self.dropout(self.post_attention_layernorm_2(self.mlp(self.post_attention_layernorm(x))))


class OuroModel(Stack):
    """All but the head, by the names of published checkpoints."""

    def __init__(self, c: OuroConfig) -> None:
        layers = (OuroLayer(c) for _ in range(c.num_hidden_layers))
        super().__init__(layers, c.kv_heads, c.head_width, c.max_loops, c.kv_policy, c.kv_dtype)
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.early_exit_gate = nn.Linear(c.hidden_size, 1)


class Ouro(nn.Module):
    """The model, as a `TextModel` for runtimes and exporters and as a trajectory of states for training."""

    def __init__(self, config: OuroConfig) -> None:
        super().__init__()
        self.config = config
        self.model = OuroModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights, and branches that add up to about the size of the stream they go into."""
        normal_by_fan_in(self)
        self.model.embed_tokens.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.5 * self.config.hidden_size**-0.5)
        for layer in self.model.layers:
            for norm in (layer.input_layernorm_2, layer.post_attention_layernorm_2):
                norm.weight.fill_((2 * self.config.num_hidden_layers) ** -0.5)
        # A gate that starts at 1/T gives every loop a similar share of the exit distribution.
        self.model.early_exit_gate.weight.zero_()
        self.model.early_exit_gate.bias.fill_(-float(np.log(max(self.config.total_ut_steps - 1, 1))))

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys((1, min(SEGMENT, self.config.max_position_embeddings))))

    def spec(self, chunk: int) -> LoopSpec:
        c, stack = self.config, self.model
        capacity = c.max_position_embeddings
        if not 1 <= chunk <= capacity:
            raise ConfigError(f"chunk: got {chunk}, expected 1..max_position_embeddings ({capacity})")
        vector = (1, chunk, c.hidden_size)
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(TensorSpec("tokens", (1, chunk), torch.int64),),
            prelude=(TensorSpec("x0", vector),),
            context=context(chunk, c.head_width, capacity),
            state=stack.state("", capacity, "loop"),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(TensorSpec("log_survival", (1, chunk)), *stack.carried(chunk, c.hidden_size)),
            invariants=mask_specs(chunk, capacity),
            emits=stack.emits(chunk),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=stack.commits(chunk),
            ids={"tokens": c.vocab_size},
            examples={"position": [min(40, capacity - chunk)], "n_valid": [max(1, chunk - 3)]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.model.embed_tokens(tensors["tokens"])}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        x0, n_valid = tensors["x0"], tensors["n_valid"]
        count = x0.shape[1]
        valid = torch.arange(count, device=x0.device) < n_valid[:, None]  # (B, C)
        survival = torch.zeros_like(x0[..., 0], dtype=torch.float32)
        return self.model.first_carry(x0, valid) | {"log_survival": survival}, masks_of(tensors, count)

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        stack = self.model
        before, runs = stack.entering(carry)
        x, pair = stack.iterate(before, k, carry, past, fixed, runs)
        after = stack.norm(x)
        log_survival = add_log_survival(carry["log_survival"], stack.early_exit_gate(after).squeeze(-1), runs)
        stop = stops(k, before, after, log_survival, dials)
        h = torch.where(runs.unsqueeze(-1), after, carry["h"])
        new = stack.next_carry(carry, h, after, runs, stop, pair) | {"log_survival": log_survival}
        return new, {"new_keys": pair[0], "new_values": pair[1]}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(h)}

    def commit(self, tensors: Tensors) -> Tensors:
        return self.model.filled(tensors, tensors["h"])

    def whole_text(self, tokens: Tensor, dials: Tensors, hits: InjectedHits | None = None) -> WholeText:
        return in_one_call(self, tokens, self.angles_of(len(tokens)), dials, hits)

    def angles_of(self, count: int) -> Tensors:
        """Of the first `count` positions of a text, (1, count, hd/2) each."""
        return of_one_text(given_angles(np.arange(count), self.config.head_width, self.config.rope_theta))

    # ------------------------------------------------------------------------------------------------ training

    def trajectory(
        self,
        tokens: Tensor,
        loops: int | None = None,
        stop: Stop | None = None,
        every: bool = True,
        watcher: Watcher | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """All states of whole sequences from an empty past.

        Args:
            tokens: (B, T) int64, T positions from 0 on.
            loops: iterations, at most those that may be asked for; the trained depth by default.
            stop: called as stop(k, before, after, log_survival (B, T)) after iteration k (0-based); returns which positions
                stop, (B, T) bool. They keep their state, and deeper loops find of them what `kv_policy` says.
            every: False keeps the states after the last iteration only.
            watcher: is told of every iteration before it is computed.
        Returns:
            (states after each iteration [(B, T, d)] * loops, or one without `every`; gate logits (loops, B, T); depth (B, T)).
        """
        c, stack = self.config, self.model
        count, device = tokens.shape[1], tokens.device
        fixed = {name: t.to(device) for name, t in self.angles_of(count).items()}
        return trajectory(
            stack,
            self.prelude({"tokens": tokens})["x0"],
            fixed | whole_masks(count, device),
            c.total_ut_steps if loops is None else loops,
            enter=lambda h: h,
            leave=stack.norm,
            gate=lambda before, after: stack.early_exit_gate(after).squeeze(-1),
            stop=stop,
            every=every,
            watcher=watcher,
        )

    def read_out(self, state: Tensor) -> Tensor:
        """Logits (B, T, V) of states (B, T, d) of a trajectory."""
        return self.lm_head(state)
