#!/usr/bin/env bash
# ONNX Runtime 1.31.1, CPU: TopK with a NaN in its input. Neither is NaN the largest, as NumPy and PyTorch sort it, nor is it left out:
# one that lies among the first k elements makes TopK lose larger finite numbers, one behind them is passed over without a word. So a
# router that takes its experts from a row with one NaN may take the worst. PyTorch 2.13's torch.topk gives nan, 5, 4 for all rows.
#
# Seen, Linux x86-64, Python 3.11, the 3 largest of each row:
#   nan 1 2 3 4 5 -> 2 1 nan
#   1 2 nan 5 4 3 -> 2 1 nan
#   5 nan 4 3 2 1 -> nan 5 4
#   5 4 nan 3 2 1 -> 5 4 nan
#   1 2 3 4 5 nan -> 5 4 3
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

SEEN = {
    "nan 1 2 3 4 5": "2 1 nan",
    "1 2 nan 5 4 3": "2 1 nan",
    "5 nan 4 3 2 1": "nan 5 4",
    "5 4 nan 3 2 1": "5 4 nan",
    "1 2 3 4 5 nan": "5 4 3",
}
info = helper.make_tensor_value_info
graph = helper.make_graph(
    [helper.make_node("TopK", ["x", "k"], ["largest", "places"])], "g", [info("x", TensorProto.FLOAT, [6])],
    [info("largest", TensorProto.FLOAT, [3])], [numpy_helper.from_array(np.array([3]), "k")],
)  # fmt: skip
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
found = {}
for row in SEEN:
    (largest,) = session.run(None, {"x": np.array(row.split(), np.float32)})
    found[row] = " ".join(f"{value:g}" for value in largest)
    print(f"{row} -> {found[row]}")
sys.exit(found != SEEN)
PY
"$folder/venv/bin/python" "$folder/show.py"
