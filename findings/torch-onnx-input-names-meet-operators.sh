#!/usr/bin/env bash
# PyTorch 2.13.0, onnxscript 0.7.2: torch.onnx.export gives inputs the names of `input_names` after it has named the results within the graph
# by their operators, and does not look whether one is taken. An input that is called "cos", as rotary angles often are, and a cosine in
# the model make a graph with two values of one name: the export reports success, onnx.checker (1.23.2) and ONNX Runtime (1.31.1)
# refuse the file. Where forward itself calls its argument so, the tracer numbers the result, and all is well.
#
# Seen, Linux x86-64, Python 3.11:
#   input_names theta, angle: checker fine, y = [3.0, 3.0]
#   input_names theta, cos: checker refuses, 'cos' has been used as output names multiple times
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "onnx==1.23.2" "onnxscript==0.7.2" "onnxruntime==1.31.1" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import logging
import sys
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)


class Turned(torch.nn.Module):
    def forward(self, theta: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
        return 2 * theta.cos() + angle


def tried(*names: str) -> str:
    given = (torch.zeros(2), torch.ones(2))
    program = torch.onnx.export(Turned(), given, input_names=list(names), output_names=["y"], dynamo=True, verbose=False)
    model = program.model_proto
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        said = str(error)
        return "checker refuses, " + said[said.index("'cos'") : said.index("multiple times") + len("multiple times")]
    feeds = dict(zip(names, (np.zeros(2, np.float32), np.ones(2, np.float32))))
    y = ort.InferenceSession(model.SerializeToString()).run(None, feeds)[0]
    return f"checker fine, y = {y.tolist()}"


found = {names: tried(*names) for names in (("theta", "angle"), ("theta", "cos"))}
for names, said in found.items():
    print(f"input_names {', '.join(names)}: {said}")
wanted = ["checker fine, y = [3.0, 3.0]", "checker refuses, 'cos' has been used as output names multiple times"]
sys.exit(list(found.values()) != wanted)
PY
"$folder/venv/bin/python" "$folder/show.py"
