#!/usr/bin/env bash
# PyTorch 2.13.0: torch.export takes a while_loop whose first carry holds one tensor twice (two accumulators that begin as the same
# zeros), and the exported program runs and is right. run_decompositions, which torch.onnx.export and other lowerings begin with,
# then refuses it: "cond_fn might be aliasing the input or the output!", though neither function returns what it was given. A clone of
# the second zeros is enough.
#
# Seen, Linux x86-64, Python 3.11:
#   a tensor each: export runs, [9.0, 9.0]; run_decompositions: fine
#   one for both: export runs, [9.0, 9.0]; run_decompositions: cond_fn might be aliasing the input or the output!
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import torch
from torch._higher_order_ops.while_loop import while_loop


class Loop(torch.nn.Module):
    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.apart = apart

    def forward(self, x):
        zeros = torch.zeros_like(x)
        second = zeros.clone() if self.apart else zeros
        carry = (torch.tensor(0), zeros, second)
        _, a, b = while_loop(lambda k, a, b: k < 3, lambda k, a, b: (k + 1, a + x, b + 2 * x), carry)
        return a + b


def outcome(apart: bool) -> str:
    program = torch.export.export(Loop(apart), (torch.ones(2),), strict=False)
    result = program.module()(torch.ones(2)).tolist()
    try:
        program.run_decompositions({})
        said = "fine"
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    return f"export runs, {result}; run_decompositions: {said}"


each, both = outcome(True), outcome(False)
print(f"a tensor each: {each}")
print(f"one for both: {both}")
right = "export runs, [9.0, 9.0]; run_decompositions: "
sys.exit(not (each == right + "fine" and both == right + "cond_fn might be aliasing the input or the output!"))
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
