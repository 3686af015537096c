#!/usr/bin/env bash
# ONNX Runtime's contrib operators gain attributes without a new version: QMoE is com.microsoft version 1 in 1.29.0 and in 1.31.1, but
# `accuracy_level` is known to the second alone. A graph that spells out its default, 0, does not load in the first, which is what npm
# has for Android; without the attribute both give the same numbers. No opset import tells the two kinds of graph apart.
#
# Seen, Linux x86-64, Python 3.11:
#   1.29.0: without it 1.0; with it refused: accuracy_level
#   1.31.1: without it 1.0; with it 1.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/make.py" <<'PY'
import sys

import numpy as np
from onnx import TensorProto, helper, numpy_helper

D = 32
info = helper.make_tensor_value_info


def model(**attributes: int) -> bytes:
    """Two experts whose int4 codes are all 9, one above zero, with scale 1, of two channels in the middle."""
    codes = np.full((2, 4, D // 2), 0x99, np.uint8), np.full((2, D, 1), 0x99, np.uint8)
    scales = np.ones((2, 4), np.float32), np.ones((2, D), np.float32)
    node = helper.make_node(
        "QMoE", ["x", "scores", "up", "up_scales", "", "down", "down_scales"], ["y"], domain="com.microsoft", k=1,
        activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1, activation_alpha=1.0, activation_beta=0.0,
        expert_weight_bits=4, **attributes,
    )  # fmt: skip
    weights = [("up", codes[0]), ("up_scales", scales[0]), ("down", codes[1]), ("down_scales", scales[1])]
    graph = helper.make_graph(
        [node], "q", [info("x", TensorProto.FLOAT, [1, D]), info("scores", TensorProto.FLOAT, [1, 2])],
        [info("y", TensorProto.FLOAT, [1, D])], [numpy_helper.from_array(a, n) for n, a in weights],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


for name, attributes in (("without", {}), ("with", {"accuracy_level": 0})):
    open(f"{sys.argv[1]}/{name}.onnx", "wb").write(model(**attributes))
PY
cat > "$folder/show.py" <<'PY'
import sys

import numpy as np
import onnxruntime as ort

x = np.zeros((1, 32), np.float32)
x[0, 0] = 1.0
found = []
for name in ("without", "with"):
    try:
        session = ort.InferenceSession(f"{sys.argv[1]}/{name}.onnx", providers=["CPUExecutionProvider"])
        found.append(session.run(None, {"x": x, "scores": np.array([[1, 0]], np.float32)})[0])
    except Exception as error:
        found.append(None)
        refused = str(error)
silu = 1 / (1 + np.exp(-1))
numbers = [None if y is None else round(float(y[0, 0] / silu / 2), 3) for y in found]
old = ort.__version__ == "1.29.0"
said = "refused: accuracy_level" if numbers[1] is None and "accuracy_level" in refused else numbers[1]
print(f"{ort.__version__}: without it {numbers[0]}; with it {said}")
sys.exit(not (numbers[0] == 1.0 and said == ("refused: accuracy_level" if old else 1.0)))
PY
for version in 1.29.0 1.31.1; do
    "${PYTHON:-python3}" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet --disable-pip-version-check "onnx==1.23.2" "onnxruntime==$version" "numpy>=2,<3"
    [ -e "$folder/with.onnx" ] || "$folder/$version/bin/python" "$folder/make.py" "$folder"
    "$folder/$version/bin/python" "$folder/show.py" "$folder"
done
