"""The best plans of prompts: which layers of a frozen model to skip, run or repeat, found by search. Labels of routers.

A plan is worth the loss of what follows the prompt, plus a price for every execution. The plans are a tree of three branches a layer;
a beam search goes down it with the best `width` of them, each judged as if all layers behind were run once. With every plan kept
the search is exhaustive. Published labels are found by Monte Carlo tree search over the same choices, of a model too deep for
this (Dr.LLM, arXiv 2510.12773, section 3.2).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rmse_edge.layers.routers import chances
from rmse_edge.loop.plan import MOST_EXECUTIONS
from rmse_edge.losses import token_loss

CHOICES = MOST_EXECUTIONS + 1
EVERY = 4096  # plans that are kept at most, of a search that keeps all


class Found(NamedTuple):
    """The best plans of prompts."""

    counts: Tensor  # (B, L) int64, how often each layer is run
    loss: Tensor  # (B,) nats a token of what follows the prompt
    once: Tensor  # (B,) the same with every layer run once


def answer_loss(model: Any, x: Tensor, tokens: Tensor, prompt: int) -> Tensor:
    """The loss of what follows a prompt of so many tokens, (n,) nats a token; of states (n, T, d) behind all layers."""
    logits = model.read_out(x[:, prompt - 1 : -1])
    return token_loss(logits, tokens[:, prompt:]).mean(-1)


@torch.no_grad()
def best_plans(
    model: Any, tokens: Tensor, prompt: int, price: float, width: int | None = 4, pooled: bool = False
) -> Found:
    """The best plan of each prompt.

    Args:
        model: as `DrLlm`: `run_layer`, `read_out`, `prelude`, `fixed_of`.
        tokens: (B, T), of which the first `prompt` are the prompt.
        price: of an execution, nats a token.
        width: plans that the search goes on with; None: all of them.
        pooled: find the one plan that is best for all of the prompts together.
    """
    c, (batch, count) = model.config, tokens.shape
    layers = c.num_hidden_layers
    if width is None and CHOICES**layers > EVERY:
        raise ValueError(f"{CHOICES**layers} plans are too many to try, at most {EVERY}; search with a width")
    fixed = model.fixed_of(count, tokens.device)

    def behind(x: Tensor, first: int) -> Tensor:
        """States (B, W, T, d) behind the layers from `first` on, each run once -> losses (B, W)."""
        flat = x.flatten(0, 1)
        for index in range(first, layers):
            flat = model.run_layer(index, flat, fixed)
        return answer_loss(model, flat, tokens.repeat_interleave(x.shape[1], 0), prompt).unflatten(0, (batch, -1))

    x = model.prelude({"tokens": tokens})["x0"].unsqueeze(1)  # (B, W, T, d)
    loss = once = behind(x, 0)  # of each kept plan, with the layers behind run once
    counts = torch.zeros(batch, 1, layers, dtype=torch.int64, device=tokens.device)
    for index in range(layers):
        run = model.run_layer(index, x.flatten(0, 1), fixed)
        twice = model.run_layer(index, run, fixed)
        branches = [x, *(t.unflatten(0, (batch, -1)) for t in (run, twice))]
        # A layer that is run once leaves a plan what it was judged as.
        losses = torch.stack([behind(branches[0], index + 1), loss, behind(branches[2], index + 1)], 2)  # (B, W, 3)
        made = counts.unsqueeze(2).repeat(1, 1, CHOICES, 1)
        made[..., index] = torch.arange(CHOICES, device=tokens.device)
        value = (losses + price * made.sum(-1)).flatten(1)
        if pooled:
            value = value.mean(0, keepdim=True).expand(batch, -1)
        keep = value.argsort(dim=1, stable=True)[:, : width or EVERY]
        if index == layers - 1:
            keep = keep[:, :1]
        rows = torch.arange(batch, device=tokens.device)[:, None]
        x = torch.stack(branches, 2).flatten(1, 2)[rows, keep]
        loss, counts = losses.flatten(1)[rows, keep], made.flatten(1, 2)[rows, keep]
    return Found(counts[:, 0], loss[:, 0], once[:, 0])


@torch.no_grad()
def loss_of_plans(model: Any, tokens: Tensor, prompt: int, counts: Tensor) -> Tensor:
    """The loss of what follows each prompt by plans (B, L): (B,) nats a token."""
    fixed = model.fixed_of(tokens.shape[1], tokens.device)
    x = model.prelude({"tokens": tokens})["x0"]
    for index in range(model.config.num_hidden_layers):
        x = _run(model, index, x, fixed, counts[:, index])
    return answer_loss(model, x, tokens, prompt)


@torch.no_grad()
def routed(model: Any, tokens: Tensor, prompt: int, route: float) -> Tensor:
    """The plans (B, L) that routers make of prompts at a setting of the dial `route`."""
    x = model.prelude({"tokens": tokens[:, :prompt]})["x0"]
    fixed, dial = model.fixed_of(prompt, tokens.device), torch.tensor(route)
    found = []
    for index in range(model.config.num_hidden_layers):
        found.append(chances(model.router_logits(index, x), dial).argmax(-1))
        x = _run(model, index, x, fixed, found[-1])
    return torch.stack(found, 1)


@torch.no_grad()
def read_by_routers(model: Any, tokens: Tensor, prompt: int, counts: Tensor) -> Tensor:
    """What the router of each layer reads of prompts that are run by plans (B, L): means of windows (B, L, W, d)."""
    x = model.prelude({"tokens": tokens[:, :prompt]})["x0"]
    fixed = model.fixed_of(prompt, tokens.device)
    found = []
    for index in range(model.config.num_hidden_layers):
        found.append(model.window_means(x))
        x = _run(model, index, x, fixed, counts[:, index])
    return torch.stack(found, 1)


def _run(model: Any, index: int, x: Tensor, fixed: dict[str, Tensor], counts: Tensor) -> Tensor:
    """States (B, T, d) behind a layer that each row runs as often as `counts` (B,) says."""
    for n in range(1, MOST_EXECUTIONS + 1):
        if len(rows := torch.nonzero(counts >= n).squeeze(1)):
            x = x.index_copy(0, rows, model.run_layer(index, x[rows], fixed))
    return x
