#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: Range of floats adds its step to the element before. The operator's text says start + i * delta, and so do
# NumPy and ONNX's own reference evaluator. The rounding of every sum stays in all that follow: at 100,000 elements the last is off by
# 0.67, which is 67 steps. Positions or angles that a graph makes by a float Range drift with the length of the text.
#
# Seen, Linux x86-64, Python 3.11:
#   Range(0, 1000, 0.01), element 100000: onnxruntime 1000.665, reference 1000.000
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "onnxruntime==1.31.1" "onnx==1.23.2" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

values = {"start": 0, "limit": 1000, "delta": 0.01}
graph = helper.make_graph(
    [helper.make_node("Range", list(values), ["y"])], "g", [],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
    [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in values.items()],
)  # fmt: skip
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
ours, reference = session.run(None, {})[0][100_000], ReferenceEvaluator(model).run(None, {})[0][100_000]
print(f"Range(0, 1000, 0.01), element 100000: onnxruntime {ours:.3f}, reference {reference:.3f}")
sys.exit(not (f"{ours:.3f}" == "1000.665" and abs(reference - 1000) < 1e-3))
PY
"$folder/venv/bin/python" "$folder/show.py"
