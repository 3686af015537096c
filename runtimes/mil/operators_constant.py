"""MIL operators that unpack compressed weights (`constexpr_*`). Their results are constants."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .file import unpack
from .operators import Call, Compute, operator


def _blocks(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Repeat every value over its block, so that `x` has `shape`; a view where one block is a whole axis."""
    for axis, (n, blocks) in enumerate(zip(shape, x.shape)):
        if 1 < blocks < n:
            x = np.repeat(x, n // blocks, axis)
    return np.broadcast_to(x, shape)


def _shift_scale(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """(data - offset) * scale in float32."""
    values = data.astype(np.float32)
    if offset is not None:
        values -= _blocks(offset.astype(np.float32), data.shape)
    values *= _blocks(scale.astype(np.float32), data.shape)
    return values


def _to_dense(nonzero: np.ndarray, mask: np.ndarray) -> np.ndarray:
    dense = np.zeros(mask.shape, nonzero.dtype)
    dense[mask != 0] = nonzero
    return dense


def _look_up(indices: np.ndarray, table: np.ndarray, vector_axis: int | None) -> np.ndarray:
    """Args:
    indices: (*n)
    table: (*groups, palettes, vector): each index of a group reads a vector, which goes along `vector_axis`.
    """
    groups, (palettes, width) = table.shape[:-2], table.shape[-2:]
    numbers = np.arange(math.prod(groups)).reshape(groups)
    found = table.reshape(-1, palettes, width)[_blocks(numbers, indices.shape), indices]  # (*n, vector)
    if width == 1:
        return found[..., 0]
    axis = int(vector_axis or 0) % indices.ndim
    shape = list(indices.shape)
    shape[axis] *= width
    return np.moveaxis(found, -1, axis + 1).reshape(shape)


@operator("constexpr_blockwise_shift_scale", takes="data scale offset")
def _blockwise(call: Call) -> Compute:
    return lambda data, scale, offset=None: _shift_scale(data, scale, offset)


@operator("constexpr_affine_dequantize", takes="quantized_data scale zero_point")
def _affine(call: Call) -> Compute:
    axis = call.number("axis")

    def along(x: np.ndarray, rank: int) -> np.ndarray:
        shape = [1] * rank
        shape[axis] = -1
        return np.asarray(x).reshape(shape if np.ndim(x) else [1] * rank)

    return lambda data, scale, zero: _shift_scale(data, along(scale, data.ndim), along(zero, data.ndim))


@operator("constexpr_lut_to_dense", takes="indices lut vector_axis shape", exact=True)
def _lut_to_dense(call: Call) -> Compute:
    def compute(indices: np.ndarray, lut: np.ndarray, vector_axis: Any = None, shape: Any = None) -> np.ndarray:
        if shape is None:
            return _look_up(indices, lut, vector_axis)
        bits = int(math.log2(lut.size))  # up to iOS 17 indices are packed bytes
        dtype = f"uint{bits}"
        wanted = tuple(np.atleast_1d(shape).tolist())
        return lut[indices if bits == 8 else unpack(indices, dtype, math.prod(wanted))].reshape(wanted)

    return compute


@operator("constexpr_sparse_to_dense", takes="nonzero_data mask shape", exact=True)
def _sparse_to_dense(call: Call) -> Compute:
    def compute(nonzero: np.ndarray, mask: np.ndarray, shape: Any = None) -> np.ndarray:
        if shape is not None:
            wanted = tuple(np.atleast_1d(shape).tolist())
            mask = unpack(mask, "uint1", math.prod(wanted)).reshape(wanted)
        return _to_dense(nonzero, mask)

    return compute


@operator("constexpr_lut_to_sparse", takes="indices_mask indices_nonzero_data lut vector_axis", exact=True)
def _lut_to_sparse(call: Call) -> Compute:
    def compute(mask: np.ndarray, nonzero: np.ndarray, lut: np.ndarray, vector_axis: Any = None) -> Any:
        dense = _look_up(_to_dense(nonzero, mask), lut, vector_axis)
        if lut.shape[-1] > 1:
            mask = np.repeat(mask, lut.shape[-1], int(vector_axis))
        return mask, dense[mask != 0]

    return compute


@operator("constexpr_sparse_blockwise_shift_scale", takes="data_mask nonzero_data scale offset")
def _sparse_blockwise(call: Call) -> Compute:
    def compute(mask: np.ndarray, nonzero: np.ndarray, scale: np.ndarray, offset: Any = None) -> Any:
        return mask, _shift_scale(_to_dense(nonzero, mask), scale, offset)[mask != 0]

    return compute


@operator("constexpr_cast", takes="source_val", exact=True)
def _cast(call: Call) -> Compute:
    return lambda x: x.astype(call.out)
