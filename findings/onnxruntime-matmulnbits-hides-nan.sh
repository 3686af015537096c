#!/usr/bin/env bash
# ONNX Runtime 1.31.1, x86-64 CPU: MatMulNBits with accuracy_level 4, which rounds activations to int8, gives finite numbers for a row
# that has a NaN: the NaN counts as some small number, and nothing behind the operator can tell. accuracy_level 0 gives NaN. So a
# model that has gone wrong in one layer goes on writing with plausible numbers. An infinity becomes NaN at level 4, and stays at level 0.
#
# Seen, Linux x86-64, Python 3.11, 64 ones times weights of one, the first replaced:
#   accuracy_level 0: one 64, NaN nan, infinity inf
#   accuracy_level 4: one 64, NaN finite, infinity nan
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

INPUTS, OUTPUTS, BLOCK = 64, 4, 32
info = helper.make_tensor_value_info


def product(level: int, first: float) -> str:
    node = helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft", K=INPUTS, N=OUTPUTS, bits=4,
        block_size=BLOCK, accuracy_level=level,
    )  # fmt: skip
    codes = np.full((OUTPUTS, INPUTS // BLOCK, BLOCK // 2), 0x99, np.uint8)  # two codes of 9, which is 8 for zero and 1
    scales = np.ones((OUTPUTS, INPUTS // BLOCK), np.float32)
    graph = helper.make_graph(
        [node], "g", [info("x", TensorProto.FLOAT, [1, INPUTS])], [info("y", TensorProto.FLOAT, [1, OUTPUTS])],
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = session.run(None, {"x": np.array([[first] + [1.0] * (INPUTS - 1)], np.float32)})[0][0, 0]
    return f"{y:.0f}" if first == 1 or not np.isfinite(y) else "finite"


found = [[product(level, first) for first in (1.0, np.nan, np.inf)] for level in (0, 4)]
for level, (one, nan, infinity) in zip((0, 4), found):
    print(f"accuracy_level {level}: one {one}, NaN {nan}, infinity {infinity}")
sys.exit(found != [["64", "nan", "inf"], ["64", "finite", "nan"]])
PY
"$folder/venv/bin/python" "$folder/show.py"
