"""Triton kernels: products of rows with weights that lie packed, each row with the weight of its own expert.

    y[p] = W[e(p)] x[p // per_row]            p = 0 .. P - 1

A dense layer has one expert, and each row is one p. Of sparse experts, row r stands for the `per_row` experts that were
chosen for it, p = r * per_row .. Codes are decoded in registers: what comes from memory is what the checkpoint holds.

Two kernels, for two ways in which memory is read:

- `rows_kernel`, of few rows: every p reads its own weights, a block of outputs at a time, and sums without tensor cores;
- `tiles_kernel`, of many: pairs of one expert are a tile of `TILE` rows, which read the expert's weights once.

Sizes of blocks are guesses, not measured: `benchmarks/gpu_kernels.py` tries others and says which is fastest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fixed import rows_of

TILE = 16  # pairs of a tile: the least that tensor cores take


class Blocks(NamedTuple):
    """How a product is cut."""

    outputs: int
    inputs: int  # bytes of codes, or numbers
    warps: int


ROWS = Blocks(outputs=8, inputs=256, warps=4)
TILES = Blocks(outputs=32, inputs=32, warps=4)


@triton.jit
def rows_kernel(
    x, codes, scales, zeros, experts, out, N, K, G, GROUP,
    BITS: tl.constexpr, ZEROS: tl.constexpr, EXPERTS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(experts + p) if EXPERTS else p * 0
    base = expert * N + n  # rows of the stack of weights
    rows = x + (p // PER_ROW) * K
    total = tl.zeros((BLOCK_N,), tl.float32)
    if BITS == 4:
        half = K // 2
        for start in range(0, half, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            inside = (n < N)[:, None] & (j < half)[None, :]
            both = tl.load(codes + base[:, None] * half + j[None, :], mask=inside, other=0)
            at = base[:, None] * G + (2 * j // GROUP)[None, :]
            scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
            zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) if ZEROS else 8.0
            even = tl.load(rows + 2 * j, mask=j < half, other=0.0).to(tl.float32)
            odd = tl.load(rows + 2 * j + 1, mask=j < half, other=0.0).to(tl.float32)
            low = (both & 15).to(tl.float32) - zero
            high = (both >> 4).to(tl.float32) - zero
            total += tl.sum((low * even[None, :] + high * odd[None, :]) * scale, 1)
    else:
        for start in range(0, K, BLOCK_K):
            j = start + tl.arange(0, BLOCK_K)
            inside = (n < N)[:, None] & (j < K)[None, :]
            weight = tl.load(codes + base[:, None] * K + j[None, :], mask=inside, other=0).to(tl.float32)
            value = tl.load(rows + j, mask=j < K, other=0.0).to(tl.float32)
            if BITS == 8:
                at = base[:, None] * G + (j // GROUP)[None, :]
                scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
                zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) if ZEROS else 128.0
                weight = (weight - zero) * scale
            total += tl.sum(weight * value[None, :], 1)
    tl.store(out + p * N + n, total.to(out.dtype.element_ty), mask=n < N)


@triton.jit
def tiles_kernel(
    x, codes, scales, zeros, order, tile_expert, tile_start, tile_rows, out, N, K, G, GROUP,
    BITS: tl.constexpr, ZEROS: tl.constexpr, PER_ROW: tl.constexpr, NUMBER: tl.constexpr, WIDE: tl.constexpr,
    TILE_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    count = tl.load(tile_rows + tile)
    m = tl.arange(0, TILE_M)
    there = m < count
    pair = tl.load(order + tl.load(tile_start + tile) + m, mask=there, other=0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = tl.load(tile_expert + tile) * N + n
    rows = x + (pair // PER_ROW)[:, None] * K
    total = tl.zeros((TILE_M, BLOCK_N), tl.float32)
    if count > 0:
        if BITS == 4:
            half = K // 2
            for start in range(0, half, BLOCK_K):
                j = start + tl.arange(0, BLOCK_K)
                inside = (n < N)[:, None] & (j < half)[None, :]
                both = tl.load(codes + base[:, None] * half + j[None, :], mask=inside, other=0)
                at = base[:, None] * G + (2 * j // GROUP)[None, :]
                scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
                zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) if ZEROS else 8.0
                low = (((both & 15).to(tl.float32) - zero) * scale).to(NUMBER)
                high = (((both >> 4).to(tl.float32) - zero) * scale).to(NUMBER)
                seen = there[:, None] & (j < half)[None, :]
                even = tl.load(rows + (2 * j)[None, :], mask=seen, other=0.0).to(NUMBER)
                odd = tl.load(rows + (2 * j + 1)[None, :], mask=seen, other=0.0).to(NUMBER)
                total += tl.dot(even.to(WIDE), tl.trans(low.to(WIDE)), input_precision="ieee")
                total += tl.dot(odd.to(WIDE), tl.trans(high.to(WIDE)), input_precision="ieee")
        else:
            for start in range(0, K, BLOCK_K):
                j = start + tl.arange(0, BLOCK_K)
                inside = (n < N)[:, None] & (j < K)[None, :]
                weight = tl.load(codes + base[:, None] * K + j[None, :], mask=inside, other=0).to(tl.float32)
                if BITS == 8:
                    at = base[:, None] * G + (j // GROUP)[None, :]
                    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
                    zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float32) if ZEROS else 128.0
                    weight = (weight - zero) * scale
                value = tl.load(rows + j[None, :], mask=there[:, None] & (j < K)[None, :], other=0.0)
                weight, value = weight.to(NUMBER).to(WIDE), value.to(NUMBER).to(WIDE)
                total += tl.dot(value, tl.trans(weight), input_precision="ieee")
    tl.store(
        out + pair[:, None] * N + n[None, :], total.to(out.dtype.element_ty), mask=there[:, None] & (n < N)[None, :]
    )


class Tiles(NamedTuple):
    """Pairs by expert, `TILE` at a time; as many tiles as there may be, of which those behind the last are empty."""

    order: Tensor  # (P,) pairs, those of an expert side by side
    expert: Tensor  # (T,) int64 each
    start: Tensor  # of its first pair in `order`
    rows: Tensor


def tiles_of(experts: Tensor, n_experts: int) -> Tiles:
    """Cut pairs into tiles, without a look at any of them: experts (P,) int64."""
    pairs, device = experts.numel(), experts.device
    count = rows_of(experts, n_experts)
    needed = (count + TILE - 1) // TILE
    until = needed.cumsum(0)  # tiles of the experts up to each
    first = count.cumsum(0) - count
    most = min(pairs, n_experts + pairs // TILE)
    tile = torch.arange(most, device=device)
    expert = torch.searchsorted(until, tile, right=True).clamp(max=n_experts - 1)
    within = (tile - (until - needed)[expert]) * TILE
    rows = torch.where(tile < until[-1], (count[expert] - within).clamp(0, TILE), 0)
    return Tiles(experts.argsort(stable=True), expert, first[expert] + within, rows)


NUMBERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    experts: Tensor | None,
    per_row: int,
    many: bool,
    number: torch.dtype = torch.float32,
    blocks: Blocks | None = None,
) -> Tensor:
    """See the module.

    Args:
        x: (R, K), contiguous.
        codes: (E, N, K * bits / 8) uint8, or (E, N, K) of a floating type.
        scales, zeros: (E, N, groups); scales None: `codes` are the weights; zeros None: symmetric.
        bits: 4 or 8, of codes.
        experts: (R * per_row,) int64; None: there is one expert.
        many: by tiles.
        number: what tiles are multiplied in; they are summed in float32, and rows are multiplied in that, too.
    Returns:
        (R * per_row, N) of x's type.
    """
    outputs, inputs, pairs = codes.shape[-2], x.shape[-1], x.shape[0] * per_row
    groups = 1 if scales is None else scales.shape[-1]
    out = torch.empty(pairs, outputs, dtype=x.dtype, device=x.device)
    cut = blocks or (TILES if many else ROWS)
    width = 0 if scales is None else bits
    columns = triton.cdiv(outputs, cut.outputs)
    weights = (x.contiguous(), codes, codes if scales is None else scales, codes if zeros is None else zeros)
    sizes = (outputs, inputs, groups, inputs // groups)
    if not many:
        which = codes if experts is None else experts
        rows_kernel[(pairs, columns)](
            *weights, which, out, *sizes, BITS=width, ZEROS=zeros is not None, EXPERTS=experts is not None,
            PER_ROW=per_row, BLOCK_N=cut.outputs, BLOCK_K=cut.inputs, num_warps=cut.warps,
        )  # fmt: skip
        return out
    n_experts = codes.shape[0] if codes.dim() == 3 else 1
    whose = torch.zeros(pairs, dtype=torch.int64, device=x.device) if experts is None else experts
    tiles = tiles_of(whose, n_experts)
    # The interpreter's dot takes the bits of bfloat16 for whole numbers; products of two of them are exact in float32.
    wide = tl.float32 if triton.knobs.runtime.interpret else NUMBERS[number]
    tiles_kernel[(len(tiles.expert), columns)](
        *weights, *tiles, out, *sizes, BITS=width, ZEROS=zeros is not None, PER_ROW=per_row, NUMBER=NUMBERS[number], WIDE=wide,
        TILE_M=TILE, BLOCK_N=cut.outputs, BLOCK_K=cut.inputs, num_warps=cut.warps,
    )  # fmt: skip
    return out
