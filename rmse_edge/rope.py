"""Rotary position encoding with angles made in float64.

At position 10^6 a float32 angle is wrong by hundredths of a radian; cos and sin are therefore computed on the host in
float64 and only then rounded (Su et al. 2021, RoFormer, eq. 34; half-rotate layout).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def inverse_frequencies(dims: int, theta: float) -> np.ndarray:
    """Angular frequency of each channel pair, radians per position, (dims / 2,) float64."""
    return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def rotary_angles(positions: np.ndarray, dims: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of `positions` (any shape, integers) as float32, shape positions.shape + (dims / 2,)."""
    angle = np.asarray(positions, dtype=np.float64)[..., None] * inverse_frequencies(dims, theta)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel i with channel i + hd/2 by the given angles.

    Args:
        x: (B, H, C, hd) queries or keys.
        cos, sin: (B or 1, 1, C, hd/2).
    """
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
