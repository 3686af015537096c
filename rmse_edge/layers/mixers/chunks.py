"""What the chunk forms of recurrences have in common: decays between positions, and the inverse that the delta rule asks for."""

from __future__ import annotations

import torch
from torch import Tensor

from rmse_edge.layers.masks import MASKED

from .base import BLOCK


def behind(count: int, device: torch.device) -> Tensor:
    """By how much a row is behind a column, (C, C) int64."""
    row = torch.arange(count, device=device)
    return row[:, None] - row


def decays(total: Tensor) -> Tensor:
    """exp(c_i - c_j) where j is i or before it, 0 elsewhere: (..., C) running sums c of logarithms -> (..., C, C)."""
    seen = behind(total.shape[-1], total.device) >= 0
    # Masked before exp: the other half would overflow.
    return torch.where(seen, total.unsqueeze(-1) - total.unsqueeze(-2), MASKED).exp()


def inverse_of_unit_lower(strict: Tensor) -> Tensor:
    """(I - N)^-1 of strictly lower triangular N, (..., C, C), C at most `BLOCK`.

    Block by block, from blocks of one position to all of them: with T the inverse of two neighbouring blocks each by itself,

        [ I - N11     0    ]^-1     [ T1       0  ]
        [  -N21    I - N22 ]     =  [ T2 N21 T1  T2 ]

    which is T + T (N21) T over the whole matrix, all pairs of blocks at once: two products for each doubling and no loop over
    positions. The product (I + N)(I + N^2)(I + N^4)... costs the same, but its terms grow like binomial coefficients where keys
    repeat, to 10^17 for 64 equal ones, and cancel to nothing in float32; here no entry is larger than those of the inverses.
    """
    count = strict.shape[-1]
    row = torch.arange(count, device=strict.device)
    found = None
    size = 1
    while size < BLOCK and not _at_most(count, size):
        here, there = row // size, row // (2 * size)
        pair = (there[:, None] == there) & (here[:, None] != here)
        below = strict * pair.to(strict.dtype)
        if found is None:
            found = (row[:, None] == row).to(strict.dtype) + below
        else:
            found = found + found @ below @ found
        size *= 2
    return torch.ones_like(strict) if found is None else found  # of one position: I


def _at_most(count: int, size: int) -> bool:
    """Whether a number of positions is known to be so small. Of a symbolic one nothing is asked: its graph serves all calls."""
    if not torch.compiler.is_exporting():
        return count <= size
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # which takes a second to import

    return statically_known_true(count <= size)
