"""How the model becomes a program for ExecuTorch: weights as XNNPACK reads them, experts as operators of their own.

Dense weights become torchao tensors, which trace to the patterns that XNNPACK's partitioner takes for int8 rows (`8da8w`)
and groups of int4 (`8da4w`); in both, activations are rounded to int8, row by row. The routed experts stay one operator,
`sparse_experts` or `quantized_experts`, whose kernels are in runtimes/native: they read the chosen experts where they lie
in the mapped file, so that idle ones stay out of memory.
"""

from __future__ import annotations

import hashlib

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rmse_edge.arch.quantization import Use
from rmse_edge.errors import ExportError
from rmse_edge.export.targets import LowerOptions
from rmse_edge.layers.attention import Attention
from rmse_edge.layers.dense import FullAttention
from rmse_edge.layers.experts import SparseExperts, StoredExperts, chosen_by, gathered_experts
from rmse_edge.layers.held import decoded, release, unpacked
from rmse_edge.layers.norm import RMSNorm
from rmse_edge.quantize import QuantizedTensor
from rmse_edge.quantize.parallel import shared_copy
from rmse_edge.quantize.tensors import Format

BLOCK = 32  # XNNPACK's groups, and the activations that share a scale in the experts' kernels
OUT_VARIANTS = (
    "sparse_experts.out(Tensor x, Tensor logits, Tensor scores, Tensor active, Tensor gate_up, Tensor down, SymInt top_k, "
    "float gate_cap, float up_cap, *, Tensor(a!) out) -> Tensor(a!)",
    "quantized_experts.out(Tensor x, Tensor logits, Tensor scores, Tensor active, Tensor gate_up_codes, "
    "Tensor gate_up_scales, Tensor down_codes, Tensor down_scales, SymInt top_k, float gate_cap, float up_cap, *, "
    "Tensor(a!) out) -> Tensor(a!)",
)


@torch.library.custom_op("rmse_edge::quantized_experts", mutates_args=())
def quantized_experts(
    x: Tensor,
    logits: Tensor,
    scores: Tensor,
    active: Tensor,
    gate_up_codes: Tensor,
    gate_up_scales: Tensor,
    down_codes: Tensor,
    down_scales: Tensor,
    top_k: int,
    gate_cap: float,
    up_cap: float,
) -> Tensor:
    """`rmse_edge::sparse_experts` on integers; here with float activations, which the runtime's kernels round to int8.

    Args:
        gate_up_codes, down_codes: (E, outputs, inputs) int8, or (E, outputs, inputs / 2) uint8 with two int4 to a byte,
            the first in the low half, zero at 8.
        gate_up_scales, down_scales: (E, outputs, groups) bfloat16.
    """
    both = ((gate_up_codes, gate_up_scales), (down_codes, down_scales))
    weights = [_unpacked(codes, of_codes) for codes, of_codes in both]
    return gathered_experts(x, chosen_by(logits, scores, top_k), weights[0], weights[1], (gate_cap, up_cap))


def _unpacked(codes: Tensor, scales: Tensor) -> Tensor:
    """The float32 weights (E, outputs, inputs) that codes and scales of `quantized_experts` stand for."""
    if codes.dtype == torch.uint8:
        return decoded(unpacked(codes, 4), scales, None, 4)
    return decoded(codes, scales, torch.zeros_like(scales), 8)  # counted from their zero


@quantized_experts.register_fake
def _(x, logits, scores, active, gate_up_codes, gate_up_scales, down_codes, down_scales, top_k, gate_cap, up_cap):
    return torch.empty_like(x)


_library = torch.library.Library("rmse_edge", "FRAGMENT")
for _schema in OUT_VARIANTS:
    _library.define(_schema)


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
        return x * torch.rsqrt(F.linear(x * x, self.mean, self.eps)) * self.weight


class NumberedLinear(nn.Module):
    """A linear layer with one output more, whose weights spell a number, and which is dropped.

    XNNPACK's cache of packed weights takes two weights for one where the bytes of their codes are the same, whatever their
    scales (and, of int8, their biases). Where a model has such a pair, this gives one of them codes of its own.
    """

    def __init__(self, q: QuantizedTensor, bias: Tensor | None, number: int) -> None:
        super().__init__()
        digits = (number >> torch.arange(q.shape[-1]).clamp(max=62)) & 1
        codes = torch.cat([q.codes, (q.format.middle + digits).to(q.codes.dtype).unsqueeze(0)])
        longer = QuantizedTensor(q.format, codes, torch.cat([q.scales, q.scales[-1:]]))
        outputs, inputs = longer.shape
        self.layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
        self.layer.weight = nn.Parameter(torchao_weight(longer, True), requires_grad=False)
        if bias is not None:
            self.layer.bias = nn.Parameter(torch.cat([bias, torch.zeros(1)]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[..., :-1]


class IntegerExperts(StoredExperts):
    """Experts that trace to `quantized_experts`."""

    gate_up_codes: Tensor  # see there
    gate_up_scales: Tensor
    down_codes: Tensor
    down_scales: Tensor

    def __init__(self, experts: SparseExperts, gate_up: QuantizedTensor, down: QuantizedTensor) -> None:
        super().__init__(experts)
        for name, q in (("gate_up", gate_up), ("down", down)):
            self.register_buffer(f"{name}_codes", stored_codes(q))
            self.register_buffer(f"{name}_scales", q.scales.to(torch.bfloat16))

    def exported(self, rows: Tensor, logits: Tensor, scores: Tensor, active: Tensor) -> Tensor:
        weights = (self.gate_up_codes, self.gate_up_scales, self.down_codes, self.down_scales)
        return quantized_experts(rows, logits, scores, active, *weights, self.top_k, *self.caps)


def stored_codes(q: QuantizedTensor) -> Tensor:
    """Codes (..., N, K) as the experts' kernels read them: int8, or two int4 to a byte."""
    return signed(q) if q.format.bits == 8 else q.packed()


def signed(q: QuantizedTensor) -> Tensor:
    """Codes (..., N, K) counted from their zero, int8."""
    return (q.codes.to(torch.int16) - q.format.middle).to(torch.int8)


def check_format(name: str, fmt: Format, inputs: int, use: Use) -> None:
    """Fail unless XNNPACK and the experts' kernels have this format.

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
    """A copy of `model` that traces to what XNNPACK and the experts' kernels run.

    Raises:
        ExportError: a weight has a format that these do not read; names it.
    """
    model = shared_copy(model)
    release(model)
    left = dict(options.tensors)
    for path, module in list(model.named_modules()):
        if isinstance(module, RMSNorm):
            model.set_submodule(path, DelegatedNorm(module))
        elif isinstance(module, (Attention, FullAttention)):
            module.rotary_operator = False
    for path, module in list(model.named_modules()):
        if isinstance(module, SparseExperts) and f"{path}.gate_up_proj" in left:
            _replace_experts(model, path, module, left)
    seen: dict[bytes, list[bytes]] = {}  # by the codes of a linear layer's weight, what else is packed with them
    for name, q in left.items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        check_format(name, q.format, q.shape[-1], "matrix" if isinstance(owner, nn.Linear) else "rows")
        if not isinstance(owner, nn.Linear):
            setattr(owner, attribute, nn.Parameter(torchao_weight(q, False), requires_grad=False))
            continue
        alike = seen.setdefault(_digest(stored_codes(q)), [])
        rest = str(q.shape).encode() + _digest(q.scales)
        rest += b"" if owner.bias is None else _digest(owner.bias.detach())
        if rest not in alike:
            alike.append(rest)
        if number := alike.index(rest):
            model.set_submodule(path, NumberedLinear(q, owner.bias, number))
        else:
            owner.weight = nn.Parameter(torchao_weight(q, True), requires_grad=False)
    return model


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).digest()


def _replace_experts(model: nn.Module, path: str, module: SparseExperts, left: dict[str, QuantizedTensor]) -> None:
    names = [f"{path}.{weight}" for weight in ("gate_up_proj", "down_proj")]
    up, down = (left.pop(name) for name in names)
    for name, q in zip(names, (up, down)):
        check_format(name, q.format, q.shape[-1], "experts")
    model.set_submodule(path, IntegerExperts(module, up, down).eval())


def torchao_weight(q: QuantizedTensor, dynamic: bool) -> Tensor:
    """A weight (N, K) of a linear layer, whose activations are rounded too (`dynamic`), or of an embedding."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    rounding = IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN if dynamic else None
    return IntxUnpackedToInt8Tensor(
        qdata=signed(q),
        scale=q.scales,
        zero_point=torch.zeros_like(q.scales, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{q.format.bits}"),
        block_size=(1, q.format.group or q.shape[-1]),
        dtype=torch.float32,
        activation_quantization=rounding,
    )
