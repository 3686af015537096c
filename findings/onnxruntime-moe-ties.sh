#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: TopK gives equal scores to the lower index, as the ONNX specification says. The contrib operators MoE
# and QMoE select experts by the same scores, but of equal ones take the higher index: the operator alone is not TopK, gather and sum.
# PyTorch 2.13.0's topk promises no order: of 64 equal scores it returned 42, 43, 44, 41 on this machine's CPU.
#
# Seen, Linux x86-64, Python 3.11:
#   TopK: experts 0, 1; MoE: experts 2, 3
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "onnx==1.23.2" "onnxruntime==1.31.1" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

EXPERTS, D, K = 4, 8, 2
# Expert e answers with 10 ** e on every channel: silu(gate) * up = silu(1) * 1, times its own weights.
up = np.zeros((EXPERTS, 2, D), np.float32)
up[:, :, 0] = 1
silu = 1 / (1 + np.exp(-1))
down = np.stack([np.full((D, 1), 10.0**e / silu) for e in range(EXPERTS)]).astype(np.float32)
info = helper.make_tensor_value_info
graph = helper.make_graph(
    [
        helper.make_node("TopK", ["scores", "k"], ["values", "indices"], axis=-1),
        helper.make_node(
            "MoE", ["x", "scores", "up", "", "down"], ["y"], domain="com.microsoft", k=K, activation_type="swiglu",
            swiglu_fusion=1, normalize_routing_weights=1, activation_alpha=1.0, activation_beta=0.0,
        ),
    ],
    "ties",
    [info("x", TensorProto.FLOAT, [1, D]), info("scores", TensorProto.FLOAT, [1, EXPERTS])],
    [info("indices", TensorProto.INT64, [1, K]), info("y", TensorProto.FLOAT, [1, D])],
    [numpy_helper.from_array(a, n) for a, n in ((np.array([K]), "k"), (up, "up"), (down, "down"))],
)  # fmt: skip
opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
x = np.zeros((1, D), np.float32)
x[0, 0] = 1
indices, y = session.run(None, {"x": x, "scores": np.zeros((1, EXPERTS), np.float32)})
total = round(float(2 * y[0, 0]))  # each of the two weighs a half
chosen = [e for e in range(EXPERTS) if total // 10**e % 10]
print(f"TopK: experts {', '.join(map(str, sorted(indices[0])))}; MoE: experts {', '.join(map(str, chosen))}")
sys.exit(not (sorted(indices[0]) == [0, 1] and chosen == [2, 3]))
PY
"$folder/venv/bin/python" "$folder/show.py"
