"""Quantised weights in programs: an operator that says "this weight is stored as these integers".

Before a quantised model is traced, every weight with integers becomes that operator (`with_stored`): in every method, and
in whatever way the model reads it, the graph then has

    w = rmse_edge::stored_weight(codes, scales, zeros, bits)

in place of a float tensor, and each target lowers it with what reads it: ONNX to operators on integers, Core ML to a
constant of MIL. Where a target stores a weight in a form of its own (rows and experts of Core ML, all of ExecuTorch), its
`prepare` puts modules there first, and this takes the rest.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rmse_edge.quantize import QuantizedTensor
from rmse_edge.quantize.parallel import shared_copy


@torch.library.custom_op("rmse_edge::stored_weight", mutates_args=())
def stored_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """What a `QuantizedTensor` stands for: codes (..., N, K) uint8, scales and zeros (..., N, groups) -> float32 (..., N, K)."""
    return decoded(codes, scales, zeros, bits)


@stored_weight.register_fake
def _(codes, scales, zeros, bits):
    return torch.empty_like(codes, dtype=torch.float32)


OPERATOR = torch.ops.rmse_edge.stored_weight.default  # as it stands in a traced graph


def decoded(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The float32 numbers (..., K) of codes (..., K) that share scales and zeros (..., groups)."""
    zero = 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    return ((codes.float().unflatten(-1, (scales.shape[-1], -1)) - zero) * scales.float().unsqueeze(-1)).flatten(-2)


class Stored(nn.Module):
    """A weight as its integers; called, the weight."""

    codes: Tensor  # see `stored_weight`
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, name: str, q: QuantizedTensor) -> None:
        """
        Args:
            name: of the weight, in the checkpoint.
        """
        super().__init__()
        self.name, self.bits = name, q.format.bits
        for part, tensor in (("codes", q.codes), ("scales", q.scales), ("zeros", q.zeros)):
            self.register_buffer(part, tensor)

    def forward(self) -> Tensor:
        return stored_weight(self.codes, self.scales, self.zeros, self.bits)


def with_stored(model: nn.Module, tensors: Mapping[str, QuantizedTensor], tied: Mapping[str, str]) -> nn.Module:
    """A copy of `model` in which quantised weights are their integers; it shares all else.

    Args:
        tensors: by name of the weight.
        tied: weights that are another one, by name; those that are the same tensor need not be named.
    """
    model = shared_copy(model)
    hold(model, tensors, tied)
    return model


def hold(model: nn.Module, tensors: Mapping[str, QuantizedTensor], tied: Mapping[str, str]) -> None:
    """`with_stored` in place. Attributes that hold these weights keep their names: reading one calls a `Stored`."""
    stored = {id(model.get_parameter(name)): Stored(name, q) for name, q in tensors.items()}
    stored |= {id(model.get_parameter(name)): stored[id(model.get_parameter(of))]
               for name, of in tied.items() if of in tensors}  # fmt: skip
    for module in list(model.modules()):
        held = {attribute: stored[id(p)] for attribute, p in module._parameters.items() if id(p) in stored}
        if not held:
            continue
        for attribute, integers in held.items():
            del module._parameters[attribute]
            module.add_module(f"stored_{attribute}", integers)
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {attribute: _read(attribute) for attribute in held})


def _read(attribute: str) -> property:
    return property(lambda module: module._modules[f"stored_{attribute}"]())


def weights_of_codes(model: nn.Module) -> dict[str, str]:
    """The name of a buffer of codes -> the name of the weight, in a model of `with_stored`."""
    return {
        f"{path}.codes": module.name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Stored)
    }
