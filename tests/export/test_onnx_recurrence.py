"""Recurrences and short convolutions in ONNX packages: ONNX Runtime's operators, with calls of any number of rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rmse_edge.export.onnx.ops import CONTRIB
from rmse_edge.export.program import ROWS, ExportedMethod
from rmse_edge.layers.mixers.operators import linear_attention, short_convolution
from rmse_edge.loop.contract import TensorSpec

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

# What ONNX Runtime 1.29 (on phones) and 1.30 (in browsers) read of both operators; 1.31 has more, channels_last among it.
KNOWN_TO_DEVICES = {
    ("CausalConvWithState", "ndim"),
    ("CausalConvWithState", "activation"),
    *(("LinearAttention", name) for name in ("q_num_heads", "kv_num_heads", "scale", "update_rule")),
}


class Recurrence(nn.Module):
    """Both operators, the first by both of its rules: with a decay of every row, and correcting by the share beta."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(12, 1, 4)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor, tail: Tensor, memory: Tensor, decay: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        mixed = short_convolution(x, tail, self.weight, self.bias, True)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in mixed.chunk(3, -1))
        y, after = linear_attention(q, k / 2, v, memory, decay, None, 0.5)
        corrected, last = linear_attention(q, k / 2, y, after, decay[..., :1], beta, 1.0)
        return mixed + short_convolution(x, tail, self.weight, None, False), y, corrected, last


def test_the_operators_say_what_their_definitions_say_in_calls_of_any_size() -> None:
    """A call of one row by the graph that serves one of seven."""
    onnxruntime = pytest.importorskip("onnxruntime")
    from rmse_edge.export.onnx.lower import to_onnx

    torch.manual_seed(2)
    model = Recurrence().eval()
    takes = tuple(
        TensorSpec(name, shape)
        for name, shape in {
            "x": (1, ROWS, 12), "tail": (1, 3, 12), "memory": (1, 2, 2, 2), "decay": (1, 2, ROWS, 2), "beta": (1, 2, ROWS, 1),
        }.items()
    )  # fmt: skip
    gives = (
        TensorSpec("mixed", (1, ROWS, 12)), TensorSpec("y", (1, 2, ROWS, 2)), TensorSpec("corrected", (1, 2, ROWS, 2)),
        TensorSpec("last", (1, 2, 2, 2)),
    )  # fmt: skip
    rows = torch.export.Dim("rows", min=1, max=64)
    axes = tuple({t.shape.index(ROWS): rows} if ROWS in t.shape else None for t in takes)

    def given(count: int) -> tuple[Tensor, ...]:
        found = [torch.randn([count if d == ROWS else d for d in t.shape]) for t in takes]
        return (*found[:3], -found[3].abs(), torch.sigmoid(found[4]))

    program = torch.export.export(
        model, given(7), strict=False, dynamic_shapes=axes, prefer_deferred_runtime_asserts_over_guards=True
    )
    graph = to_onnx(ExportedMethod("recur", (1, 64), takes, gives, program), False)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("LinearAttention") == 2 and kinds.count("CausalConvWithState") == 2
    given_of = {(node.op_type, a.name) for node in graph.graph.node if node.domain == CONTRIB for a in node.attribute}
    assert given_of <= KNOWN_TO_DEVICES
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    for count in (1, 7, 64):
        values = given(count)
        with torch.no_grad():
            expected = model(*values)
        found = session.run(None, {t.name: v.numpy() for t, v in zip(takes, values)})
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)
