"""Rotary angles: right at any distance from the origin."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rmse_edge.layers.attention import rotate
from rmse_edge.layers.rope import given_angles, inverse_frequencies, rotary_angles

HD, THETA = 32, 10_000.0


def turned(x: np.ndarray, position: int) -> torch.Tensor:
    """x (n, hd) float64 as it is turned in float32 at `position`."""
    cos, sin = (torch.from_numpy(a) for a in rotary_angles(np.array([position]), HD, THETA))
    return rotate(torch.from_numpy(x).float()[None, :, None], cos[None], sin[None])[0, :, 0]


def exact(q: np.ndarray, k: np.ndarray, distance: int) -> np.ndarray:
    """q.k in float64 as a function of the distance alone: sum over pairs of Re(q conj(k) e^{i distance w})."""
    half = HD // 2
    a, b = q[:, :half] + 1j * q[:, half:], k[:, :half] + 1j * k[:, half:]
    return (a * b.conj() * np.exp(1j * distance * inverse_frequencies(HD, THETA))).real.sum(-1)


@pytest.mark.parametrize("position", [0, 1_000, 1_000_000, 10_000_000])
def test_q_dot_k_depends_on_the_distance_only(position: int) -> None:
    rng = np.random.default_rng(0)
    q, k = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in rng.normal(size=(2, 500, HD)))
    for distance in (0, 1, 63, 127, 4096):
        got = (turned(q, position + distance) * turned(k, position)).sum(-1).double().numpy()
        assert np.abs(got - exact(q, k, distance)).max() <= 1e-5


def test_float32_angles_would_not_do() -> None:
    """The reason for float64: the same product with angles multiplied in float32."""
    position = np.float32(10_000_000)
    wrong = position * inverse_frequencies(HD, THETA).astype(np.float32)
    right = 10_000_000 * inverse_frequencies(HD, THETA)
    assert np.abs(np.cos(wrong) - np.cos(right)).max() > 1e-2


def test_shapes_and_types() -> None:
    cos, sin = rotary_angles(np.arange(6).reshape(2, 3), HD, THETA)
    assert cos.shape == sin.shape == (2, 3, HD // 2) and cos.dtype == sin.dtype == np.float32


def test_what_a_host_gives_is_of_every_base_by_name() -> None:
    positions = np.arange(6).reshape(2, 3)
    found = given_angles(positions, HD, THETA, {"near": 10.0})
    assert set(found) == {"cos", "sin", "cos_near", "sin_near"}
    for names, theta in ((("cos", "sin"), THETA), (("cos_near", "sin_near"), 10.0)):
        for name, expected in zip(names, rotary_angles(positions, HD, theta)):
            assert np.array_equal(found[name], expected)
    assert given_angles(positions, 0, THETA, {"near": 10.0}) == {}
