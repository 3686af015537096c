#!/usr/bin/env bash
# coremltools 9.0 with PyTorch 2.13.0: x.clamp_min(0.0) of a float tensor converts, x.clamp_min(0) ends in a bare AssertionError. An
# exported program keeps the bound as the Python number that was written, and the converter makes an int32 constant of it, which
# its clamp_min compares with the input's type. clamp(min=0) converts, as it is another operator.
#
# Seen, Linux x86-64, Python 3.11:
#   clamp_min(0.0): converts; clamp_min(0): AssertionError; clamp(min=0): converts
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "coremltools==9.0" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import coremltools as ct
import torch


def outcome(clamp) -> str:
    class Clamped(torch.nn.Module):
        def forward(self, x):
            return clamp(x)

    program = torch.export.export(Clamped(), (torch.tensor([-1.0, 2.0]),), strict=False).run_decompositions({})
    try:
        ct.convert(program, convert_to="milinternal")
    except AssertionError:
        return "AssertionError"
    return "converts"


found = [outcome(lambda x: x.clamp_min(0.0)), outcome(lambda x: x.clamp_min(0)), outcome(lambda x: x.clamp(min=0))]
print(f"clamp_min(0.0): {found[0]}; clamp_min(0): {found[1]}; clamp(min=0): {found[2]}")
sys.exit(found != ["converts", "AssertionError", "converts"])
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
