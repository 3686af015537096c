"""Small models with lively gates, and the plain host loop that tests run them with, call by call.

`RingHost` and the exit rules in `whole_sequence` are written a second time on purpose: tests hold the project's own
hosts, `exit.stops` and `RMSE.whole_text` against them, so they must not be made of the same code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from rmse_edge.arch.rmse.config import RMSEConfig
from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.layers.rope import rotary_angles
from rmse_edge.loop.dials import DIALS
from rmse_edge.loop.drive import run_loop
from rmse_edge.loop.stop import delta_stops, entropy_stops, gate_stops
from rmse_edge.text import split
from rmse_edge.train.recipe import Recipe
from rmse_edge.train.sources import TextSource


def small_config(**changes: Any) -> RMSEConfig:
    values: dict[str, Any] = dict(
        vocab_size=37, d_model=32, n_heads=4, n_kv_heads=2, head_dim=16, window=64, max_loops=5, n_experts=24, top_k=3,
        expert_width=32, shared_width=32, block_size=64,
    )  # fmt: skip
    return RMSEConfig(**(values | changes))


def lively_model(config: RMSEConfig, seed: int = 0) -> RMSE:
    """Random weights whose states move from loop to loop and whose gate has opinions, so that depths really vary."""
    torch.manual_seed(seed)
    model = RMSE(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("post_norm.weight"):
                p.fill_(1.0)
        model.gate.weight.normal_(std=0.5)
        model.gate.bias.fill_(-1.5)
        model.head_proj.weight.normal_(std=0.3)
        model.block.experts.balance_bias.normal_(std=0.3)
    return model


def dials(model: RMSE, **changes: float) -> dict[str, Tensor]:
    """The model's dials as scalars: full depth, no exits, but for `changes`."""
    values = {"max_loops": model.config.max_loops, "min_loops": 1, "exit_threshold": 1.0, "exit_epsilon": 0.0}
    values |= {"exit_entropy": 0.0} if "entropy" in model.config.exit_rules else {}
    return {
        name: torch.tensor(value, dtype=getattr(torch, DIALS[name].dtype)) for name, value in (values | changes).items()
    }


class RingHost:
    """Calls a model on chunks and keeps its ring of keys and values, as a runtime does."""

    def __init__(self, model: RMSE, batch: int = 1) -> None:
        self.model, self.position = model, 0
        self.state = {s.name: s.zeros().repeat(1, batch, 1, 1, 1) for s in model.spec(1).rows}  # (K, B, G, W, hd)
        self.memory = {} if model.memory is None else model.memory.initial(batch)
        self.segment: list[Tensor] = []  # exit states since the last write

    @torch.no_grad()
    def call(self, tokens: Tensor, dial: dict[str, Tensor], chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Run tokens (B, n) padded to `chunk` rows and commit the n.

        Returns:
            (logits (B, n, V), depth (B, n)).
        """
        config, (batch, count) = self.model.config, tokens.shape
        chunk = chunk or count
        padded = torch.zeros(batch, chunk, dtype=torch.int64)
        padded[:, :count] = tokens
        angles = rotary_angles(np.arange(self.position, self.position + chunk), config.rotary_dims, config.rope_theta)
        dtype = self.model.embed.weight.dtype
        cos, sin = (torch.from_numpy(a).to(dtype).expand(batch, -1, -1) for a in angles)
        tensors = self.model.prelude({"tokens": padded}) | self.state | self.memory | {"cos": cos, "sin": sin}
        tensors |= {"position": torch.tensor([self.position] * batch), "n_valid": torch.tensor([count] * batch)}
        result = run_loop(self.model, self.model.spec(chunk), tensors, dial)
        new = self.model.commit(tensors | result)
        kept = min(count, config.window)
        slots = torch.arange(self.position + count - kept, self.position + count) % config.window
        for name, past in (("keys", "past_keys"), ("values", "past_values")):
            self.state[past][:, :, :, slots] = new[name][:, :, :, count - kept : count]
        self.position += count
        self.segment.append(result["h"][:, :count])
        if self.memory and self.position % 64 == 0:
            given = {"segment": torch.cat(self.segment, 1), "n_valid": torch.tensor([64] * batch)}
            self.memory = {n: t for n, t in self._memorized(given).items() if n != "surprise"}
            self.segment = []
        return self.model.head(result["h"])["logits"][:, :count], result["depth"][:, :count]

    def _memorized(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        new = self.model.memorize(given | self.memory)
        return {name.removeprefix("next_"): tensor for name, tensor in new.items()}

    def feed(self, tokens: Tensor, dial: dict[str, Tensor], sizes: list[int], pad_to: int = 0) -> tuple[Tensor, Tensor]:
        """All of tokens (B, T) in calls of `sizes` (repeated as needed), none across a multiple of 64."""
        outs, done, i = [], 0, 0
        while done < tokens.shape[1]:
            size = min(sizes[i % len(sizes)], 64 - done % 64, tokens.shape[1] - done)
            outs.append(self.call(tokens[:, done : done + size], dial, max(pad_to, size)))
            done, i = done + size, i + 1
        logits, depth = zip(*outs)
        return torch.cat(logits, 1), torch.cat(depth, 1)


@torch.no_grad()
def whole_sequence(model: RMSE, tokens: Tensor, dial: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same as `RingHost.feed`, from one `trajectory` over tokens (B, T) from an empty past."""

    def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
        stops = gate_stops(log_survival, dial["exit_threshold"]) | delta_stops(before, after, dial["exit_epsilon"])
        if "exit_entropy" in dial:
            stops = stops | entropy_stops(model.head(after)["logits"], dial["exit_entropy"])
        return stops & (k + 1 >= dial["min_loops"])

    states, _, depth = model.trajectory(tokens, int(dial["max_loops"]), stop)
    return model.head_proj(states[-1]), depth


def small_recipe(**changes: Any) -> Recipe:
    """Twelve steps through all three stages, in float32 on every processor."""
    model = dict(
        vocab_size=40, d_model=32, n_heads=2, n_kv_heads=1, head_dim=16, window=64, max_loops=4, n_experts=16, top_k=2,
        expert_width=32, shared_width=32, dropout=0.1, block_size=64,
    )  # fmt: skip
    values: dict[str, Any] = dict(
        model=model | changes.pop("model", {}), batch_size=4, steps=6, depths=(2, 4), gate_steps=3, exit_steps=3, warmup=2,
        eval_every=3, eval_blocks=4, clip=0.3,
        precision="fp32",
    )  # fmt: skip
    return Recipe(**(values | changes))


def small_text(length: int = 4000, seed: int = 0) -> np.ndarray:
    """Token ids below 40 with something to learn: most of them follow from the one before."""
    rng = np.random.default_rng(seed)
    ids = np.zeros(length, dtype=np.int64)
    for i in range(1, length):
        ids[i] = rng.integers(40) if rng.random() < 0.2 else (7 * ids[i - 1] + 3) % 40
    return ids


def text_source(ids: np.ndarray, block: int = 64) -> TextSource:
    """The usual split of a token array as a training source."""
    return TextSource(split(ids, "train"), split(ids, "validation"), block)
