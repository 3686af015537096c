"""Products with weights that lie packed on a GPU, as operators: what a layer calls there, with shapes for who only asks for those.

On a CPU weights that are held as integers are decoded in parts (held.py). On a GPU a kernel decodes them where it multiplies
(triton_kernels.py), and nothing of it depends on what the tensors hold, so that it can be recorded.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

FEW_ROWS = 4  # up to which every row reads its weights for itself: not measured


def on_gpu(x: Tensor) -> bool:
    """Whether products of x are the kernels' work; on the device "meta", where a dry run has nothing but shapes, as well."""
    return x.device.type == "meta" or (x.device.type == "cuda" and has_triton())


@cache
def has_triton() -> bool:
    """Whether there is what compiles the kernels. PyTorch for CUDA brings it on Linux."""
    return find_spec("triton") is not None


@torch.library.custom_op("rmse_edge::packed_product", mutates_args=())
def packed_product(
    x: Tensor,
    codes: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    bits: int,
    experts: Tensor | None,
    per_row: int,
) -> Tensor:
    """y[p] = W[experts[p]] x[p // per_row].

    Args:
        x: (R, K).
        codes: of one weight (N, ...) or of a stack (E, N, ...): bytes (K * bits / 8), see `stored_weight`, or numbers (K).
        scales, zeros: (..., N, groups); scales None: codes are numbers.
        experts: (R * per_row,) int64, of a stack.
    Returns:
        (R * per_row, N).
    """
    from .triton_kernels import product  # which takes a second to import, and is not everywhere

    # Codes times scales are exact in float32, and so are they multiplied; numbers as what they are.
    number = codes.dtype if scales is None else torch.float32
    return product(x, codes, scales, zeros, bits, experts, per_row, x.shape[0] > FEW_ROWS, number)


@packed_product.register_fake
def _(x, codes, scales, zeros, bits, experts, per_row):
    return x.new_empty(x.shape[0] * per_row, codes.shape[-2])
