#!/usr/bin/env bash
# ONNX Runtime 1.31.1: the stacked ("scan") outputs of a Loop that runs no iteration do not have the shape that the same output has after
# one. Dimensions that the body does not state as numbers become 0, so that a stack of (rows, width) matrices is (0, 0, 0) rather than
# (0, rows, width); where the body states no shape, the rank is lost as well, with a warning. What follows the Loop and reads these axes
# then fails, or computes with nothing, in just that case.
#
# Seen, Linux x86-64, Python 3.11, a carried (2, 3) matrix that every iteration stacks:
#   body says rows, width: no iterations (0, 0, 0), two (2, 2, 3)
#   body says 2, 3: no iterations (0, 2, 3), two (2, 2, 3)
#   body says nothing: no iterations (0,), two (2, 2, 3)
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

onnxruntime.set_default_logger_severity(3)  # the warning is not what is shown here
info = helper.make_tensor_value_info


def stacked(shape: list[int | str] | None, iterations: int) -> tuple[int, ...]:
    """The shape of what a Loop stacks, whose body says this of the matrix."""
    body = helper.make_graph(
        [helper.make_node("Identity", [a], [b]) for a, b in (("go", "next_go"), ("h", "next_h"), ("h", "emitted"))],
        "body",
        [info("k", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("h", TensorProto.FLOAT, shape)],
        [info("next_go", TensorProto.BOOL, []), *(info(n, TensorProto.FLOAT, shape) for n in ("next_h", "emitted"))],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "yes", "x"], ["last", "stack"], body=body)], "g",
        [info("n", TensorProto.INT64, []), info("x", TensorProto.FLOAT, [2, 3])],
        [info("stack", TensorProto.FLOAT, None)], [numpy_helper.from_array(np.array(True), "yes")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"n": np.array(iterations), "x": np.ones((2, 3), np.float32)})[0].shape


found = []
for said, shape in (("rows, width", ["rows", "width"]), ("2, 3", [2, 3]), ("nothing", None)):
    found.append((none := stacked(shape, 0), two := stacked(shape, 2)))
    print(f"body says {said}: no iterations {none}, two {two}")
sys.exit(found != [((0, 0, 0), (2, 2, 3)), ((0, 2, 3), (2, 2, 3)), ((0,), (2, 2, 3))])
PY
"$folder/venv/bin/python" "$folder/show.py"
