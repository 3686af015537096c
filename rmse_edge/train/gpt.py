"""A standard pre-norm GPT of L separate layers: the yardstick a looped model is measured against.

LayerNorm, multi-head attention, GELU MLP of 4 d, as in nanoGPT (github.com/karpathy/nanoGPT, model.py). By default with rotary
positions instead of learned ones: those take more text to learn than the recipe gives, and the comparison is to be about the
loop. `positions` "learned" and `bias` give nanoGPT's published block. Trained by the same recipe on the same blocks.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rmse_edge.errors import CheckpointError, ConfigError
from rmse_edge.files import changed_folder
from rmse_edge.layers.attention import rotate
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.numbers import Count, Positions, Share, VocabularySize
from rmse_edge.schema import check_fields, read_json

MODEL_TYPE = "gpt-baseline"


@dataclass(frozen=True)
class GPTConfig:
    """Shape of the baseline; the fields mean what they mean in `RMSEConfig`."""

    vocab_size: VocabularySize = 65
    d_model: Count = 192
    n_heads: Count = 6
    n_layers: Count = 12
    block_size: Positions = 256
    dropout: Share = 0.1
    positions: Literal["rotary", "learned"] = "rotary"
    bias: bool = False  # of norms and linear layers, the head's aside
    tied: bool = False  # the head is the embedding

    def __post_init__(self) -> None:
        check_fields(self, ConfigError)
        if self.d_model % self.n_heads:
            raise ConfigError(f"n_heads: got {self.n_heads}, expected a divisor of d_model ({self.d_model})")
        if self.positions == "rotary" and self.d_model // self.n_heads % 2:
            raise ConfigError(f"n_heads: got {self.n_heads}, expected heads of an even width (d_model {self.d_model})")

    def macs_per_token(self, context: float) -> int:
        """Multiply-adds of one token through all layers and the head, attending to `context` positions on average."""
        d = self.d_model
        return int(self.n_layers * (12 * d * d + 2 * d * context) + d * self.vocab_size)


class Layer(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        d = config.d_model
        self.config = config
        self.norm_1, self.norm_2 = nn.LayerNorm(d, bias=config.bias), nn.LayerNorm(d, bias=config.bias)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=config.bias), nn.Linear(d, d, bias=config.bias)
        self.up, self.down = nn.Linear(d, 4 * d, bias=config.bias), nn.Linear(4 * d, d, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, count, d = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, count, 3, self.config.n_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # (B, H, T, hd)
        if angles is not None:
            query, key = rotate(query, *angles), rotate(key, *angles)
        seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.dropout(self.out(seen.transpose(1, 2).reshape(batch, count, d)))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm_2(x)))))


class GPT(nn.Module):
    cos: Tensor  # (T, hd / 2) rotary angles
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        if config.positions == "learned":
            self.places = nn.Embedding(config.block_size, config.d_model)
        else:
            angles = rotary_angles(np.arange(config.block_size), config.d_model // config.n_heads, 10_000.0)
            for name, table in zip(("cos", "sin"), angles):
                self.register_buffer(name, torch.from_numpy(table), persistent=False)  # (T, hd / 2)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = nn.LayerNorm(config.d_model, bias=config.bias)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.dropout = nn.Dropout(config.dropout)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_stream = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * config.n_layers) ** 0.5 if into_stream else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T) int64 -> logits (B, T, V)."""
        count = tokens.shape[1]
        x, angles = self.embed(tokens), None
        if self.config.positions == "learned":
            x = x + self.places.weight[:count]
        else:
            angles = self.cos[:count], self.sin[:count]
        x = self.dropout(x)
        for layer in self.layers:
            x = layer(x, angles)
        return self.head(self.norm(x))


def save_gpt(model: GPT, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors, the weights rounded to `dtype`; both or none."""
    config = {"model_type": MODEL_TYPE} | dataclasses.asdict(model.config)
    with changed_folder(folder, CheckpointError) as scratch:
        (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {k: v.to(dtype).contiguous() for k, v in model.state_dict().items()}
        if model.config.tied:
            del weights["head.weight"]
        save_file(weights, scratch / "model.safetensors")


def load_gpt(folder: Path) -> GPT:
    """The baseline saved in `folder`, in float32 and eval mode.

    Raises:
        CheckpointError: it is not there or does not fit its configuration.
    """
    try:
        config = read_json(folder / "config.json", CheckpointError)
        if config.pop("model_type", None) != MODEL_TYPE:
            raise CheckpointError(f"{folder / 'config.json'}: not the configuration of a {MODEL_TYPE}")
        model = GPT(GPTConfig(**config))
        weights = load_file(folder / "model.safetensors")
        if model.config.tied:
            weights["head.weight"] = weights["embed.weight"]
        model.load_state_dict({k: v.float() for k, v in weights.items()})
    except CheckpointError:
        raise
    except Exception as error:  # safetensors, JSON and load_state_dict each have their own
        raise CheckpointError(f"{folder}: not a readable {MODEL_TYPE} ({error})") from None
    return model.eval()
