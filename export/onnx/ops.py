"""How the model's own operators become ONNX: `RotaryEmbedding`, and ONNX Runtime's contrib `MoE`, with compaction or not.

`rmse_edge::sparse_experts` selects experts by logits plus balancing bias, but weighs them by the logits alone. `MoE`
knows one input for both, so the logits of experts that were not selected are pushed to -1e4 first: its own top-k then
finds the same experts, and its softmax gives the rest exactly nothing. Which experts are selected is decided by `TopK`,
whose ties go to the lower index by definition: exactly `top_k` logits are left for `MoE`, whose own ties go elsewhere.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx.defs as defs
import onnxscript
import torch
from onnxscript import opset23 as op

from rmse_edge.layers.masks import MASKED

CONTRIB = "com.microsoft"
ROTARY = torch.ops.rmse_edge.rotary.default
SPARSE_EXPERTS = torch.ops.rmse_edge.sparse_experts.default


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


def translations(compact: bool) -> dict[Any, Any]:
    """The translation table for `torch.onnx.export`.

    Args:
        compact: compute the experts of active rows only. Rows that stopped are taken out before and put back after,
            so the cost follows the number of active rows instead of the deepest one's depth.
    """
    register_contrib_schemas("MoE")
    ms = onnxscript.values.Opset(CONTRIB, 1)

    def experts(x, logits, bias, gate_up, down, top_k):
        _, chosen = op.TopK(op.Add(logits, bias), op.Constant(value_ints=[top_k]), axis=-1)  # (N, top_k)
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

    def all_rows(x, logits, bias, active, gate_up, down, top_k: int):
        return experts(x, logits, bias, gate_up, down, top_k)

    def active_rows(x, logits, bias, active, gate_up, down, top_k: int):
        rows = op.Transpose(op.NonZero(active), perm=[1, 0])  # (n, 1)
        some = experts(op.GatherND(x, rows), op.GatherND(logits, rows), bias, gate_up, down, top_k)
        return op.ScatterND(x, rows, some)  # stopped rows get anything: their result is not read

    def rotary(x, cos, sin):
        axis = op.Constant(value_ints=[1])  # angles are alike for all heads: (B, 1, C, hd/2) -> (B, C, hd/2)
        return op.RotaryEmbedding(x, op.Squeeze(cos, axis), op.Squeeze(sin, axis))

    return {SPARSE_EXPERTS: active_rows if compact else all_rows, ROTARY: rotary}
