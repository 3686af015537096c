"""What quantising did to a model: loss, divergence and drift of the states beside the float model, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.loop.course import Course, Reader
from rmse_edge.losses import token_loss

from .parallel import cores, split_evenly
from .reader import reader_of

BATCH = 16  # sequences run at once: their states of all loops are kept


@torch.no_grad()
def compare(
    reference: Any, candidate: Any, blocks: Tensor, progress: Callable[[float], object] = lambda _: None
) -> dict[str, Any]:
    """Both models over the same blocks, each from an empty past, in PyTorch.

    Args:
        blocks: (n, T + 1) int64.
        progress: called with the number of tokens done since the last call, from several threads.
    Returns:
        "full_depth" and, where the model has exits, "adaptive": see `_setting`; "drift": per loop, the mean relative
        difference of the states at full depth, as the head reads them.
    """
    settings: dict[str, list[dict[str, Tensor]]] = {"full_depth": [], "adaptive": []}
    drift: list[Tensor] = []
    readers = ours, theirs = reader_of(reference), reader_of(candidate)
    with cores() as workers:
        for part in blocks.split(split_evenly(2 * len(blocks), workers.count, 4, BATCH)):
            tokens, targets = part[:, :-1], part[:, 1:]
            runs = [(reader, stop) for stop in (False, True)[: 1 + ours.exits] for reader in readers]

            def run(which: tuple[Reader, bool], tokens: Tensor = tokens, share: float = 1 / len(runs)) -> Course:
                course = which[0].read(tokens, stop=which[1], every=not which[1])
                progress(share * tokens.numel())
                return course

            a, b, *early = workers.each(run, runs)
            shift = [((y - x).norm(dim=-1) / x.norm(dim=-1)).mean() for x, y in zip(a.states, b.states)]
            drift.append(torch.stack(shift) * len(part))
            settings["full_depth"].append(_pair(ours, theirs, a, b, targets))
            if early:
                settings["adaptive"].append(_pair(ours, theirs, early[0], early[1], targets))
    result = {name: _setting(parts) for name, parts in settings.items() if parts}
    return result | {"drift": (torch.stack(drift).sum(0) / len(blocks)).tolist(), "tokens": blocks[:, 1:].numel()}


def _pair(ours: Reader, theirs: Reader, a: Course, b: Course, targets: Tensor) -> dict[str, Tensor]:
    """Figures of every position, (B, T) each, from the courses of both models."""
    p, q = ours.logits(a.states[-1]), theirs.logits(b.states[-1])
    log_p, log_q = F.log_softmax(p.double(), -1), F.log_softmax(q.double(), -1)
    return {
        "float": token_loss(p, targets),
        "quantized": token_loss(q, targets),
        "kl": (log_p.exp() * (log_p - log_q)).sum(-1),
        "same_top": (p.argmax(-1) == q.argmax(-1)).double(),
        "float_depth": a.depth.double(),
        "quantized_depth": b.depth.double(),
    }


def _setting(parts: list[dict[str, Tensor]]) -> dict[str, Any]:
    """Means over all positions; standard errors from the means of blocks, that of the increase paired.

    `increase` is the quantised model's loss minus the float one's, nats per token; `perplexity_increase` what it makes of
    the perplexity, relative.
    """
    of = {name: torch.cat([p[name] for p in parts]).double() for name in parts[0]}
    mean = {name: values.mean().item() for name, values in of.items()}

    def error(values: Tensor) -> float | None:
        by_block = values.mean(1)
        return by_block.std().item() / math.sqrt(len(by_block)) if len(by_block) > 1 else None

    increase = of["quantized"] - of["float"]
    loss_se, perplexity = error(of["quantized"]), {side: math.exp(mean[side]) for side in ("float", "quantized")}
    return {
        "loss": {"float": mean["float"], "quantized": mean["quantized"]},
        "perplexity": perplexity,
        "perplexity_se": None if loss_se is None else perplexity["quantized"] * loss_se,  # delta method
        "increase": increase.mean().item(),
        "increase_se": error(increase),
        "perplexity_increase": math.expm1(increase.mean().item()),
        "kl": mean["kl"],
        "same_top_token": mean["same_top"],
        "mean_depth": {"float": mean["float_depth"], "quantized": mean["quantized_depth"]},
        "same_depth": (of["float_depth"] == of["quantized_depth"]).double().mean().item(),
    }


@torch.no_grad()
def mean_depth(model: Any, blocks: Tensor) -> float:
    """Loops a position runs on average, by the model's own exit rules: blocks (n, T) int64."""
    reader = reader_of(model)
    with cores() as workers:
        parts = blocks.split(split_evenly(len(blocks), workers.count, 4, BATCH))
        depths = list(workers.each(lambda part: reader.read(part, stop=True, every=False).depth, parts))
    return float(torch.cat(depths).double().mean())
