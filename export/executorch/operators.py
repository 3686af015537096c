"""The operators of runtimes/native: what they mean in PyTorch, and the variants that a program calls.

Here activations stay floats; the runtime's kernels round those of quantised weights to int8, in blocks of 32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rmse_edge.layers import attend, experts  # noqa: F401  (attend: its operator is known from then on)
from rmse_edge.layers.experts import chosen_by, gathered_experts

from .tiles import weight_of

OUT_VARIANTS = (
    "quantized_linear.out(Tensor x, Tensor codes, Tensor scales, Tensor? bias, Tensor? active, SymInt outputs, *, "
    "Tensor(a!) out) -> Tensor(a!)",
    "float_linear.out(Tensor x, Tensor weight, Tensor? bias, Tensor? active, *, Tensor(a!) out) -> Tensor(a!)",
    "rms_norm.out(Tensor x, Tensor weight, float eps, Tensor? active, *, Tensor(a!) out) -> Tensor(a!)",
    "gated.out(Tensor gate, Tensor up, *, Tensor(a!) out) -> Tensor(a!)",
    "swiglu.out(Tensor gate_up, *, Tensor(a!) out) -> Tensor(a!)",
    "where_rows.out(Tensor condition, Tensor a, Tensor b, *, Tensor(a!) out) -> Tensor(a!)",
    "rotary.out(Tensor x, Tensor cos, Tensor sin, *, Tensor(a!) out) -> Tensor(a!)",
    "attention.out(Tensor query, Tensor keys, Tensor values, Tensor mask, Tensor? bias, Tensor? past_keys, "
    "Tensor? past_values, Tensor? past_mask, Tensor? past_bias, Tensor? sinks, Tensor? active, SymInt first, *, "
    "Tensor(a!) out) -> Tensor(a!)",
    "sparse_experts.out(Tensor x, Tensor logits, Tensor scores, Tensor active, Tensor gate_up, Tensor down, SymInt top_k, "
    "float gate_cap, float up_cap, *, Tensor(a!) out) -> Tensor(a!)",
    "quantized_experts.out(Tensor x, Tensor logits, Tensor scores, Tensor active, Tensor gate_up_codes, "
    "Tensor gate_up_scales, Tensor down_codes, Tensor down_scales, SymInt width, SymInt top_k, float gate_cap, "
    "float up_cap, Tensor? places, *, Tensor(a!) out) -> Tensor(a!)",
)


@torch.library.custom_op("rmse_edge::quantized_linear", mutates_args=())
def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None, active: Tensor | None, outputs: int
) -> Tensor:
    """`F.linear` with a weight in tiles: (..., inputs) -> (..., outputs).

    Args:
        codes, scales: see `Tiles`.
        active: bool, of as many rows each, one after the other; rows that are not become zero, and cost nothing.
    """
    return of_active(F.linear(x, weight_of(codes, scales, outputs, x.shape[-1]), bias), active)


def of_active(out: Tensor, active: Tensor | None) -> Tensor:
    """Zero in rows (..., n) that are not active, as `quantized_linear` has it."""
    if active is None:
        return out
    rows = out.reshape(active.numel(), -1)
    return torch.where(active.reshape(-1, 1), rows, 0.0).reshape(out.shape)


@quantized_linear.register_fake
def _(x, codes, scales, bias, active, outputs):
    return x.new_empty((*x.shape[:-1], outputs))


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
    width: int,
    top_k: int,
    gate_cap: float,
    up_cap: float,
    places: Tensor | None,
) -> Tensor:
    """`rmse_edge::sparse_experts` with stacked weights in tiles.

    Args:
        width: hidden channels of an expert.
        places: (E,) int64, where in the stacked weights an expert lies; None: in the place of its number.
    """
    d = x.shape[1]
    gate_up = weight_of(gate_up_codes, gate_up_scales, 2 * width, d)
    down = weight_of(down_codes, down_scales, d, width)
    if places is not None:
        gate_up, down = gate_up[places], down[places]
    return gathered_experts(x, chosen_by(logits, scores, top_k), gate_up, down, (gate_cap, up_cap))


@quantized_experts.register_fake
def _(
    x,
    logits,
    scores,
    active,
    gate_up_codes,
    gate_up_scales,
    down_codes,
    down_scales,
    width,
    top_k,
    gate_cap,
    up_cap,
    places,
):
    return torch.empty_like(x)


@torch.library.custom_op("rmse_edge::float_linear", mutates_args=())
def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None, active: Tensor | None) -> Tensor:
    """`F.linear`: (..., inputs) -> (..., outputs); `active` as in `quantized_linear`."""
    return of_active(F.linear(x, weight, bias), active)


@float_linear.register_fake
def _(x, weight, bias, active):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("rmse_edge::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, active: Tensor | None) -> Tensor:
    """x / rms(x) * weight over the last axis; `active` as in `quantized_linear`."""
    return of_active(F.rms_norm(x, weight.shape, weight, eps), active)


@rms_norm.register_fake
def _(x, weight, eps, active):
    return torch.empty_like(x)


@torch.library.custom_op("rmse_edge::gated", mutates_args=())
def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


@gated.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@torch.library.custom_op("rmse_edge::swiglu", mutates_args=())
def swiglu(gate_up: Tensor) -> Tensor:
    """The same of interleaved channels: (..., 2f) -> (..., f)."""
    return experts.swiglu(gate_up)


@swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2))


@torch.library.custom_op("rmse_edge::where_rows", mutates_args=())
def where_rows(condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`torch.where` of a (..., n) and b with a condition (..., 1): whole rows are copied."""
    return torch.where(condition, a, b)


@where_rows.register_fake
def _(condition, a, b):
    return torch.empty_like(a)


_library = torch.library.Library("rmse_edge", "FRAGMENT")
for _schema in OUT_VARIANTS:
    _library.define(_schema)
