"""Short causal convolutions over positions, and what they keep of the positions before a call: their last k - 1 inputs.

    y_t = (x_t + sum_j w_j * x_(t-j)) / sqrt(number of terms),   j = 0 .. k - 1

The weights w_j are of a channel, or of a channel and the position that is computed. Inputs lie in a ring of k - 1 slots, like
keys in a window: position p in slot p mod (k - 1). `ring_order` brings them back into the order of their positions.

Source of the equations: Inkling 2, as `modeling_inkling2_loop.py` of transformers 5.24.0 computes it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .masks import ring_positions


def ring_order(position: Tensor, slots: int) -> Tensor:
    """A product with this brings a ring's rows into the order of their positions: (B, S, S), 0 or 1.

    Row m is 1 at the slot of position `position` - S + m (`position` is (B,)), and 0 throughout if that is before the text.
    As a product it is the same in every engine, and rows of a batch may stand at different positions.
    """
    wanted = position[:, None] - slots + torch.arange(slots, device=position.device)  # (B, S)
    held = ring_positions(position, slots)
    return ((held[:, None] == wanted[..., None]) & (wanted >= 0)[..., None]).to(torch.float32)


class ShortConvolution(nn.Module):
    """Weights per channel, (channels, 1, k) as `torch.nn.Conv1d` has them: the last one is of the position itself."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.conv1d = nn.Conv1d(channels, channels, size, groups=channels, bias=False)

    def forward(self, x: Tensor, past: Tensor, read: Tensor) -> Tensor:
        """
        Args:
            x: (B, G, C, n), whose G * n channels are convolved each by itself.
            past: the k - 1 positions before, in their order, (B, G, k - 1, n).
            read: what x was projected from; not asked for.
        """
        groups, size = x.shape[1], self.size
        taps = self.conv1d.weight.reshape(groups, 1, -1, size)  # (G, 1, n, k)
        return convolved(x, past, [taps[..., size - 1 - lag] for lag in range(size)], size + 1)


class DynamicShortConvolution(nn.Module):
    """Weights per channel, and one per group of channels that each position projects for itself."""

    def __init__(self, channels: int, size: int, width: int, groups: int) -> None:
        """
        Args:
            width: of what the weights are projected from.
        """
        super().__init__()
        self.size = size
        self.static_weight = nn.Parameter(torch.zeros(size, channels))  # the first one is of the position itself
        self.weight_proj = nn.Linear(width, groups * size, bias=False)

    def forward(self, x: Tensor, past: Tensor, read: Tensor) -> Tensor:
        """As of `ShortConvolution`; `read` (B, C, width) is what the positions' weights are projected from."""
        groups, size = x.shape[1], self.size
        static = self.static_weight.view(size, groups, 1, -1)
        own = self.weight_proj(read).unflatten(-1, (groups, size)).transpose(1, 2)  # (B, G, C, k)
        return convolved(x, past, [static[lag] + own[..., lag : lag + 1] for lag in range(size)], 2 * size + 1)


def convolved(x: Tensor, past: Tensor, taps: list[Tensor], terms: int) -> Tensor:
    """(x + sum of x, `lag` positions back, times taps[lag]) / sqrt(terms), (B, G, C, n); `past` as in `ShortConvolution`."""
    joined, count = torch.cat([past, x], 2), x.shape[2]
    found = x
    for lag, weight in enumerate(taps):
        first = len(taps) - 1 - lag
        found = found + joined[:, :, first : first + count] * weight
    return found * terms**-0.5


def depthwise(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Each channel convolved by itself, nothing added or scaled.

    Args:
        x: (B, G, C, n).
        past: the k - 1 positions before, in their order, (B, G, k - 1, n).
        weight: (n, 1, k), of which the last is of the position itself.
        bias: (n,).
    """
    joined, count, size = torch.cat([past, x], 2), x.shape[2], weight.shape[-1]
    terms = [joined[:, :, tap : tap + count] * weight[:, 0, tap] for tap in range(size)]
    found = terms[0]
    for term in terms[1:]:
        found = found + term
    return found if bias is None else found + bias
