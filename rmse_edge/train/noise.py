"""Noise schedules of masked diffusion: by time t in (0, 1], how likely a token is masked, and what a masked one weighs.

| name        | chance m(t) that a token is masked | weight m'(t) / m(t) of its loss             |
|-------------|------------------------------------|---------------------------------------------|
| loglinear   | t                                  | 1 / t                                       |
| cosine      | 1 - (1 - e) cos(pi t / 2)          | (1 - e) sin(pi t / 2) (pi / 2) / (m(t) + e) |
| square      | max(t^2, e)                        | 2 t / m(t)                                  |
| square_root | max(t^0.5, e)                      | 0.5 t^-0.5 / m(t)                           |
| log         | log2(1 + t)                        | 1 / (m(t) ln 2 (1 + t))                     |

with e = 1e-3. With these weights the expected loss is a bound of the negative log-likelihood, whatever the schedule; schedules
differ in its variance (Arriola et al. 2025, Block Diffusion, arXiv 2503.09573, sections 3 and 5, as noise_schedule.py of
kuleshov-group/bd3lms 1c3e8f4 computes it).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

E = 1e-3
Schedule = Callable[[Tensor], tuple[Tensor, Tensor]]  # t -> (chance, weight), each of its shape


def _loglinear(t: Tensor) -> tuple[Tensor, Tensor]:
    return t, 1 / t


def _cosine(t: Tensor) -> tuple[Tensor, Tensor]:
    angle = t * (math.pi / 2)
    chance = 1 - (1 - E) * torch.cos(angle)
    return chance, (1 - E) * torch.sin(angle) * (math.pi / 2) / (chance + E)


def _power(exponent: float) -> Schedule:
    def schedule(t: Tensor) -> tuple[Tensor, Tensor]:
        chance = (t**exponent).clamp_min(E)
        return chance, exponent * t ** (exponent - 1) / chance

    return schedule


def _log(t: Tensor) -> tuple[Tensor, Tensor]:
    nats = torch.log1p(t)  # at small t, 1 + t alone loses digits
    return nats / math.log(2), 1 / (nats * (1 + t))


SCHEDULES: dict[str, Schedule] = {
    "loglinear": _loglinear,
    "cosine": _cosine,
    "square": _power(2.0),
    "square_root": _power(0.5),
    "log": _log,
}


def times(uniform: Tensor, least: float = 0.0, most: float = 1.0) -> Tensor:
    """A time for every block, stratified: each of a batch's blocks has its own equal share of least..most.

    Args:
        uniform: (B, blocks) in [0, 1).
    Returns:
        (B, blocks).
    """
    count = uniform.numel()
    first = torch.arange(count, device=uniform.device).view_as(uniform) / count
    return (uniform / count + first) % 1 * (most - least) + least
