"""One module whose forward is one stage's loss, so that DDP and FSDP see a plain forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE, Hits
from rmse_edge.loop.stop import gate_stops
from rmse_edge.losses import token_loss

from .facts import fetched, search_loss
from .gpt import GPT
from .losses import chosen, cross_entropies, expected_loss, gate_loss, losses_by_depth
from .recipe import Recipe
from .sources import IGNORED, Batch


def draw_thresholds(count: int) -> Tensor:
    """One brake threshold per sequence, (count, 1), from U(0, 1.25).

    That samples exits from the gate's distribution, keeps neighbours consistent as one setting of the dial would, and
    leaves a fifth of the sequences at full depth.
    """
    return 1.25 * torch.rand(count, 1)


class Objective(nn.Module):
    """Maps a batch of token blocks to the loss of the current stage."""

    def __init__(self, model: Any, recipe: Recipe) -> None:
        super().__init__()
        self.model = model
        self.recipe = recipe

    def forward(
        self, batch: Batch, stage: str, loops: int = 0, entropy_weight: float = 0.0, thresholds: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            batch: see `rmse_edge.train.sources`.
            stage: "loops", "gate" or "exits"; "validate" for the plain losses at full depth.
            loops: iterations of this step; only stage "loops" varies it. 0: the trained depth.
            entropy_weight: beta of the expected loss, nats; stage "loops" only.
            thresholds: (B, 1) brake thresholds, stage "exits" only.
        Returns:
            (loss to differentiate, next-token loss at the last state in nats, mean depth), scalars; for "validate" the
            first is the mean next-token loss after every iteration, (max_loops,), of a GPT (1,).
        """
        tokens, targets = batch["tokens"], batch["targets"]
        asked = None if bool((targets != IGNORED).all()) else targets != IGNORED  # (B, T)
        model = self.model
        hits, keys = None, None
        if isinstance(model, RMSE) and "passages" in batch:
            hits, keys = fetched(model, batch, loops or model.config.max_loops)
        if isinstance(model, GPT) or stage == "validate":
            losses = losses_by_depth(model, tokens, targets, asked, hits)
            loss = losses.flatten(1).mean(1)
            loss, last = (loss, loss[-1]) if stage == "validate" else (loss[-1], loss[-1])
            layers = model.config.n_layers if isinstance(model, GPT) else model.config.dials.max_loops
            return loss, last.detach(), last.new_tensor(float(layers))
        if stage == "exits":
            assert thresholds is not None
            return self.exits(model, batch, asked, hits, thresholds)
        surprises: list[Tensor] = []
        more: dict[str, Any] = {}
        if isinstance(model, RMSE):
            watched = self.recipe.surprise_weight and model.memory is not None
            more = {"hits": hits, "surprises": surprises if watched else None}
        last_alone = stage == "loops" and self.recipe.objective == "last"
        states, gates, _ = model.trajectory(tokens, loops or None, every=not last_alone, **more)
        last_state = states[-1]
        states, gates, targets = chosen(states, gates, targets, asked)
        losses = cross_entropies(model, states, targets)
        if last_alone:
            loss, depth = losses[-1].mean(), losses.new_tensor(float(loops))
        else:
            loss, depth = expected_loss(losses, gates, entropy_weight)
        if stage == "gate":
            loss = gate_loss(losses, gates, self.recipe.gate_cost)
            return loss, losses[-1].mean().detach(), depth
        if keys is not None:
            loss = loss + search_loss(model, last_state, batch, keys)
        if surprises:
            loss = loss + self.recipe.surprise_weight * torch.cat(surprises).mean()
        return loss, losses[-1].mean().detach(), depth

    def exits(
        self, model: Any, batch: Batch, asked: Tensor | None, hits: Hits | None, thresholds: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss at the state each position stopped in, one brake threshold per sequence."""

        def stop(k: int, before: Tensor, after: Tensor, log_survival: Tensor) -> Tensor:
            return gate_stops(log_survival, thresholds) & (k + 1 >= model.config.min_loops)

        more = {} if hits is None else {"hits": hits}
        states, gates, depth = model.trajectory(batch["tokens"], stop=stop, **more)
        states, _, targets = chosen(states[-1:], gates, batch["targets"], asked)
        loss = token_loss(model.read_out(states[-1]), targets).mean()
        return loss, loss.detach(), depth.float().mean()
