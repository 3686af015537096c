"""Rotary position encoding with angles made in float64.

At position 10^6 a float32 angle is wrong by hundredths of a radian; cos and sin are therefore computed on the host in
float64 and only then rounded (Su et al. 2021, RoFormer, eq. 34). NumPy only: hosts use it without PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np


def inverse_frequencies(dims: int, theta: float) -> np.ndarray:
    """Angular frequency of each channel pair, radians per position, (dims / 2,) float64."""
    return theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)


def rotary_angles(positions: np.ndarray, dims: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of `positions` (any shape, integers) as float32, shape positions.shape + (dims / 2,)."""
    angle = np.asarray(positions, dtype=np.float64)[..., None] * inverse_frequencies(dims, theta)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def given_angles(
    positions: np.ndarray, dims: int, theta: float, further: Mapping[str, float] | None = None
) -> dict[str, np.ndarray]:
    """What a host tells a call of its positions: cos and sin, as `rotary_angles` makes them, by name.

    Args:
        dims: channels of each head that turn; 0: nothing is told.
        further: other bases by name, for layers that turn by them: they are cos_NAME and sin_NAME.
    """
    found: dict[str, np.ndarray] = {}
    for ending, base in {"": theta, **{f"_{name}": base for name, base in (further or {}).items()}}.items():
        if dims:
            found[f"cos{ending}"], found[f"sin{ending}"] = rotary_angles(positions, dims, base)
    return found
