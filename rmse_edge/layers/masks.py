"""What each position of a call sees of [what is kept; the call], as attention takes it: 0 where seen, `MASKED` elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

MASKED = -1e4  # finite: a row that sees nothing but padding must still be a number


def ring_mask(position: Tensor, n_valid: Tensor, count: int, window: int) -> Tensor:
    """Of a ring of `window` slots: (B, 1, C, W + C).

    Positions see those less than `window` behind them, themselves included, by absolute distance. Slot s of the ring holds
    the largest position below `position` that is s modulo W, if there is one.

    Args:
        position: (B,) of the call's first row.
        n_valid: (B,) rows that are not padding.
        count: rows of the call, C.
    """
    row = torch.arange(count, device=position.device)
    valid = row < n_valid[:, None]  # (B, C)
    past = _in_ring(position, count, ring_positions(position, window), window)
    distance = row[:, None] - row
    chunk = (distance >= 0) & (distance < window) & (valid[:, None] | (distance == 0))
    return _mask(torch.cat([past, chunk.expand(*past.shape[:2], chunk.shape[-1])], -1))


def ring_positions(position: Tensor, slots: int) -> Tensor:
    """The position whose row each slot of a ring holds before a call at `position` (B,): (B, S), negative where there is none."""
    last = position[:, None] - 1
    slot = torch.arange(slots, device=position.device)
    # One ring is added, so that nothing is negative: ExecuTorch's integer remainder takes the sign of C's there.
    return last - torch.remainder(last - slot + slots, slots)


def ring_slots_mask(position: Tensor, count: int, slots: int, window: int) -> Tensor:
    """What `ring_mask` says of the ring alone, (B, 1, C, S); it may have fewer slots than the window has positions, if a
    text has not more.
    """
    return _mask(_in_ring(position, count, ring_positions(position, slots), window))


def _in_ring(position: Tensor, count: int, held: Tensor, window: int) -> Tensor:
    return (held >= 0)[:, None] & (distances(position, count, held) < window)


def distances(position: Tensor, count: int, held: Tensor) -> Tensor:
    """By how much the rows of a call at `position` (B,) are behind the positions `held` (B or 1, n): (B, C, n) int64."""
    here = position[:, None] + torch.arange(count, device=position.device)  # (B, C)
    return here[..., None] - held[:, None]


def append_mask(position: Tensor, n_valid: Tensor, count: int, slots: Tensor) -> Tensor:
    """Of slots that fill up, position p in slot p: (B, 1, C, S + C).

    Args:
        slots: (S,) 0, 1, 2, ...: of as many slots as there are now.
        position, n_valid, count: as in `ring_mask`.
    """
    return torch.cat([slots_mask(position, count, slots), causal_mask(n_valid, count)], -1)


def slots_mask(position: Tensor, count: int, slots: Tensor, window: int | None = None) -> Tensor:
    """What `append_mask` says of the slots alone, (B, 1, C, S): an invariant of a loop that grows with them.

    Args:
        window: positions that are seen at most, the own one included; None: all.
    """
    filled = slots < position[:, None, None].expand(-1, count, -1)
    if window is None:
        return _mask(filled)
    here = position[:, None, None] + torch.arange(count, device=slots.device)[:, None]  # (B, C, 1)
    return _mask(filled & (here - slots < window))


def causal_mask(n_valid: Tensor, count: int, window: int | None = None, within: Tensor | None = None) -> Tensor:
    """What `append_mask` says of the call alone, (B, 1, C, C); `window` as in `slots_mask`.

    Args:
        within: (B,) how many of the call's first rows see each other whatever their order; None: none.
    """
    row = torch.arange(count, device=n_valid.device)
    valid = row < n_valid[:, None]
    distance = row[:, None] - row
    seen = distance >= 0
    if within is not None:
        inside = row < within[:, None]  # (B, C)
        seen = seen | (inside[:, :, None] & inside[:, None])
    if window is not None:
        seen = seen & (distance < window)
    return _mask(seen & (valid[:, None] | (distance == 0)))


def _mask(seen: Tensor) -> Tensor:
    """(B, C, n) flags -> (B, 1, C, n)."""
    zero = torch.zeros((), device=seen.device)
    return torch.where(seen, zero, zero + MASKED).unsqueeze(1)
