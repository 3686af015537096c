"""Quantised weights as the kernels of runtimes/native read them: in tiles of 16 outputs, side by side.

A vector then has a lane for each output, whatever the instruction set. A tile has, block after block of 32 inputs, chunks of
64 bytes: (16 outputs, 4 inputs) of int8, and twice as many inputs of int4, those of the high halves behind those of the low.
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.quantize import QuantizedTensor

TILE = 16  # outputs
BLOCK = 32  # inputs, and the activations that share a scale
AT_ONCE = 1 << 22  # weights that are laid out at once
BYTES = {4: TILE * BLOCK // 2, 8: TILE * BLOCK}  # of a block, by bits


class Tiles(NamedTuple):
    """A weight (..., N, K); what fills up its last tile and its last block stands for zero."""

    codes: Tensor  # (..., tiles, blocks, BYTES) uint8, zero at 8 or 128
    scales: Tensor  # (..., tiles, groups, TILE) bfloat16


def tiles_of(q: QuantizedTensor) -> Tiles:
    """A quantised weight in tiles. What it takes beside them is little, however large the weight is."""
    *outer, outputs, inputs = q.shape
    tiles, blocks = -(-outputs // TILE), -(-inputs // BLOCK)
    codes = torch.empty((*outer, tiles, blocks, BYTES[q.format.bits]), dtype=torch.uint8)
    scales = torch.empty((*outer, tiles, q.scales.shape[-1], TILE), dtype=torch.bfloat16)
    step = max(1, AT_ONCE // (TILE * inputs))
    for matrix in product(*map(range, outer)):
        for start in range(0, tiles, step):
            rows = slice(start * TILE, min((start + step) * TILE, outputs))
            here: Any = (*matrix, slice(start, start + step))
            codes[here], scales[here] = _tiles(q.part((*matrix, rows)))
    return Tiles(codes, scales)


def _tiles(q: QuantizedTensor) -> Tiles:
    """Those of some rows (n, K) of one matrix."""
    outputs, inputs = q.shape
    rest = -outputs % TILE
    codes = F.pad(q.codes, (0, -inputs % BLOCK, 0, rest), value=q.format.middle)
    chunks = codes.contiguous().view(torch.int32)  # (N, chunks): 4 inputs are moved at once
    if q.format.bits == 4:
        chunks = chunks[:, 0::2] | chunks[:, 1::2] << 4  # no code has a bit that would go into the next one
    chunks = chunks.unflatten(0, (-1, TILE)).transpose(-1, -2).contiguous()  # (tiles, chunks, TILE)
    tiles = chunks.view(torch.uint8).unflatten(-2, (-1, BYTES[q.format.bits] // (4 * TILE))).flatten(-2)
    scales = F.pad(q.scales, (0, 0, 0, rest)).unflatten(0, (-1, TILE)).transpose(-1, -2)
    return Tiles(tiles, scales.to(torch.bfloat16))


def weight_of(codes: Tensor, scales: Tensor, outputs: int, inputs: int) -> Tensor:
    """The float32 weight (..., outputs, inputs) that tiles stand for."""
    bits = bits_of(codes)
    chunks = codes.unflatten(-1, (-1, TILE, 4))
    if bits == 4:
        chunks = torch.stack([chunks & 15, chunks >> 4], -3).flatten(-4, -3)  # (..., tiles, blocks, 8, TILE, 4)
    rows = chunks.movedim(-2, -4).flatten(-3).flatten(-3, -2)  # (..., tiles * TILE, blocks * BLOCK)
    groups = scales.shape[-2]
    of_rows = scales.float().transpose(-1, -2).flatten(-3, -2)  # (..., N, groups)
    weight = (rows.float() - 2 ** (bits - 1)).unflatten(-1, (groups, -1)) * of_rows.unsqueeze(-1)
    return weight.flatten(-2)[..., :outputs, :inputs]


def bits_of(codes: Tensor) -> int:
    """Of a code in tiles."""
    return next(bits for bits, size in BYTES.items() if size == codes.shape[-1])
