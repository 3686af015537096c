"""Block diffusion: what a model learns from a text in which blocks are masked to some extent, and what it is measured by.

    t of every block ~ U(sampling_eps_min, sampling_eps_max);  a token is masked with probability m(t)
    loss = mean over tokens of  [masked]  m'(t) / m(t)  (-log p(token | its block as masked, the blocks before as they are))

(Arriola et al. 2025, Block Diffusion, arXiv 2503.09573, eq. 7 and 8). The first token of a sequence is never masked: it is given, as
the published training gives a begin-of-text token. Published code draws again what is masked in a block until its share is
inside the clipped range; here t alone is in that range.

**The bound that is reported** is the same expectation over the full range of t, written as in any-order autoregression: of a
block of n tokens m = 1..n are masked, each m as likely, all choices of them as likely, and a masked one weighs n / m
(Nie et al. 2025, LLaDA, arXiv 2502.09992, eq. 6). It is the same for every schedule, has less variance than drawing t, and at blocks
of one token it is no bound: it is the autoregressive loss itself, exactly.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from rmse_edge.loop.unmask import without_mask

from .noise import SCHEDULES, times
from .recipe import Recipe
from .sources import Batch, TextSource

DRAWS = 8  # of masks for each sequence that is measured
FEW = 2  # where very many sequences are


class BlockDiffusion(nn.Module):
    """Maps a batch of token blocks to the loss, as `Objective` does (rmse_edge/train/objective.py)."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: Batch, stage: str, loops: int = 0, entropy_weight: float = 0.0, thresholds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            batch: `tokens` (B, T), whole blocks.
            stage: "loops" to learn, "validate" for the bound.
        Returns:
            (loss to differentiate, the same in nats a token, steps of a block that are written one token at a time), scalars; for
            "validate" the first is the bound, (1,).
        """
        tokens = batch["tokens"]
        if stage == "validate":
            bound = bounds(self.model, tokens).mean().reshape(1)
            return bound, bound[0], bound[0] * 0 + self.model.config.max_loops
        c = self.model.config
        blocks = tokens.shape[1] // c.block_size
        t = times(torch.rand(len(tokens), blocks, device=tokens.device), c.sampling_eps_min, c.sampling_eps_max)
        chance, weight = (x.repeat_interleave(c.block_size, 1) for x in SCHEDULES[c.noise](t))
        masked = masks(torch.rand(tokens.shape, device=tokens.device), chance)
        loss = losses(self.model, tokens, masked, weight).mean()
        return loss, loss.detach(), loss.detach() * 0 + c.max_loops


def masks(uniform: Tensor, chance: Tensor) -> Tensor:
    """Which tokens are masked, (B, T) bool, given uniform numbers (B, T) in [0, 1); never the first of a sequence."""
    masked = uniform <= chance
    return masked & (torch.arange(masked.shape[1], device=masked.device) > 0)


def losses(model: Any, tokens: Tensor, masked: Tensor, weight: Tensor) -> Tensor:
    """What each token but the first contributes to the loss, (B, T - 1) nats.

    Args:
        tokens, masked, weight: (B, T).
    """
    noisy = torch.where(masked, model.config.mask_token_id, tokens)
    logits = without_mask(model.denoised(noisy, tokens).float(), model.config.mask_token_id)
    log_p = F.log_softmax(logits, -1)
    found = -log_p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where(masked, weight * found, 0.0)[:, 1:]


@torch.no_grad()
def bounds(model: Any, tokens: Tensor, draws: int = DRAWS, seed: int = 0) -> Tensor:
    """The bound of the negative log-likelihood of each sequence, of the first token given: (B,) nats a token.

    Args:
        tokens: (B, T) of whole blocks.
        draws: of masks; the bound is their mean. Blocks of one token need one, since there is nothing to draw.
    """
    size = model.config.block_size
    batch, count = tokens.shape
    draw = np.random.default_rng(seed)
    total = torch.zeros(batch, dtype=torch.float64)
    rounds = draws if size > 1 else 1
    free = np.full(count // size, size)  # tokens of each block that may be masked
    free[0] -= 1
    for i in range(rounds):
        # As likely each, and over all draws each as often as can be.
        share = (i + draw.permuted(np.tile(np.arange(batch), (len(free), 1)), axis=1).T / batch) / rounds  # (B, blocks)
        hidden = 1 + np.floor(share * free).astype(np.int64)  # 1..free of each block
        order = draw.random((batch, len(free), size))
        order[:, 0, 0] = 2.0  # the first token is given
        masked = order.argsort(-1).argsort(-1) < hidden[:, :, None]
        weight = np.broadcast_to((np.maximum(free, 1) / hidden)[:, :, None], masked.shape)
        masked = masked & (np.arange(count).reshape(1, -1, size) > 0)
        parts = [torch.from_numpy(x.reshape(batch, count).copy()).to(tokens.device) for x in (masked, weight)]
        total += losses(model, tokens, parts[0], parts[1].float()).double().mean(1).cpu()
    return (total / rounds).to(torch.float32)


def evaluate_bound(model: Any, blocks: Tensor, batch: int = 16, progress: str | None = None) -> list[float]:
    """The bound, in nats a token, of (n, T + 1) blocks, the last token of each aside: one value, as of a depth of `evaluate`.

    Args:
        progress: label of a progress bar (on a terminal), None for no bar.
    """
    training, device = model.training, next(model.parameters()).device
    model.eval()
    found = [
        bounds(model, part[:, :-1].to(device), FEW, seed=i)
        for i, part in enumerate(
            tqdm(blocks.split(batch), desc=progress, unit="batch", disable=progress is None or None, leave=False)
        )
    ]
    model.train(training)
    return [float(torch.cat(found).double().mean())]


class DiffusionSource(TextSource):
    """A text, for a model that learns by block diffusion."""

    def objective(self, model: Any, recipe: Recipe) -> BlockDiffusion:
        return BlockDiffusion(model, recipe)

    def lr_scales(self) -> dict[str, float]:
        return {}
