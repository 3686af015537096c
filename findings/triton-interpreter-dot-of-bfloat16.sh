#!/usr/bin/env bash
# Triton 3.9.0's interpreter (TRITON_INTERPRET=1): tl.dot of bfloat16 operands multiplies their bits, read as 16-bit whole numbers.
# NumPy has no bfloat16, so the interpreter keeps such tensors as uint16, and its dot is a product of those arrays. Sums and products
# of elements are converted before, and dots of float16 and float32 are right. Casting both operands to float32 before the dot gives
# the right product, which is exact for products of two bfloat16 numbers.
#
# Seen, Linux x86-64, Python 3.11, ones (16, 16) times ones (16, 16), the first number of the product:
#   float32: 16; float16: 16; bfloat16: 4228120576, which is 16 * 0x3F80 * 0x3F80; bfloat16 cast to float32: 16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "triton==3.9.0" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def product(a, b, out, CAST: tl.constexpr):
    places = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    left, right = tl.load(a + places), tl.load(b + places)
    if CAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    tl.store(out + places, tl.dot(left, right))


def first(dtype: torch.dtype, cast: bool = False) -> float:
    ones, out = torch.ones(16, 16, dtype=dtype), torch.zeros(16, 16)
    product[(1,)](ones, ones, out, CAST=cast)
    return float(out[0, 0])


found = [first(torch.float32), first(torch.float16), first(torch.bfloat16), first(torch.bfloat16, cast=True)]
print("float32: {:.0f}; float16: {:.0f}; bfloat16: {:.0f}; bfloat16 cast to float32: {:.0f}".format(*found))
sys.exit(not (found[0] == found[1] == found[3] == 16 and found[2] != 16))
PY
TRITON_INTERPRET=1 "$folder/venv/bin/python" "$folder/show.py"
