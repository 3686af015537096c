"""GPTQ: choose the codes of a weight so that its *outputs* change little, not its weights.

For inputs X (rows, K) with Hessian H = X^T X, rounding one input's weights leaves an error that the inputs not rounded
yet can make up for (Frantar et al. 2022, arXiv 2210.17323, equations 2 and 3):

    error_i = (w_i - q_i) / U_ii,    w_j -= error_i U_ij  for j > i,    U = upper Cholesky factor of H^-1

Scales are chosen first, per group, as those with the least squared error weighted by the diagonal of H; inputs are then
rounded in order of falling diagonal. Everything here works on stacks: 512 experts, each with its own H, are one call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .parallel import cores
from .tensors import Format, QuantizedTensor, decode, encode, full_range, grouped

DAMP = 0.01  # of the mean diagonal, added to it
BLOCK = 64  # inputs between two updates of the rest: within a block every input is updated at once
SHRINKS = tuple(1 - 0.025 * i for i in range(15))  # scales tried: from the full range down to 0.65 of it
STACK = 32  # matrices solved together: more would not fit into the cache


def best_scales(weight: Tensor, importance: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of the least weighted squared error.

    Args:
        weight: (..., N, K).
        importance: (..., K), the diagonal of the Hessian.
    Returns:
        (..., N, groups) each; zeros None where symmetric.
    """
    parts = grouped(weight, fmt)
    counts = grouped(importance.unsqueeze(-2), fmt)  # (..., 1, groups, group)
    best = weight.new_full(parts.shape[:-1], float("inf"))
    scales, zeros = full_range(weight, fmt)
    for shrink in SHRINKS:
        tried, zero = full_range(weight, fmt, shrink)
        found = decode(encode(parts, tried, zero, fmt), tried, zero, fmt)
        error = ((found - parts).square() * counts).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, tried, scales)
        if zero is not None and zeros is not None:
            zeros = torch.where(better, zero, zeros)
    return scales, zeros


def gptq(weight: Tensor, hessian: Tensor, fmt: Format) -> QuantizedTensor:
    """Quantise `weight` for the inputs that `hessian` describes.

    Args:
        weight: (N, K), or a stack (S, N, K).
        hessian: (K, K) or (S, K, K), sum of x x^T over the inputs x, weighted or not; any scale.
    """
    if weight.dim() == 2:
        return _unstack(gptq(weight[None], hessian[None], fmt))
    stacks = list(zip(weight.split(STACK), hessian.split(STACK), strict=True))
    if len(stacks) == 1:
        return _solve(weight.float().clone(), hessian.float(), fmt)
    with cores() as workers:
        parts = list(workers.each(lambda stack: _solve(stack[0].float().clone(), stack[1].float(), fmt), stacks))
    zeros = None if parts[0].zeros is None else torch.cat([p.zeros for p in parts if p.zeros is not None])
    return QuantizedTensor(fmt, torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts]), zeros)


def _unstack(q: QuantizedTensor) -> QuantizedTensor:
    return QuantizedTensor(q.format, q.codes[0], q.scales[0], None if q.zeros is None else q.zeros[0])


def _solve(weight: Tensor, hessian: Tensor, fmt: Format) -> QuantizedTensor:
    """(S, N, K), (S, K, K); `weight` is overwritten."""
    inputs = weight.shape[-1]
    importance = hessian.diagonal(dim1=-2, dim2=-1)
    scales, zeros = best_scales(weight, importance, fmt)
    order = importance.argsort(-1, descending=True)  # (S, K)
    of_input = torch.arange(inputs, device=weight.device) // (fmt.group or inputs)  # the group of each input
    group = of_input[order]  # (S, K)
    weight = weight.gather(-1, order[:, None].expand_as(weight))
    each_scale = scales.gather(-1, group[:, None].expand(-1, weight.shape[1], -1))  # (S, N, K), in order
    each_zero = (
        torch.full_like(each_scale, fmt.middle)
        if zeros is None
        else zeros.float().gather(-1, group[:, None].expand(-1, weight.shape[1], -1))
    )
    factor = _inverse_factor(hessian, order)
    codes = torch.empty_like(weight)
    for start in range(0, inputs, BLOCK):
        block = slice(start, min(start + BLOCK, inputs))
        rest = slice(block.stop, inputs)
        errors = torch.empty_like(weight[..., block])
        for i in range(block.start, block.stop):
            scale, zero, value = each_scale[..., i], each_zero[..., i], weight[..., i]
            codes[..., i] = (value / scale + zero).round().clamp(0, fmt.largest)
            error = (value - (codes[..., i] - zero) * scale) / factor[:, None, i, i]
            later = slice(i + 1, block.stop)
            weight[..., later] -= error.unsqueeze(-1) * factor[:, None, i, later]
            errors[..., i - start] = error
        weight[..., rest] -= errors @ factor[:, block, rest]
    back = order.argsort(-1)
    codes = codes.gather(-1, back[:, None].expand_as(codes))
    return QuantizedTensor(fmt, codes.to(torch.uint8), scales, zeros)


def _inverse_factor(hessian: Tensor, order: Tensor) -> Tensor:
    """Upper Cholesky factors U (S, K, K) of the inverse of each damped, reordered Hessian: H^-1 = U^T U."""
    count = hessian.shape[-1]
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-12)
    unit = torch.eye(count, device=hessian.device)
    damp = torch.full_like(mean, DAMP)
    while True:
        lower, failed = torch.linalg.cholesky_ex(hessian + (damp * mean)[:, None, None] * unit)
        usable = torch.where(failed[:, None, None] > 0, unit, lower)
        upper, failed_too = torch.linalg.cholesky_ex(torch.cholesky_inverse(usable), upper=True)
        failed = failed + failed_too
        if not bool(failed.any()):
            return upper
        # Few rows in float32. The more of the identity, the closer to plain rounding; the others stay as they are.
        damp = torch.where(failed > 0, damp * 10, damp)
