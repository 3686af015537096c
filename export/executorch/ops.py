"""How the model becomes a program for ExecuTorch: quantised layers are operators of our own, whose kernels are in runtimes/native.

They read weights where they lie in the mapped file, so that none is unpacked or copied and idle experts stay out of memory.
Embeddings are read by ExecuTorch's own operators. The float layers of a quantised model are operators, too; a float model stays what it is, for XNNPACK.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import executorch.exir.passes  # noqa: F401  (its operators are known from then on)
import torch
from torch import Tensor, nn

from rmse_edge.arch.common.quantization import Use
from rmse_edge.errors import ExportError
from rmse_edge.export.targets import LowerOptions
from rmse_edge.layers.attention import Attention
from rmse_edge.layers.cache import table_row
from rmse_edge.layers.dense import FullAttention, GatedMLP
from rmse_edge.layers.experts import SparseExperts, StoredExperts
from rmse_edge.layers.held import release
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.quantize.parallel import shared_copy
from rmse_edge.quantize.tensors import Format, in_blocks

from .constants import Shelf
from .operators import float_linear, gated, quantized_experts, quantized_linear, rms_norm, swiglu
from .options import ExecutorchOptions
from .placement import ExpertProfile
from .tiles import BLOCK, tiles_of

Keep = Callable[[Tensor], Tensor]  # where a weight is to lie: gives a tensor that is equal


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class DelegatedNorm(nn.Module):
    """`RMSNorm` in operators that XNNPACK takes, so that a norm does not part what it delegates.

    The mean of the squares is a product with 1/d, a linear layer of one output whose bias is epsilon.
    """

    mean: Tensor  # (1, d)
    eps: Tensor  # (1,)

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        dims = norm.weight.numel()
        self.register_buffer("mean", torch.full((1, dims), 1 / dims))
        self.register_buffer("eps", torch.full((1,), norm.eps))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(nn.functional.linear(x * x, self.mean, self.eps)) * self.weight


class NativeNorm(RMSNorm):
    """A norm that traces to `rms_norm`."""

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, None)


class NativeLinear(nn.Linear):
    """A float layer of a quantised model, which traces to `float_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return float_linear(input, self.weight, self.bias, None)


class NativeMLP(GatedMLP):
    """A gated MLP around `gated`."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))


NATIVE: dict[type[nn.Module], type[nn.Module]] = {RMSNorm: NativeNorm, nn.Linear: NativeLinear, GatedMLP: NativeMLP}


class QuantizedLinear(nn.Module):
    """A linear layer that traces to `quantized_linear`."""

    codes: Tensor  # see `Tiles`
    scales: Tensor
    bias: Tensor | None

    def __init__(self, layer: nn.Linear, q: QuantizedTensor, keep: Keep = as_it_is) -> None:
        """
        Args:
            keep: see `Shelf.tensor`.
        """
        super().__init__()
        for name, value in vars(layer).items():  # a model may keep more there than a weight
            self.__dict__[name] = copy.copy(value)
        del self._parameters["weight"]
        self.outputs = q.shape[0]
        for name, tensor in tiles_of(q)._asdict().items():
            self.register_buffer(name, keep(tensor))

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.codes, self.scales, self.bias, None, self.outputs)


class QuantizedRows(nn.Embedding):
    """Looks rows up by ExecuTorch's operators for quantised tables, in the form that these read."""

    rows: Tensor  # see `rows_of`
    scales: Tensor  # (N, groups)

    def forward(self, input: Tensor) -> Tensor:
        found = torch.ops.quantized_decomposed
        operator, low = (found.embedding_4bit, -8) if self.rows.dtype == torch.uint8 else (found.embedding_byte, -128)
        return operator.dtype(self.rows, self.scales, None, low, -low - 1, input, dtype=torch.float32)


def read_rows(table: nn.Embedding, q: QuantizedTensor, keep: Keep) -> None:
    """Make an embedding look up quantised rows. Its own class goes on making of them what it does."""
    kind = type(table)
    del table._parameters["weight"]
    table.register_buffer("rows", keep(rows_of(q)))
    table.register_buffer("scales", keep(q.scales))
    table.__class__ = QuantizedRows if kind is nn.Embedding else type(kind.__name__, (kind, QuantizedRows), {})


def rows_of(q: QuantizedTensor) -> Tensor:
    """Codes (N, K) as a table of ExecuTorch's operators has them: int8, or two in a byte, the first in the high half."""
    if q.format.bits == 8:
        return signed(q)
    packed = q.packed()  # the first in the low half
    rows = torch.empty_like(packed)
    for block, given in zip(in_blocks(rows), in_blocks(packed)):
        torch.bitwise_or(given << 4, given >> 4, out=block)
    return rows


class QuantizedExperts(StoredExperts):
    """Experts that trace to `quantized_experts`."""

    gate_up_codes: Tensor  # see there
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor
    places: Tensor | None

    def __init__(
        self,
        experts: SparseExperts,
        gate_up: QuantizedTensor,
        down: QuantizedTensor,
        places: Tensor | None = None,
        keep: Keep = as_it_is,
    ) -> None:
        super().__init__(experts)
        self.width = down.shape[-1]
        self.register_buffer("places", places)
        for name, q in (("gate_up", gate_up), ("down", down)):
            for part, tensor in tiles_of(q)._asdict().items():
                self.register_buffer(f"{name}_{part}", keep(tensor))

    def router_logits(self, x: Tensor, k: int | Tensor) -> Tensor:
        logits = self.router(x)
        return logits + table_row(self.step_logits, k) if self.tells_loops else logits

    def shared_mlp(self, rows: Tensor) -> Tensor:
        return self.shared_down_proj(swiglu(self.shared_gate_up_proj(rows)))

    def exported(self, rows: Tensor, logits: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        weights = (self.gate_up_codes, self.gate_up_scales, self.down_codes, self.down_scales)
        return quantized_experts(
            rows, logits, scores, active, *weights, self.width, self.top_k, *self.caps, self.places
        )


def signed(q: QuantizedTensor) -> Tensor:
    """Codes (..., N, K) counted from their zero, int8."""
    # The difference of bytes is that of numbers, in two's complement.
    return (q.codes - q.format.middle).view(torch.int8)


def check_format(name: str, fmt: Format, inputs: int, use: Use) -> None:
    """Fail unless the kernels have this format.

    Raises:
        ExportError: naming the tensor and the fix.
    """
    if inputs % BLOCK and use == "experts":
        raise ExportError(
            f"{name}: its {inputs} inputs make no whole blocks of {BLOCK}; export the float model, with quant=fp32"
        )
    if fmt.bits == 4 and (fmt.group is None or fmt.group % BLOCK):
        groups = f"with group_size={BLOCK} and dense_group_size={BLOCK}, or "
        raise ExportError(
            f"{name}: has groups of {fmt.group}, and executorch takes multiples of {BLOCK}; quantise "
            f"{'' if inputs % BLOCK else groups}to int8"
        )


def prepare(model: nn.Module, options: LowerOptions) -> nn.Module:
    """A copy of `model` that traces to what the kernels and XNNPACK run.

    Raises:
        ExportError: a weight has a format that these do not read; names it.
    """
    with Shelf(options.scratch) as shelf:
        return _prepared(model, options, shelf.tensor)


def _prepared(model: nn.Module, options: LowerOptions, keep: Keep) -> nn.Module:
    own: ExecutorchOptions = options.own or ExecutorchOptions()
    model = shared_copy(model)
    release(model)
    left = dict(options.tensors)
    quantised = bool(left)
    for path, module in list(model.named_modules()):
        if hasattr(module, "attention_operator"):
            module.attention_operator = quantised
        if isinstance(module, (Attention, FullAttention)):
            module.rotary_operator = quantised
        if isinstance(module, RMSNorm) and not quantised:
            model.set_submodule(path, DelegatedNorm(module))
    for path, module in list(model.named_modules()):
        if isinstance(module, SparseExperts) and f"{path}.gate_up_proj" in left:
            _replace_experts(model, path, module, left, own.profile_experts, keep)
    for name, q in left.items():
        path = name.rpartition(".")[0]
        owner = model.get_submodule(path)
        check_format(name, q.format, q.shape[-1], "matrix" if isinstance(owner, nn.Linear) else "rows")
        if isinstance(owner, nn.Linear):
            model.set_submodule(path, QuantizedLinear(owner, q, keep))
        elif isinstance(owner, nn.Embedding):
            read_rows(owner, q, keep)
        else:
            raise ExportError(f"{name}: executorch reads integers in linear layers, experts and embeddings only; "
                              "export with quant=fp32")  # fmt: skip
    if quantised:
        for module in model.modules():
            module.__class__ = NATIVE.get(type(module), type(module))
    return model


def _replace_experts(
    model: nn.Module,
    path: str,
    module: SparseExperts,
    left: dict[str, QuantizedTensor],
    profile: ExpertProfile | None,
    keep: Keep,
) -> None:
    names = [f"{path}.{weight}" for weight in ("gate_up_proj", "down_proj")]
    up, down = (left.pop(name) for name in names)
    for name, q in zip(names, (up, down)):
        check_format(name, q.format, q.shape[-1], "experts")
    places = None
    if profile is not None:
        up, down = (profile.placed(name, q) for name, q in zip(names, (up, down)))
        places = profile.places[path]
    model.set_submodule(path, QuantizedExperts(module, up, down, places, keep).eval())
