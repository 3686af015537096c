"""BD3-LM: a text is written block by block, each block by denoising, from masks to tokens.

    begin: the canvas, a block of tokens, masks among them
    one iteration, a denoising step:
        x = embed(canvas)
        for each layer:  x = x + attention(norm(x));  x = x + mlp(norm(x))
        logits = head(norm(x)), the mask left out
        fill in some of the masks by their likeliest tokens                  rmse_edge/loop/unmask.py
    until no mask is left
    once for the finished block: the same layers, for the keys and values that later blocks attend to

Positions of a block see each other, whatever their order, and all blocks before; these were seen by nothing behind them. A
block without a mask, as those of a prompt, runs no iteration. What a position has stopped with (`h`) is the state that it was
filled in by, and `depth` the iteration.

Source: Arriola et al. 2025, Block Diffusion, arXiv 2503.09573, as models/dit.py of kuleshov-group/bd3lms 1c3e8f4 computes it.
There a block's keys and values are kept together with its queries and before they are turned; here after, and no queries.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor, nn

from rmse_edge.errors import ConfigError
from rmse_edge.layers.dense import FullAttention, Pair, gelu, normal_by_fan_in
from rmse_edge.layers.masks import MASKED, slots_mask
from rmse_edge.layers.rope import given_angles
from rmse_edge.layers.stack import Stack, context
from rmse_edge.layers.trajectory import of_one_text
from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec
from rmse_edge.loop.unmask import fills, guess, without_mask
from rmse_edge.numbers import SLOTS

from .config import THETA, Bd3lmConfig

EPS = 1e-5  # of norms


class Mlp(nn.Module):
    """down(gelu(up(x))), (..., d) -> (..., d)."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gelu(self.up_proj(x)))


class Bd3lmLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, c: Bd3lmConfig) -> None:
        super().__init__()
        self.attn = FullAttention(c.hidden_dim, c.n_heads, c.n_heads, c.head_width)
        self.mlp = Mlp(c.hidden_dim, c.mlp_width)
        self.attn_norm, self.mlp_norm = nn.LayerNorm(c.hidden_dim, EPS), nn.LayerNorm(c.hidden_dim, EPS)
        self.dropout = nn.Dropout(c.dropout)

    def enter(self, x: Tensor) -> Tensor:
        return self.attn_norm(x)

    def keys_values(self, entered: Tensor, cos: Tensor, sin: Tensor) -> Pair:
        return self.attn.keys_values(entered, cos, sin)

    def forward(
        self, x: Tensor, entered: Tensor, cos: Tensor, sin: Tensor, own: Pair, past: Pair | None, masks: Pair
    ) -> Tensor:
        x = x + self.dropout(self.attn(entered, cos, sin, own, past, masks))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Bd3lm(nn.Module):
    """The model, as a `LoopModel` and for training."""

    def __init__(self, config: Bd3lmConfig) -> None:
        super().__init__()
        c = self.config = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_dim)
        layers = (Bd3lmLayer(c) for _ in range(c.n_blocks))
        self.stack = Stack(layers, c.n_heads, c.head_width, kv_dtype=c.kv_dtype)
        self.norm = nn.LayerNorm(c.hidden_dim, EPS)
        self.lm_head = nn.Linear(c.hidden_dim, c.vocab_size)
        if not self.lm_head.weight.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fan-in scaled normal weights, and branches that add up to about the size of the stream they go into."""
        normal_by_fan_in(self)
        self.embed_tokens.weight.normal_(std=1.0)
        self.lm_head.weight.normal_(std=0.5 * self.config.hidden_dim**-0.5)
        for name, p in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                p.mul_((2 * self.config.n_blocks) ** -0.5)
            elif name.endswith(".bias"):
                p.zero_()

    # ------------------------------------------------------------------------------------------------ LoopModel

    def call_sizes(self) -> tuple[int, ...]:
        return (self.config.block_size,)

    def spec(self, chunk: int) -> LoopSpec:
        c, stack, capacity = self.config, self.stack, self.config.model_length
        if chunk != c.block_size:
            raise ConfigError(f"chunk: got {chunk}, expected a whole block ({c.block_size} positions)")
        vector, tokens = (1, chunk, c.hidden_dim), TensorSpec("tokens", (1, chunk), torch.int64)
        places = tuple(t for t in context(chunk, c.head_width, capacity) if t.name != "n_valid")  # blocks are whole
        state = stack.state("", capacity, "loop")
        kept = (TensorSpec(name, stack.call(chunk), state[0].dtype) for name in ("keys", "values"))
        masks = np.arange(chunk) % 2 * c.mask_token_id  # of examples: every other one, to be filled in
        return LoopSpec(
            chunk=chunk,
            max_loops=c.max_loops,
            inputs=(tokens,),
            prelude=(TensorSpec("x0", vector),),
            context=(tokens, *places),
            state=tuple(dataclasses.replace(s, read_by=("loop", "commit")) for s in state),
            h=TensorSpec("h", vector),
            active=TensorSpec("active", (1, chunk), torch.bool),
            carry=(TensorSpec("canvas", (1, chunk), torch.int64),),
            invariants=(TensorSpec("slots_mask", (1, 1, chunk, capacity), slots_axis=3),),
            emits=(TensorSpec("drafts", (1, chunk), torch.int64),),
            head=(TensorSpec("logits", (1, chunk, c.vocab_size)),),
            commit=(*kept, TensorSpec("block", (1, chunk), torch.int64)),
            dials=("max_loops", "min_loops", "exit_threshold", "exit_gap"),
            ids={"tokens": c.vocab_size},
            examples={"tokens": masks, "position": [min(2, capacity // chunk - 1) * chunk]},
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x0": self.embed_tokens(tensors["tokens"])}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        tokens = tensors["tokens"]
        masked = tokens == self.config.mask_token_id
        mask = slots_mask(tensors["position"], tokens.shape[1], tensors[SLOTS])
        return {"h": tensors["x0"], "active": masked, "canvas": tokens}, {"slots_mask": mask}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        canvas, masked = carry["canvas"], carry["active"]
        after, _ = self._behind(canvas, fixed)
        found = guess(without_mask(self.head(after)["logits"], self.config.mask_token_id))
        filled = fills(found, masked, k, dials)
        canvas = torch.where(filled, found.tokens, canvas)
        h = torch.where(masked.unsqueeze(-1), after, carry["h"])
        return {"h": h, "active": masked & ~filled, "canvas": canvas}, {"drafts": canvas.clone()}

    def head(self, h: Tensor) -> Tensors:
        return {"logits": self.lm_head(self.norm(h))}

    def commit(self, tensors: Tensors) -> Tensors:
        tokens, iterations = tensors["tokens"], tensors["iterations"]
        last = tensors["drafts"].index_select(0, (iterations - 1).clamp_min(0).reshape(1)).squeeze(0)
        block = torch.where(iterations > 0, last, tokens)
        mask = slots_mask(tensors["position"], tokens.shape[1], tensors[SLOTS])
        _, pair = self._behind(block, tensors | {"slots_mask": mask})
        kept = {n: self.stack.cache.to_cache(t, i) for i, (n, t) in enumerate(zip(("keys", "values"), pair))}
        return kept | {"block": block}

    def _behind(self, canvas: Tensor, fixed: Tensors) -> tuple[Tensor, Pair]:
        """A block's states behind all layers, (B, C, d), and its keys and values."""
        x = self.embed_tokens(canvas)
        count = canvas.shape[1]
        whole = {"causal_mask": x.new_zeros(1, 1, count, count)}  # within a block all see each other
        return self.stack(x, 0, fixed | whole, (fixed["past_keys"], fixed["past_values"]))

    # ------------------------------------------------------------------------------------------------ whole sequences

    def states(self, tokens: Tensor, positions: Tensor, seen: Tensor) -> Tensor:
        """States (B, T, d) behind all layers of whole sequences (B, T), without a cache.

        Args:
            positions: (T,) int64; a position may stand for several of the tokens.
            seen: (T, T) bool, which tokens (columns) each sees.
        """
        found = given_angles(positions.cpu().numpy(), self.config.head_width, THETA)
        angles = {name: t.to(tokens.device) for name, t in of_one_text(found).items()}
        mask = torch.where(seen, 0.0, MASKED).to(tokens.device)[None, None]
        x, _ = self.stack(self.embed_tokens(tokens), 0, angles | {"slots_mask": mask, "causal_mask": mask}, None)
        return x

    def logits_of(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of sequences (B, T) of whole blocks, in which every block sees itself and those before."""
        places = torch.arange(tokens.shape[1])
        block = places // self.config.block_size
        return self.head(self.states(tokens, places, block[:, None] >= block))["logits"]

    def denoised(self, noisy: Tensor, clean: Tensor) -> Tensor:
        """Logits (B, T, V) of noisy sequences (B, T), of which every block sees itself and the blocks before as they are in
        `clean`: all blocks in one pass (BD3-LM, section 3.1 and its appendix on masks).
        """
        count = noisy.shape[1]
        places = torch.arange(count).repeat(2)
        both = torch.cat([noisy, clean], 1)
        return self.head(self.states(both, places, training_mask(count, self.config.block_size))[:, :count])["logits"]


def training_mask(count: int, block_size: int) -> Tensor:
    """What [noisy; clean] sequences of `count` tokens each see, (2 count, 2 count) bool: a noisy block itself and the clean ones
    before it, a clean block itself and those before.
    """
    block = (torch.arange(count) // block_size).repeat(2)
    clean = torch.arange(2 * count) >= count
    same = (block[:, None] == block) & (clean[:, None] == clean)
    before = clean & (block[:, None] > block)
    return same | before
