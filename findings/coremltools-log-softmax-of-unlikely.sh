#!/usr/bin/env bash
# coremltools 9.0 with PyTorch 2.13.0: log_softmax converts to the logarithm of a softmax. With compute precision FLOAT16, which is
# the default, both are float16: a probability below 2^-25 is rounded to 0, so that the log-probability of an unlikely token is
# -inf, where PyTorch's own log_softmax in float16 has a number. What compares two predictions by their log-probabilities, such as
# a Kullback-Leibler divergence, then goes wrong. x - max, less the logarithm of the sum of its exponentials, converts as it is written.
#
# Seen, Linux x86-64, Python 3.11, logits 0, -1, -17, -25:
#   operators: softmax, log in float16; its arithmetic: -0.3135 -1.312 -16.64 -inf; PyTorch in float16: -0.3135 -1.313 -17.31 -25.31
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "coremltools==9.0" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import coremltools as ct
import numpy as np
import torch
from coremltools.converters.mil.mil import types

LOGITS = torch.tensor([[0.0, -1.0, -17.0, -25.0]])


class LogSoftmax(torch.nn.Module):
    def forward(self, x):
        return torch.log_softmax(x, -1)


program = torch.export.export(LogSoftmax(), (LOGITS,)).run_decompositions({})
function = ct.convert(
    program, convert_to="milinternal", minimum_deployment_target=ct.target.iOS18, compute_precision=ct.precision.FLOAT16
).functions["main"]
kinds = [op.op_type for op in function.operations if op.op_type not in ("const", "cast")]
half = all(op.outputs[0].dtype == types.fp16 for op in function.operations if op.op_type in kinds)

# The same two steps, each rounded to float16 as a float16 operator's result is.
p = torch.softmax(LOGITS, -1).numpy().astype(np.float16)
with np.errstate(divide="ignore"):
    steps = np.log(p.astype(np.float32)).astype(np.float16)[0]
own = torch.log_softmax(LOGITS.half(), -1)[0]
print(
    f"operators: {', '.join(kinds)} in {'float16' if half else 'another type'};",
    "its arithmetic:", *(f"{x:.4g}" for x in steps), end="; ",
)
print("PyTorch in float16:", *(f"{float(x):.4g}" for x in own))
sys.exit(not (kinds == ["softmax", "log"] and half and np.isinf(steps[-1]) and bool(torch.isfinite(own).all())))
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
