"""How the model's own operators become ONNX: `RotaryEmbedding`, and of ONNX Runtime's contrib operators `MoE`, with compaction or not,
`LinearAttention` and `CausalConvWithState`.

Three operators of our own stand in the graph only until export/onnx/passes.py and quantize.py have seen who reads what:
`StoredWeight`, a weight given by its integers, `Transposed`, the weight of a linear layer as a product wants it, and
`ExpertLoop` (experts.py), experts that `MoE` cannot compute.

`rmse_edge::sparse_experts` selects experts by scores, but weighs them by their logits. `MoE` knows one input for both, so the logits of experts that were not selected are pushed to -1e4 first: its own top-k then
finds the same experts, and its softmax gives the rest exactly nothing. Which experts are selected is decided by `TopK`,
whose ties go to the lower index by definition: exactly `top_k` logits are left for `MoE`, whose own ties go elsewhere.

Where `MoE` and `QMoE` are not to be had, as on GPUs of browsers, the experts are gathered: weights of those that a row chose are
copied, and multiplied by operators of ONNX itself.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx.defs as defs
import onnxscript
import torch
from onnxscript import opset23 as op

import rmse_edge.layers.attention  # which defines the operator
import rmse_edge.layers.experts
import rmse_edge.layers.mixers.operators  # noqa: F401
from rmse_edge.layers import held
from rmse_edge.layers.masks import MASKED

CONTRIB = "com.microsoft"
OWN = "rmse_edge"  # of operators that no package has
STORED_WEIGHT, TRANSPOSED, EXPERT_LOOP = "StoredWeight", "Transposed", "ExpertLoop"
ROTARY = torch.ops.rmse_edge.rotary.default
SPARSE_EXPERTS = torch.ops.rmse_edge.sparse_experts.default
LINEAR = torch.ops.aten.linear.default
LINEAR_ATTENTION = torch.ops.rmse_edge.linear_attention.default
SHORT_CONVOLUTION = torch.ops.rmse_edge.short_convolution.default


@cache
def register_contrib_schemas(*names: str) -> None:
    """Tell `onnx` the schemas of contrib operators, as the installed ONNX Runtime has them.

    onnxscript looks an operator up by its schema; ONNX Runtime keeps its own operators' schemas to itself.
    """
    from onnxruntime.capi import onnxruntime_pybind11_state as ort

    parameter, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    every_type = [f"tensor({t})" for t in ("float", "float16", "bfloat16", "uint8", "int8", "int32", "int64", "bool")]

    def convert(p: Any) -> defs.OpSchema.FormalParameter:
        kind = str(p.option).rsplit(".", 1)[-1]
        return parameter(p.name, p.typeStr, p.description, param_option=getattr(option, kind))

    for schema in ort.get_all_operator_schema():
        if schema.domain != CONTRIB or schema.name not in names or defs.has(schema.name, CONTRIB):
            continue
        generic = {p.typeStr for p in [*schema.inputs, *schema.outputs] if "(" not in p.typeStr}
        attributes = [
            defs.OpSchema.Attribute(
                a.name,
                getattr(defs.OpSchema.AttrType, str(a.type).rsplit(".", 1)[-1]),
                a.description,
                required=a.required,
            )
            for a in schema.attributes.values()
        ]
        defs.register_schema(
            defs.OpSchema(
                schema.name,
                CONTRIB,
                1,
                inputs=[convert(p) for p in schema.inputs],
                outputs=[convert(p) for p in schema.outputs],
                type_constraints=[(t, every_type, "") for t in sorted(generic)],
                attributes=attributes,
            )
        )


@cache
def register_own_schemas() -> None:
    """Tell `onnx` the operators that stand in a graph for a while."""
    parameter, option = defs.OpSchema.FormalParameter, defs.OpSchema.FormalParameterOption
    floats, codes = "tensor(float)", "tensor(uint8)"
    inputs = [parameter("codes", codes), parameter("scales", floats)]
    inputs.append(parameter("zeros", codes, param_option=option.Optional))
    bits = defs.OpSchema.Attribute("bits", defs.OpSchema.AttrType.INT, "of a code", required=True)
    weight = [parameter("weight", floats)]
    whole = "tensor(int64)"
    kinds = {"count": whole, "x": floats, "chosen": whole, "weights": floats, "which": whole, "start": floats}
    kinds |= {"gate_up": floats, "down": floats}
    loop_inputs = [parameter(name, kind) for name, kind in kinds.items()]
    caps = [
        defs.OpSchema.Attribute(name, defs.OpSchema.AttrType.FLOAT, "see `swiglu`", required=True)
        for name in ("gate_cap", "up_cap")
    ]
    for schema in (
        defs.OpSchema(EXPERT_LOOP, OWN, 1, inputs=loop_inputs, outputs=[parameter("y", floats)], attributes=caps),
        defs.OpSchema(STORED_WEIGHT, OWN, 1, inputs=inputs, outputs=weight, attributes=[bits]),
        defs.OpSchema(TRANSPOSED, OWN, 1, inputs=weight, outputs=[parameter("transposed", floats)]),
    ):
        defs.register_schema(schema)


def translations(compact: bool, gathered: bool = False) -> dict[Any, Any]:
    """The translation table for `torch.onnx.export`.

    Args:
        compact: compute the experts of active rows only. Rows that stopped are taken out before and put back after,
            so the cost follows the number of active rows instead of the deepest one's depth.
        gathered: no operator of experts, see `OnnxOptions.experts`.
    """
    # A second of imports, which nothing but an export needs.
    from onnxscript.function_libs.torch_lib.ops.nn import aten_linear

    register_contrib_schemas("MoE", "LinearAttention", "CausalConvWithState")
    register_own_schemas()
    ms, own = onnxscript.values.Opset(CONTRIB, 1), onnxscript.values.Opset(OWN, 1)

    def experts(x, logits, scores, gate_up, down, top_k):
        _, chosen = op.TopK(scores, op.Constant(value_ints=[top_k]), axis=-1)  # (N, top_k)
        nothing = op.Min(logits, op.Constant(value_float=MASKED))
        kept = op.ScatterElements(nothing, chosen, op.GatherElements(logits, chosen, axis=-1), axis=-1)
        return ms.MoE(
            x,
            kept,
            gate_up,
            None,
            down,
            k=top_k,
            activation_type="swiglu",
            swiglu_fusion=1,  # gate and up interleaved
            normalize_routing_weights=1,
            activation_alpha=1.0,
            activation_beta=0.0,
        )

    def expert_loop(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap):
        _, chosen = op.TopK(scores, op.Constant(value_ints=[top_k]), axis=-1)  # (N, top_k)
        weights = op.Softmax(op.GatherElements(logits, chosen, axis=-1), axis=-1)
        which, _, _, _ = op.Unique(chosen)
        start = op.Mul(x, op.Constant(value_float=0.0))
        count = op.Size(which)
        return own.ExpertLoop(count, x, chosen, weights, which, start, gate_up, down, gate_cap=gate_cap, up_cap=up_cap)

    def capped(x, cap):
        return op.Mul(op.Tanh(op.Div(x, op.Constant(value_float=cap))), op.Constant(value_float=cap)) if cap else x

    def gathered_experts(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap):
        _, chosen = op.TopK(scores, op.Constant(value_ints=[top_k]), axis=-1)  # (N, k)
        weights = op.Softmax(op.GatherElements(logits, chosen, axis=-1), axis=-1)
        rows = op.Unsqueeze(x, op.Constant(value_ints=[1, 3]))  # (N, 1, d, 1)
        hidden = op.MatMul(op.Gather(gate_up, chosen, axis=0), rows)  # (N, k, 2f, d) -> (N, k, 2f, 1)
        pairs = op.Reshape(hidden, op.Constant(value_ints=[0, top_k, -1, 2]))  # gate and up by turns
        gate, up = op.Split(pairs, axis=3, num_outputs=2)  # (N, k, f, 1)
        hidden = op.Mul(op.Mul(capped(gate, gate_cap), op.Sigmoid(gate)), capped(up, up_cap))
        hidden = op.Mul(hidden, op.Unsqueeze(weights, op.Constant(value_ints=[2, 3])))
        found = op.MatMul(op.Gather(down, chosen, axis=0), hidden)  # (N, k, d, f) -> (N, k, d, 1)
        return op.Squeeze(op.ReduceSum(found, op.Constant(value_ints=[1]), keepdims=0), op.Constant(value_ints=[2]))

    def either(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap):
        if gathered:
            return gathered_experts(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap)
        if gate_cap or up_cap:  # which `MoE` has not
            return expert_loop(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap)
        return experts(x, logits, scores, gate_up, down, top_k)

    def all_rows(x, logits, scores, active, gate_up, down, top_k: int, gate_cap: float, up_cap: float):
        return either(x, logits, scores, gate_up, down, top_k, gate_cap, up_cap)

    def active_rows(x, logits, scores, active, gate_up, down, top_k: int, gate_cap: float, up_cap: float):
        rows = op.Transpose(op.NonZero(active), perm=[1, 0])  # (n, 1)
        x_some, logits_some, scores_some = (op.GatherND(t, rows) for t in (x, logits, scores))
        some = either(x_some, logits_some, scores_some, gate_up, down, top_k, gate_cap, up_cap)
        return op.ScatterND(x, rows, some)  # stopped rows get anything: their result is not read

    def rotary(x, cos, sin):
        axis = op.Constant(value_ints=[1])  # angles are alike for all heads: (B, 1, C, hd/2) -> (B, C, hd/2)
        return op.RotaryEmbedding(x, op.Squeeze(cos, axis), op.Squeeze(sin, axis))

    def contiguous_stride(x, dim: int):
        # PyTorch may find a size in a stride: that of a loop's input, which is contiguous, is the sizes behind it.
        return op.ReduceProd(op.Shape(x, start=dim + 1), keepdims=0)

    def stored_weight(codes, scales, zeros, bits: int):
        return own.StoredWeight(codes, scales, zeros, bits=bits)

    def linear(x, weight, bias=None):
        if len(x.shape) == 2 or len(weight.shape) != 2:
            return aten_linear(x, weight, bias)
        product = op.MatMul(x, own.Transposed(weight))
        return product if bias is None else op.Add(product, bias)

    def packed(x):
        """(B, H, C, n) -> (B, C, H * n)."""
        return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))

    def linear_attention(query, key, value, memory, decay, beta, scale: float):
        heads = memory.shape[1]
        y, after = ms.LinearAttention(
            packed(query), packed(key), packed(value), memory, packed(decay), None if beta is None else packed(beta),
            q_num_heads=heads, kv_num_heads=heads, scale=scale, update_rule="gated" if beta is None else "gated_delta",
        )  # fmt: skip
        apart = op.Reshape(y, op.Constant(value_ints=[0, 0, heads, -1]))
        return op.Transpose(apart, perm=[0, 2, 1, 3]), after

    def short_convolution(x, past, weight, bias, silu: bool):
        activation = "silu" if silu else "none"
        # ONNX Runtime 1.29 and 1.30, which are those of phones and browsers, do not know channels_last.
        rows, before = (op.Transpose(part, perm=[0, 2, 1]) for part in (x, past))
        y, _ = ms.CausalConvWithState(rows, weight, bias, before, ndim=1, activation=activation)
        return op.Transpose(y, perm=[0, 2, 1])

    experts_of = active_rows if compact else all_rows
    return {
        SPARSE_EXPERTS: experts_of,
        ROTARY: rotary,
        held.OPERATOR: stored_weight,
        LINEAR: linear,
        LINEAR_ATTENTION: linear_attention,
        SHORT_CONVOLUTION: short_convolution,
        torch.ops.aten.sym_stride.int: contiguous_stride,
    }
