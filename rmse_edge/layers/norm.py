"""Norms: what a layer reads, brought to one size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (Zhang and Sennrich 2019), (..., d) -> (..., d)."""

    def __init__(self, dims: int, eps: float, init: float = 1.0) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.full((dims,), init))

    def forward(self, x: Tensor) -> Tensor:
        # Under autocast x may be bfloat16: PyTorch's one-pass kernel wants one type.
        weight = self.weight if self.weight.dtype == x.dtype else self.weight.to(x.dtype)
        return F.rms_norm(x, weight.shape, weight, self.eps)


def unit(x: Tensor) -> Tensor:
    """x / |x| over the last axis."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rms(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x over its root mean square, last axis."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def clipped(x: Tensor, longest: float) -> Tensor:
    """x where it is no longer than `longest` (L2, last axis), otherwise scaled down to that."""
    length = x.square().sum(-1, keepdim=True).sqrt()
    return x * (longest / (length + 1e-6)).clamp(max=1.0)
