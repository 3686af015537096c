#!/usr/bin/env bash
# ExecuTorch 1.5.1, portable kernels: `x % y` of int64 tensors has the sign of x, as in C, where PyTorch's has the sign of y. The
# exported graph has aten.remainder, which is defined by floor division; the same program's `x // y` rounds down, so the two do not
# fit each other. Floats follow PyTorch.
#
# Seen, Linux x86-64, Python 3.11:
#   PyTorch     int64 % 5: [3, 4, 2, 0]  int64 // 5: [-2, -1, 1, -1]  int64 % tensor: [3, 4, 2, 0]  float % 5: [3, 4, 2, 0]
#   ExecuTorch  int64 % 5: [-2, -1, 2, 0]  int64 // 5: [-2, -1, 1, -1]  int64 % tensor: [-2, -1, 2, 0]  float % 5: [3, 4, 2, 0]
# Valid input: a program exported by the public API, without a delegate. Positions of a ring of slots are computed so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "executorch==1.5.1" "setuptools<81"
cat > "$folder/show.py" <<'PY'
import sys

import torch
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime


class Remainders(torch.nn.Module):
    def forward(self, x: torch.Tensor, five: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x % 5, x // 5, x % five, x.float() % 5


def shown(values: list[torch.Tensor]) -> str:
    names = ("int64 % 5", "int64 // 5", "int64 % tensor", "float % 5")
    return "  ".join(f"{name}: {[int(v) for v in value]}" for name, value in zip(names, values))


given = (torch.tensor([-7, -1, 7, -5]), torch.tensor([5, 5, 5, 5]))
program = to_edge_transform_and_lower(torch.export.export(Remainders(), given)).to_executorch()
there = Runtime.get().load_program(program.buffer).load_method("forward").execute(list(given))
here = Remainders()(*given)
print("PyTorch    ", shown(here))
print("ExecuTorch ", shown(there))
same = [a.tolist() == b.tolist() for a, b in zip(here, there)]
sys.exit(not (same == [False, True, False, True] and there[0].tolist() == [-2, -1, 2, 0]))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py" 2> /dev/null
