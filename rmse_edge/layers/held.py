"""Weights that are held as their integers: an operator that says "this weight is stored as these".

A model of which the float weights would take too much memory is loaded this way (`hold`), and decodes a weight whenever it
is read: of a linear layer some rows at a time, which are in a core's cache when they are multiplied, of an embedding those
that are looked up, of experts those that are chosen. And before a quantised model is traced, every weight with integers becomes that operator (`with_stored`): in every
method, and in whatever way the model reads it, the graph then has

    w = rmse_edge::stored_weight(codes, scales, zeros, bits)

in place of a float tensor, and each target lowers it with what reads it: ONNX to operators on integers, Core ML to a
constant of MIL. Where a target stores a weight in a form of its own (rows and experts of Core ML, all of ExecuTorch), its
`prepare` puts modules there first, and this takes the rest.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import packed


@torch.library.custom_op("rmse_edge::stored_weight", mutates_args=())
def stored_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """What a `QuantizedTensor` stands for: packed codes (..., N, K * bits / 8) uint8, scales and zeros (..., N, groups)
    -> float32 (..., N, K).
    """
    return decoded(unpacked(codes, bits), scales, zeros, bits)


@stored_weight.register_fake
def _(codes, scales, zeros, bits):
    return codes.new_empty((*codes.shape[:-1], codes.shape[-1] * 8 // bits), dtype=torch.float32)


BLOCK = 1 << 20  # weights that a linear layer decodes at once

OPERATOR = torch.ops.rmse_edge.stored_weight.default  # as it stands in a traced graph


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Codes (..., K) of bytes (..., K * bits / 8), which hold two of four bits each, the first in the low half."""
    if bits == 8:
        return packed
    both = packed.to(torch.int16)  # 0x00HL -> 0x0H0L, two bytes in the order that they are wanted in
    return (both << 4).bitwise_or_(both).bitwise_and_(0x0F0F).view(torch.uint8)


def decoded(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int) -> Tensor:
    """The float32 numbers (..., K) of codes (..., K) that share scales and zeros (..., groups)."""
    zero = 2 ** (bits - 1) if zeros is None else zeros.float().unsqueeze(-1)
    # In place: of the largest weight of a model, one float copy is in memory and not three.
    return codes.float().unflatten(-1, (scales.shape[-1], -1)).sub_(zero).mul_(scales.float().unsqueeze(-1)).flatten(-2)


class Stored(nn.Module):
    """A weight as its integers; called, the weight."""

    codes: Tensor  # see `stored_weight`
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, name: str, q: Any) -> None:
        """
        Args:
            name: of the weight, in the checkpoint.
            q: a `QuantizedTensor` (quantize/tensors.py).
        """
        super().__init__()
        self.name, self.bits = name, q.format.bits
        for part, tensor in (("codes", q.packed()), ("scales", q.scales), ("zeros", q.zeros)):
            self.register_buffer(part, tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * 8 // self.bits)

    def forward(self) -> Tensor:
        return stored_weight(self.codes, self.scales, self.zeros, self.bits)

    def at(self, index: Any) -> Tensor:
        """The part of the weight that `index` picks from its axes but the last, float32."""
        zeros = None if self.zeros is None else self.zeros[index]
        return decoded(unpacked(self.codes[index], self.bits), self.scales[index], zeros, self.bits)

    def product(self, x: Tensor, experts: Tensor | None = None, per_row: int = 1) -> Tensor:
        """On a GPU, rows (R, K) times this weight, or times those of a stack that `experts` (R * per_row,) names: see
        `packed_product`.
        """
        return packed.packed_product(x, self.codes, self.scales, self.zeros, self.bits, experts, per_row)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`F.linear` with this weight (N, K), without gradients: (..., K) -> (..., N)."""
        outputs, inputs = self.shape
        if packed.on_gpu(x):
            found = self.product(x.reshape(-1, inputs)).view(*x.shape[:-1], outputs)
            return found if bias is None else found.add_(bias)
        out = x.new_empty((*x.shape[:-1], outputs))
        rows, found = x.reshape(-1, inputs), out.view(-1, outputs)
        for start in range(0, outputs, step := max(1, BLOCK // inputs)):
            here = slice(start, start + step)
            torch.mm(rows, self.at(here).t(), out=found[:, here])
        return out if bias is None else out.add_(bias)


class Rounded(Stored):
    """A weight as numbers of fewer bits, multiplied with as such and summed in float32; called, the weight in float32."""

    def __init__(self, name: str, weight: Tensor) -> None:
        nn.Module.__init__(self)
        self.name, self.bits = name, 8 * weight.element_size()
        self.register_buffer("codes", weight)
        self.register_buffer("scales", None)
        self.register_buffer("zeros", None)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    def forward(self) -> Tensor:
        return self.codes.float()

    def at(self, index: Any) -> Tensor:
        return self.codes[index].float()

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(x.to(self.codes.dtype), self.codes).to(x.dtype)
        return out if bias is None else out.add_(bias)


def whole() -> bool:
    """Whether weights are to be read as a whole: by a tracer, which then sees one operator, and by gradients."""
    return torch.compiler.is_exporting() or torch.is_grad_enabled()


def stored_of(module: nn.Module) -> Stored:
    """The integers of its `weight`."""
    stored = module._modules["stored_weight"]
    assert isinstance(stored, Stored)
    return stored


class HeldLinear(nn.Linear):
    """A linear layer whose weight is held as integers."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if whole() else stored_of(self).linear(input, self.bias)


class HeldEmbedding(nn.Embedding):
    """An embedding whose rows are held as integers."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if whole() else stored_of(self).at(input)


READERS = {nn.Linear: HeldLinear, nn.Embedding: HeldEmbedding}


def with_stored(model: nn.Module, tensors: Mapping[str, Any], tied: Mapping[str, str]) -> nn.Module:
    """A copy of `model` in which quantised weights are their integers; it shares all else.

    Args:
        tensors: by name of the weight: `QuantizedTensor`s, or tensors of fewer bits than the weight has (`Rounded`).
        tied: weights that are another one, by name; those that are the same tensor need not be named.
    """
    model = copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})
    if not holds(model):
        hold(model, tensors, tied)
    return model


def holds(model: nn.Module) -> bool:
    """Whether weights of the model are held as integers."""
    return any(isinstance(module, Stored) for module in model.modules())


def hold(model: nn.Module, tensors: Mapping[str, Any], tied: Mapping[str, str]) -> None:
    """`with_stored` in place. Attributes that hold these weights keep their names: reading one calls a `Stored`. Linear layers
    and embeddings read theirs in parts.
    """
    stored = {
        id(model.get_parameter(name)): Rounded(name, q) if isinstance(q, Tensor) else Stored(name, q)
        for name, q in tensors.items()
    }
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
        reader = next((own for base, own in READERS.items() if "weight" in held and isinstance(module, base)), None)
        # The reader stands between a subclass and its base, so that what the one asks the other for is read in parts, too.
        bases = (kind,) if reader is None else (reader,) if issubclass(reader, kind) else (kind, reader)
        module.__class__ = type(kind.__name__, bases, {a: _read(a) for a in held} | {"_plain": kind})


def release(model: nn.Module) -> None:
    """Undo `hold`, for who puts other modules or tensors in place of the weights: those that were held are gone."""
    for module in list(model.modules()):
        names = [name for name, part in module._modules.items() if isinstance(part, Stored)]
        if not names:
            continue
        module.__class__ = vars(type(module))["_plain"]
        for name in names:
            del module._modules[name]
            module.register_parameter(name.removeprefix("stored_"), None)


def shape_of(model: nn.Module, name: str) -> tuple[int, ...]:
    """The shape of a weight, held as integers or not."""
    path, _, attribute = name.rpartition(".")
    owner = model.get_submodule(path)
    stored = owner._modules.get(f"stored_{attribute}")
    return stored.shape if isinstance(stored, Stored) else tuple(owner.get_parameter(attribute).shape)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without what is held as integers."""
    held = tuple(
        f"{path}." for path, module in model.named_modules(remove_duplicate=False) if isinstance(module, Stored)
    )
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(held or ("\0",))}


def count(model: nn.Module) -> int:
    """Weights of a model, those that are held as integers among them."""
    stored = {id(module): math.prod(module.shape) for module in model.modules() if isinstance(module, Stored)}
    return sum(p.numel() for p in model.parameters()) + sum(stored.values())


def _read(attribute: str) -> property:
    return property(lambda module: module._modules[f"stored_{attribute}"]())


def weights_of_codes(model: nn.Module) -> dict[str, str]:
    """The name of a buffer of codes -> the name of the weight, in a model of `with_stored`."""
    return {
        f"{path}.codes": module.name
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Stored)
    }
