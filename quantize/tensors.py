"""Integers and scales: how one weight is stored, and what every target must make of it.

    weight = (code - zero) * scale        code: 0 .. 2^bits - 1, one per weight

`scale` and `zero` are shared by `group` neighbouring inputs of one output channel, or by all of them (`group` None).
Without zeros every zero is 2^(bits - 1). Scales are bfloat16 numbers: some targets round them to that, and so all of them
compute with the same weights. The product of a code and a scale is exact in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from rmse_edge.errors import UserError
from rmse_edge.layers.held import unpacked
from rmse_edge.schema import Expected, check_fields

CODE_BITS = (4, 8)
TINY = 1e-12  # scale of a group of zeros
BLOCK = 1 << 20  # weights that are rounded at once


@dataclass(frozen=True)
class Format:
    """How a weight (..., outputs, inputs) is quantised."""

    bits: Annotated[int, Expected("4 or 8")]
    group: Annotated[int, Expected("16, 32, 64, 128 or 256")] | None = (
        None  # inputs that share a scale; None: all of them
    )
    symmetric: bool = True

    def __post_init__(self) -> None:
        check_fields(self, UserError)
        if self.bits not in CODE_BITS:
            raise UserError(f"bits: got {self.bits}, expected 4 or 8")
        if self.group is not None and (self.group < 16 or self.group > 256 or self.group & (self.group - 1)):
            raise UserError(f"group size: got {self.group}, expected 16, 32, 64, 128 or 256")

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The zero of symmetric codes."""
        return 2 ** (self.bits - 1)

    def groups(self, inputs: int) -> int:
        """Groups of a row of `inputs` weights.

        Raises:
            UserError: they do not come out even.
        """
        if self.group is None:
            return 1
        if inputs % self.group:
            raise UserError(f"group size {self.group} does not divide {inputs} inputs")
        return inputs // self.group

    def __str__(self) -> str:
        sharing = "per channel" if self.group is None else f"groups of {self.group}"
        return f"int{self.bits}, {sharing}" + ("" if self.symmetric else ", asymmetric")


@dataclass
class QuantizedTensor:
    """A quantised weight (..., N, K) of N outputs and K inputs."""

    format: Format
    codes: Tensor  # (..., N, K) uint8
    scales: Tensor  # (..., N, groups) float32, each a bfloat16 number
    zeros: Tensor | None = None  # (..., N, groups) uint8; None: symmetric

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Of codes, scales (two bytes each) and zeros, packed."""
        zeros = 0 if self.zeros is None else self.zeros.numel()
        return self.shape.numel() * self.format.bits // 8 + 2 * self.scales.numel() + zeros

    def part(self, index: Any) -> QuantizedTensor:
        """The weights that `index` picks from all axes but the last."""
        zeros = None if self.zeros is None else self.zeros[index]
        return QuantizedTensor(self.format, self.codes[index], self.scales[index], zeros)

    def dequantize(self) -> Tensor:
        """The float32 weights (..., N, K) that these integers stand for."""
        return decode(grouped(self.codes.float(), self.format), self.scales, self.zeros, self.format).flatten(-2)

    def blocks(self) -> Iterator[Tensor]:
        """The float32 weights block by block, those of `in_blocks`."""
        codes = in_blocks(self.codes)
        rows = [len(block) for block in codes]
        scales = self.scales.flatten(0, -2).split(rows)
        zeros = [None] * len(rows) if self.zeros is None else self.zeros.flatten(0, -2).split(rows)
        for block, scale, zero in zip(codes, scales, zeros):
            yield decode(grouped(block.float(), self.format), scale, zero, self.format).flatten(-2)

    def packed(self) -> Tensor:
        """Codes as bytes (..., N, K * bits / 8), the first of two in the low half."""
        if self.format.bits == 8:
            return self.codes
        return self.codes[..., 0::2] | (self.codes[..., 1::2] << 4)


class PackedTensor(QuantizedTensor):
    """A quantised weight whose codes stay packed, as they lie in a file that is mapped: they take memory where they are read."""

    def __init__(
        self,
        format: Format,
        codes: Tensor | None = None,
        scales: Tensor | None = None,
        zeros: Tensor | None = None,
        packed: Tensor | None = None,
    ) -> None:
        """
        Args:
            packed: what `packed` gives, in place of codes.
        """
        assert scales is not None
        self.format, self.scales, self.zeros = format, scales, zeros
        if packed is None:
            assert codes is not None
            packed = QuantizedTensor(format, codes, scales, zeros).packed()
        self._packed = packed

    @property
    def codes(self) -> Tensor:  # type: ignore[override]
        return unpacked(self._packed, self.format.bits)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._packed.shape[:-1], self._packed.shape[-1] * 8 // self.format.bits))

    def packed(self) -> Tensor:
        return self._packed

    def part(self, index: Any) -> PackedTensor:
        zeros = None if self.zeros is None else self.zeros[index]
        return PackedTensor(self.format, scales=self.scales[index], zeros=zeros, packed=self._packed[index])


def grouped(weight: Tensor, fmt: Format) -> Tensor:
    """(..., N, K) -> (..., N, groups, group)."""
    return weight.unflatten(-1, (fmt.groups(weight.shape[-1]), -1))


def _zero(zeros: Tensor | None, fmt: Format) -> Tensor | int:
    return fmt.middle if zeros is None else zeros.unsqueeze(-1).float()


def encode(values: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format) -> Tensor:
    """The nearest codes, as floats: values (..., n) that share scales (...) and zeros (...)."""
    return (values / scales.unsqueeze(-1) + _zero(zeros, fmt)).round().clamp(0, fmt.largest)


def decode(codes: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format) -> Tensor:
    """What codes (..., n), as floats, stand for under the scales (...) and zeros (...) they share."""
    return (codes - _zero(zeros, fmt)) * scales.unsqueeze(-1)


def as_bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def full_range(weight: Tensor, fmt: Format, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros that reach `shrink` times each group's extremes: (..., N, K) -> (..., N, groups) each."""
    parts = grouped(weight, fmt)
    if fmt.symmetric:
        return as_bfloat16((parts.abs().amax(-1) * shrink / (fmt.middle - 1)).clamp_min(TINY)), None
    # Zero itself must stay representable: biases of the input would leak in otherwise.
    low, high = parts.amin(-1).clamp_max(0) * shrink, parts.amax(-1).clamp_min(0) * shrink
    scales = as_bfloat16(((high - low) / fmt.largest).clamp_min(TINY))
    return scales, (-low / scales).round().clamp(0, fmt.largest).to(torch.uint8)


def round_to_nearest(weight: Tensor, fmt: Format) -> QuantizedTensor:
    """Quantise without data: every weight (..., N, K) to the nearest code of its group's full range."""
    groups = (*weight.shape[:-1], fmt.groups(weight.shape[-1]))
    codes, scales = torch.empty(weight.shape, dtype=torch.uint8), torch.empty(groups)
    zeros = None if fmt.symmetric else torch.empty(groups, dtype=torch.uint8)
    start = 0
    for rows in in_blocks(weight):
        q = quantize_with(rows, *full_range(rows.float(), fmt), fmt)
        here = slice(start, start := start + len(rows))
        for whole, part in ((codes, q.codes), (scales, q.scales), (zeros, q.zeros)):
            if whole is not None and part is not None:
                whole.flatten(0, -2)[here] = part
    return QuantizedTensor(fmt, codes, scales, zeros)


def in_blocks(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor (..., N, K) as blocks (n, K) of some of its rows, none of them of two matrices (N, K): what is computed of one
    block after the other takes little beside the largest tensor of a model.
    """
    matrices = tensor.reshape(-1, *tensor.shape[-2:])
    rows = max(1, BLOCK // max(1, tensor.shape[-1]))
    return tuple(block for matrix in matrices for block in matrix.split(rows))


def quantize_with(weight: Tensor, scales: Tensor, zeros: Tensor | None, fmt: Format) -> QuantizedTensor:
    """Round to the nearest code under the given scales."""
    codes = encode(grouped(weight.float(), fmt), scales, zeros, fmt).flatten(-2)
    return QuantizedTensor(fmt, codes.to(torch.uint8), scales, zeros)
