"""How the model becomes a program for ExecuTorch: quantised layers are operators of our own, whose kernels are in runtimes/native.

They read weights where they lie in the mapped file, so that none is unpacked or copied and idle experts stay out of memory.
Embeddings become torchao tensors, which trace to ExecuTorch's own operators. The float layers of a quantised model are operators,
too; a float model stays what it is, for XNNPACK.
"""

from __future__ import annotations

import copy

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
from rmse_edge.quantize.tensors import Format

from .operators import float_linear, gated, quantized_experts, quantized_linear, rms_norm, swiglu
from .options import ExecutorchOptions
from .placement import ExpertProfile
from .tiles import BLOCK, tiles_of


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

    def __init__(self, layer: nn.Linear, q: QuantizedTensor) -> None:
        super().__init__()
        for name, value in vars(layer).items():  # a model may keep more there than a weight
            self.__dict__[name] = copy.copy(value)
        del self._parameters["weight"]
        self.outputs = q.shape[0]
        for name, tensor in tiles_of(q)._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return quantized_linear(x, self.codes, self.scales, self.bias, None, self.outputs)


class QuantizedExperts(StoredExperts):
    """Experts that trace to `quantized_experts`."""

    gate_up_codes: Tensor  # see there
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor
    places: Tensor | None

    def __init__(
        self, experts: SparseExperts, gate_up: QuantizedTensor, down: QuantizedTensor, places: Tensor | None = None
    ) -> None:
        super().__init__(experts)
        self.width = down.shape[-1]
        self.register_buffer("places", places)
        for name, q in (("gate_up", gate_up), ("down", down)):
            for part, tensor in tiles_of(q)._asdict().items():
                self.register_buffer(f"{name}_{part}", tensor)

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
    return (q.codes.to(torch.int16) - q.format.middle).to(torch.int8)


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
            _replace_experts(model, path, module, left, own.profile_experts)
    for name, q in left.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        check_format(name, q.format, q.shape[-1], "matrix" if isinstance(owner, nn.Linear) else "rows")
        if isinstance(owner, nn.Linear):
            model.set_submodule(path, QuantizedLinear(owner, q))
        else:
            setattr(owner, attribute, nn.Parameter(torchao_rows(q), requires_grad=False))
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
) -> None:
    names = [f"{path}.{weight}" for weight in ("gate_up_proj", "down_proj")]
    up, down = (left.pop(name) for name in names)
    for name, q in zip(names, (up, down)):
        check_format(name, q.format, q.shape[-1], "experts")
    places = None
    if profile is not None:
        up, down = (profile.placed(name, q) for name, q in zip(names, (up, down)))
        places = profile.places[path]
    model.set_submodule(path, QuantizedExperts(module, up, down, places).eval())


def torchao_rows(q: QuantizedTensor) -> Tensor:
    """A weight (N, K) whose rows are looked up."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import IntxUnpackedToInt8Tensor

    return IntxUnpackedToInt8Tensor(
        qdata=signed(q),
        scale=q.scales,
        zero_point=torch.zeros_like(q.scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{q.format.bits}"),
        block_size=(1, q.format.group or q.shape[-1]),
        dtype=torch.float32,
        activation_quantization=None,
    )
