"""How the model becomes a program for Core ML: quantised weights and experts as operators that lower to MIL.

Two ways of storing integers, and two operators for them:

- `stored_weight` (rmse_edge/layers/held.py), for matrices that are used whole: a `constexpr_blockwise_shift_scale`, which
  Core ML unpacks as it likes best (at load time, or inside the matrix product).
- `stored_rows`, for tables of which a call needs a few rows (embeddings, experts): packed bytes, gathered by index and
  unpacked in the graph, so that nothing else is touched. A constexpr that is gathered from may be unpacked whole.

Experts are gathered for the CPU and the GPU. The Neural Engine has no gather worth the name: there all experts are
computed as two dense products, and the ones not chosen are multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil import register_torch_op
from coremltools.converters.mil.frontend.torch.ops import _get_inputs
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import Use
from rmse_edge.arch.registry import arch_of_model
from rmse_edge.errors import ExportError
from rmse_edge.export.targets import LowerOptions
from rmse_edge.layers.attention import Attention
from rmse_edge.layers.dense import FullAttention
from rmse_edge.layers.experts import SparseExperts, StoredExperts, chosen_by, swiglu
from rmse_edge.layers.held import Stored, decoded, hold, holds, unpacked
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.quantize.parallel import shared_copy
from rmse_edge.quantize.tensors import Format

from .options import CoremlOptions

HALF_MAX = 65504.0  # the largest float16

# --------------------------------------------------------------------------------------------------- operators


@torch.library.custom_op("rmse_edge::stored_rows", mutates_args=())
def stored_rows(table: Tensor, scales: Tensor, zeros: Tensor | None, rows: Tensor, bits: int) -> Tensor:
    """Rows of a table of integers, unpacked.

    Args:
        table: (R, ..., K * bits / 8) uint8, see `packed_halves`; scales and zeros: (R, ..., groups).
        rows: which ones, int64 of any shape, each 0..R - 1.
    Returns:
        rows.shape + (..., K) float32.
    """
    codes = table[rows]
    if bits == 4:
        codes = torch.cat([codes & 15, codes >> 4], -1)
    return decoded(codes, scales[rows], None if zeros is None else zeros[rows], bits)


@stored_rows.register_fake
def _(table, scales, zeros, rows, bits):
    return scales.new_empty(*rows.shape, *table.shape[1:-1], table.shape[-1] * 8 // bits)


def packed_halves(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., K) as bytes (..., K * bits / 8); of int4, the first half of a row lies in the low halves of the bytes.

    A row is then unpacked by joining two pieces, not by interleaving them.
    """
    if bits == 8:
        return codes
    low, high = codes.chunk(2, -1)
    return low | (high << 4)


@register_torch_op(torch_alias=["rmse_edge::stored_weight", "rmse_edge.stored_weight"], override=True)
def _lower_stored_weight(context, node):
    codes, scales, zeros, bits = _get_inputs(context, node, expected=4)
    width = int(bits.val)
    values = unpacked(torch.from_numpy(codes.val), width).numpy()
    kwargs = {"scale": half(scales.val).astype(np.float32)}
    if zeros is None:  # signed, counted from the middle
        signed = types.nptype_from_builtin(types.string_to_builtin(f"int{width}"))
        kwargs["data"] = (values.astype(np.int16) - 2 ** (width - 1)).astype(signed)
    else:
        unsigned = types.nptype_from_builtin(types.string_to_builtin(f"uint{width}"))
        kwargs |= {"data": values.astype(unsigned), "offset": zeros.val.astype(unsigned)}
    context.add(mb.constexpr_blockwise_shift_scale(**kwargs, name=node.name))


@register_torch_op(torch_alias=["alias"], override=True)
def _lower_alias(context, node):
    """What slicing all of an axis becomes, of calls of one row: the converter knows `alias_copy` alone."""
    (x,) = _get_inputs(context, node, expected=1)
    context.add(mb.identity(x=x, name=node.name))


@register_torch_op(torch_alias=["rmse_edge::stored_rows", "rmse_edge.stored_rows"], override=True)
def _lower_stored_rows(context, node):
    table, scales, zeros, rows, bits = _get_inputs(context, node, expected=5)

    def fetched(values, what):
        const = mb.const(val=values, name=f"{node.name}_{what}")
        return mb.gather(x=const, indices=rows, axis=0, validate_indices=False)

    x = mb.cast(x=fetched(table.val.astype(np.uint8), "codes"), dtype="fp32")
    if int(bits.val) == 4:
        high = mb.floor(x=mb.mul(x=x, y=np.float32(1 / 16)))
        low = mb.sub(x=x, y=mb.mul(x=high, y=np.float32(16)))
        x = mb.concat(values=[low, high], axis=-1)
    shape, groups = tuple(x.shape), scales.shape[-1]
    grouped = groups > 1
    if grouped:
        x = mb.reshape(x=x, shape=(*shape[:-1], groups, shape[-1] // groups))

    def per_group(values, what):
        found = fetched(values, what)
        return mb.expand_dims(x=found, axes=[-1]) if grouped else found

    if zeros is None:
        x = mb.sub(x=x, y=np.float32(2 ** (int(bits.val) - 1)))
    else:
        x = mb.sub(x=x, y=mb.cast(x=per_group(zeros.val.astype(np.uint8), "zeros"), dtype="fp32"))
    x = mb.mul(x=x, y=per_group(half(scales.val).astype(np.float32), "scales"))
    context.add(mb.reshape(x=x, shape=shape, name=node.name))


def half(scales: np.ndarray) -> np.ndarray:
    """Scales as packages store them. Exact from 7.6e-6 on; what a smaller one is off by is nothing beside the others."""
    return scales.astype(np.float16)


def _one_of_two(seen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """where(seen, a, b) of two numbers: the converter would store both as tensors of the size of `seen`.

    Exact for masks, which are 0 and a whole number.
    """
    if a.dim() or b.dim():
        return NotImplemented
    return b + (a - b) * seen.to(a.dtype)


def _not(x: Tensor) -> Tensor:
    """The converter loses sight of which tensors are masks where it joins some."""
    return torch.logical_not(x) if x.dtype == torch.bool else NotImplemented


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    mean = x.square().mean(tuple(range(-len(shape), 0)), keepdim=True)
    normal = x * torch.rsqrt(mean + (torch.finfo(x.dtype).eps if eps is None else eps))
    return normal if weight is None else normal * weight


def _log_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """The converter's is the logarithm of a softmax, which float16 rounds to zero below 6e-8."""
    x = x if dtype is None else x.to(dtype)
    x = x - x.amax(dim, keepdim=True)
    return x - x.exp().sum(dim, keepdim=True).log()


# Operators of a traced program that the converter does not know, or makes too much of, in terms of others.
DECOMPOSITIONS = {
    torch.ops.aten.where.self: _one_of_two,
    torch.ops.aten.__and__.Tensor: torch.logical_and,
    torch.ops.aten.__or__.Tensor: torch.logical_or,
    torch.ops.aten.log_sigmoid.default: lambda x: -F.relu(-x) - torch.log1p(torch.exp(-x.abs())),
    # The converter's own `inverse` adds 1e-4 to what it divides by.
    torch.ops.aten.reciprocal.default: lambda x: torch.ones_like(x) / x,
    torch.ops.aten.log_softmax.int: _log_softmax,
    # A float is not compared with a bound that was written as an integer.
    torch.ops.aten.clamp_min.default: lambda x, least: torch.maximum(x, torch.full_like(x, least)),
    torch.ops.aten.clamp_max.default: lambda x, most: torch.minimum(x, torch.full_like(x, most)),
    torch.ops.aten.where.ScalarOther: lambda c, a, other: torch.where(c, a, torch.full_like(a, other)),
    torch.ops.aten.bitwise_not.default: _not,
    # The converter wants an epsilon; without one it is that of the type.
    torch.ops.aten.rms_norm.default: _rms_norm,
    torch.ops.aten.new_zeros.default: lambda x, size, **kwargs: torch.zeros(size, dtype=kwargs.get("dtype") or x.dtype),
}

# -------------------------------------------------------------------------------------------------- modules


class StoredLinear(nn.Module):
    """A linear layer on integers, without a bias."""

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.weight = Stored("", q)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight())


class StoredRows(nn.Module):
    """A table (R, ..., K) of integers, of which single rows are asked for."""

    def __init__(self, q: QuantizedTensor) -> None:
        super().__init__()
        self.bits = q.format.bits
        for name, tensor in (("table", packed_halves(q.codes, self.bits)), ("scales", q.scales), ("zeros", q.zeros)):
            self.register_buffer(name, tensor)

    def forward(self, rows: Tensor) -> Tensor:
        return stored_rows(self.table, self.scales, self.zeros, rows, self.bits)


class FloatRows(nn.Module):
    """The same of floats."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def forward(self, rows: Tensor) -> Tensor:
        return self.table.index_select(0, rows.flatten()).view(*rows.shape, *self.table.shape[1:])


class StatisticsNorm(nn.Module):
    """`RMSNorm` written out: fewer operators than the converter's own, whose epsilon depends on the row.

    Its mean must be computed in float32, see export/coreml/precision.py: in float16 a square overflows from 256 on.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class PortableExperts(StoredExperts):
    """Experts in operators that every engine has."""

    stored_gate_up_proj: nn.Module
    stored_down_proj: nn.Module

    def __init__(self, experts: SparseExperts, weights: Mapping[str, QuantizedTensor | Tensor], dense: bool) -> None:
        """
        Args:
            weights: gate_up_proj (E, 2f, d) and down_proj (E, d, f), as they are to be stored.
            dense: compute all experts instead of fetching the chosen ones.
        """
        super().__init__(experts)
        self.dense = dense
        for name, weight in weights.items():
            kept = _flat(weight, name == "down_proj") if dense else weight
            if isinstance(kept, Tensor):
                module: nn.Module = _linear(kept) if dense else FloatRows(kept)
            else:
                module = StoredLinear(kept) if dense else StoredRows(kept)
            self.add_module(f"stored_{name}", module)

    def exported(self, rows: Tensor, logits: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        routing = chosen_by(logits, scores, self.top_k)
        if self.dense:
            share = torch.zeros_like(logits).scatter(1, routing.experts, routing.weights)  # (N, E)
            hidden = swiglu(self.stored_gate_up_proj(rows), self.caps).unflatten(
                -1, (logits.shape[-1], -1)
            )  # (N, E, f)
            return self.stored_down_proj((hidden * share.unsqueeze(-1)).flatten(1))
        gate_up = self.stored_gate_up_proj(routing.experts)  # (N, k, 2f, d)
        hidden = swiglu((gate_up @ rows[:, None, :, None]).squeeze(-1), self.caps) * routing.weights.unsqueeze(
            -1
        )  # (N, k, f)
        return (self.stored_down_proj(routing.experts) @ hidden.unsqueeze(-1)).squeeze(-1).sum(1)


def _flat(weight: QuantizedTensor | Tensor, down: bool) -> QuantizedTensor | Tensor:
    """Weights of all experts as one matrix: (E, 2f, d) -> (E * 2f, d), or with `down` (E, d, f) -> (d, E * f)."""
    if isinstance(weight, QuantizedTensor):
        zeros = None if weight.zeros is None else _matrix(weight.zeros, down)
        return QuantizedTensor(weight.format, _matrix(weight.codes, down), _matrix(weight.scales, down), zeros)
    return _matrix(weight, down)


def _matrix(weight: Tensor, down: bool) -> Tensor:
    return (weight.transpose(0, 1).flatten(1) if down else weight.flatten(0, 1)).contiguous()


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


# ------------------------------------------------------------------------------------------------- preparation


def check_format(name: str, fmt: Format, inputs: int, use: Use) -> None:
    """Fail unless packages have a form for this format.

    Raises:
        ExportError: naming the tensor and the fix.
    """
    if fmt.bits == 4 and inputs % 2:
        raise ExportError(f"{name}: has {inputs} inputs, which make no whole bytes of int4; quantise to int8")


def prepare(model: nn.Module, options: LowerOptions) -> nn.Module:
    """A copy of `model` that traces to what Core ML runs well where it is to run.

    Raises:
        ExportError: a weight has scales beyond float16; names it.
    """
    model, held = shared_copy(model), holds(model)
    own: CoremlOptions = options.own or CoremlOptions()
    tensors, on_ane = options.tensors, own.compute == "ane"
    for name, q in tensors.items():
        if float(q.scales.max()) > HALF_MAX:
            raise ExportError(f"{name}: has scales beyond float16's range; export with quant=fp32")
    left = dict(tensors)
    for path, module in list(model.named_modules()):
        if isinstance(module, RMSNorm) and not on_ane:
            # On the Neural Engine all is float16; the converter's own form divides by the largest value first.
            model.set_submodule(path, StatisticsNorm(module))
        elif isinstance(module, (Attention, FullAttention)):
            module.rotary_operator = False
        elif isinstance(module, SparseExperts):
            names = ("gate_up_proj", "down_proj")
            weights = {name: left.pop(f"{path}.{name}", getattr(module, name).data) for name in names}
            model.set_submodule(path, PortableExperts(module, weights, on_ane).eval())
    tied = arch_of_model(model).tied(model.config) if tensors else {}
    # Rows are looked up in packed bytes, but in a table that is the head's matrix, too: that is stored once, as it needs it.
    for name in [name for name in left if name not in tied.values()]:
        owner = name.rpartition(".")[0]
        if not isinstance(model.get_submodule(owner), nn.Linear):
            model.set_submodule(owner, StoredRows(left.pop(name)))
    if not held:
        hold(model, left, tied)
    return model
