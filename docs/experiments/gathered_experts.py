"""What experts cost in operators that every engine has, beside ONNX Runtime's own operator: `rmse-export --experts gathered`.

    python docs/experiments/gathered_experts.py [--experts 512] [--top-k 10] [--d-model 192] [--width 32] [--reps 31]

Times the experts of one loop alone, on one thread: `MoE`, or `QMoE` on int4, and the same experts gathered, by turns; medians.
Prints a table and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from rmse_edge.errors import quiet
from rmse_edge.export.onnx import lower, ops, quantize
from rmse_edge.layers.held import weights_of_codes, with_stored
from rmse_edge.quantize import Format
from rmse_edge.quantize.tensors import round_to_nearest

ROWS = (1, 64)


class Experts(nn.Module):
    """The operator alone: x (N, d), logits (N, E), active (N,) -> (N, d)."""

    def __init__(self, experts: int, top_k: int, d_model: int, width: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.up = nn.Parameter(torch.randn(experts, 2 * width, d_model) * d_model**-0.5)
        self.down = nn.Parameter(torch.randn(experts, d_model, width) * width**-0.5)

    def forward(self, x: Tensor, logits: Tensor, active: Tensor) -> Tensor:
        return torch.ops.rmse_edge.sparse_experts(x, logits, logits, active, self.up, self.down, self.top_k, 0.0, 0.0)


def session(model: Experts, given: tuple[Tensor, ...], int4: bool, gathered: bool) -> Callable[[], np.ndarray]:
    """A call of the experts on ONNX Runtime."""
    tensors = {}
    if int4:
        tensors = {name: round_to_nearest(p.detach(), Format(4, 32)) for name, p in model.named_parameters()}
    traced = with_stored(model, tensors, {})
    with quiet():
        graph = torch.onnx.export(
            torch.export.export(traced, given), (), dynamo=True, opset_version=lower.OPSET, verbose=False,
            custom_translation_table=ops.translations(False, gathered), input_names=["x", "logits", "active"],
        ).model_proto  # fmt: skip
    if int4:
        quantize.use_integers(graph, tensors, weights_of_codes(traced), 0)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    opened = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = {tensor.name for tensor in opened.get_inputs()}
    feeds = {n: t.numpy() for n, t in zip(("x", "logits", "active"), given) if n in names}
    return lambda: opened.run(None, feeds)[0]


def timed(call: Callable[[], np.ndarray]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="Time experts fused and gathered.")
    parser.add_argument("--experts", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--d-model", type=int, default=192)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--reps", type=int, default=31)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Experts(args.experts, args.top_k, args.d_model, args.width).eval()
    found = []
    print("| weights | rows | fused, ms | gathered, times as long | largest difference |\n|---|---:|---:|---:|---:|")
    for int4 in (False, True):
        for rows in ROWS:
            given = (
                torch.randn(rows, args.d_model),
                torch.randn(rows, args.experts),
                torch.ones(rows, dtype=torch.bool),
            )
            fused, gathered = (session(model, given, int4, way) for way in (False, True))
            apart = float(np.abs(fused() - gathered()).max())
            pairs = [(timed(fused), timed(gathered)) for _ in range(args.reps)]
            ms, ratio = 1000 * statistics.median(a for a, _ in pairs), statistics.median(b / a for a, b in pairs)
            found.append(
                {"quant": "int4" if int4 else "fp32", "rows": rows, "fused_ms": ms, "ratio": ratio, "apart": apart}
            )
            print(f"| {found[-1]['quant']} | {rows} | {ms:.3g} | {ratio:.1f} | {apart:.1e} |", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
