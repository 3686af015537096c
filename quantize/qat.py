"""A short finetune of the rounded model: the float model teaches it, at every depth, by its exit distribution.

The integers are what is deployed, so the forward pass always uses rounded weights; gradients pass through the rounding
to float weights behind it (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432). Scales stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from rmse_edge.errors import ArgumentError
from rmse_edge.loop.stop import exit_distribution

from .reader import reader_of
from .tensors import QuantizedTensor, quantize_with

RATE = 0.01  # of Adam, in steps of a weight's own scale: scales differ thirtyfold between tensors
BATCH = 8


def finetune(
    reference: Any,
    model: Any,
    tensors: dict[str, QuantizedTensor],
    blocks: Tensor,
    steps: int,
    seed: int = 0,
    progress: Callable[[float], object] = lambda _: None,
) -> dict[str, QuantizedTensor]:
    """Train the quantised weights to say what `reference` says.

    Args:
        model: holds the dequantised weights; left with the new ones.
        blocks: (n, T) int64, drawn from with `seed`.
        progress: called with each step's loss, nats.
    Returns:
        New codes under the same scales.
    """
    latent, step = {}, {name: _per_weight(q) for name, q in tensors.items()}
    for name, q in tensors.items():
        # GPTQ moved codes away from the nearest: start from where it ended, inside each code's interval.
        middle = q.dequantize() / step[name]
        start = reference.get_parameter(name).detach() / step[name]
        latent[name] = torch.clamp(start, middle - 0.49, middle + 0.49).requires_grad_()
    optimizer = torch.optim.Adam(latent.values(), lr=RATE, betas=(0.9, 0.99))
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = blocks[torch.randint(len(blocks), (BATCH,), generator=draw)]
        rounded = {name: _Round.apply(w * step[name], tensors[name]) for name, w in latent.items()}
        loss = _divergence(reference, model, rounded, tokens)
        if not bool(torch.isfinite(loss)):
            raise ArgumentError(
                "qat_steps", "the finetune diverged; leave it out, or give another text to calibrate with"
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(loss.item())
    result = {}
    with torch.no_grad():
        for name, w in latent.items():
            q = tensors[name]
            result[name] = quantize_with(w * step[name], q.scales, q.zeros, q.format)
            model.get_parameter(name).copy_(result[name].dequantize())
    return result


def _per_weight(q: QuantizedTensor) -> Tensor:
    return q.scales.repeat_interleave(q.shape[-1] // q.scales.shape[-1], -1)


class _Round(torch.autograd.Function):
    """To the nearest code; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx, weight: Tensor, q: QuantizedTensor) -> Tensor:
        return quantize_with(weight, q.scales, q.zeros, q.format).dequantize()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _divergence(reference: Any, model: Any, rounded: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """sum_k p_k KL(reference || model) after loop k, averaged over positions; p is the reference's exit distribution, or
    even where it has none."""
    with torch.no_grad():
        reader = reader_of(reference)
        course = reader.read(tokens)
        wanted = [F.log_softmax(reader.logits(h), -1) for h in course.states]
        even = torch.ones_like(course.depth, dtype=torch.float32).expand(len(wanted), *tokens.shape) / len(wanted)
        p = even if course.gates is None else exit_distribution(course.gates)
        p = 0.5 * p + 0.5 / len(p)  # every depth counts, as in the Hessians
    names = {f"model.{name}": w for name, w in rounded.items()}
    found = functional_call(_Trajectory(model), names, (tokens,))
    losses = [(w.exp() * (w - F.log_softmax(logits, -1))).sum(-1) for w, logits in zip(wanted, found)]
    return (p * torch.stack(losses)).sum(0).mean()


class _Trajectory(torch.nn.Module):
    """`functional_call` calls forward: the logits after every loop."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> list[Tensor]:
        reader = reader_of(self.model)
        return [reader.logits(h) for h in reader.read(tokens).states]
