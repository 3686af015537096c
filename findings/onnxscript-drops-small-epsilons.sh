#!/usr/bin/env bash
# onnxscript 0.7.2: its rewriter, which torch.onnx.export of PyTorch 2.13 runs over every graph, takes a constant for 0 that is within
# 1e-8 of it, and drops what adds it. So of 1 / sqrt(sum + 1e-14), an epsilon that keeps zeros finite, 1 / sqrt(sum) is left: 0 / 0 in
# the exported graph. A maximum with the same constant stays.
#
# Seen, Linux x86-64, Python 3.11:
#   1 / (x + 1e-07): Add, Reciprocal
#   1 / (x + 1e-08): Identity, Reciprocal
#   1 / (x + 1e-14): Identity, Reciprocal
#   1 / max(x, 1e-14): Max, Reciprocal
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "onnxscript==0.7.2" "onnx==1.23.2" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from onnxscript.rewriter import rewrite


def left(operator: str, epsilon: float) -> str:
    info = helper.make_tensor_value_info
    nodes = [helper.make_node(operator, ["x", "epsilon"], ["safe"]), helper.make_node("Reciprocal", ["safe"], ["y"])]
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, [1])], [info("y", TensorProto.FLOAT, [1])],
        [numpy_helper.from_array(np.array(epsilon, np.float32), "epsilon")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    return ", ".join(node.op_type for node in rewrite(model).graph.node)


found = [left("Add", epsilon) for epsilon in (1e-7, 1e-8, 1e-14)]
for epsilon, said in zip((1e-7, 1e-8, 1e-14), found):
    print(f"1 / (x + {epsilon}): {said}")
print(f"1 / max(x, 1e-14): {(most := left('Max', 1e-14))}")
sys.exit(found != ["Add, Reciprocal", *["Identity, Reciprocal"] * 2] or most != "Max, Reciprocal")
PY
"$folder/venv/bin/python" "$folder/show.py"
