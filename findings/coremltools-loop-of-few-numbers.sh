#!/usr/bin/env bash
# coremltools 9.0: a while_loop does not build if its body ends a carried value with a concat of few numbers. Value inference of concat
# makes up a symbol for each number of an input that has ten or fewer, others each time the body is built, and the loop then
# compares the body's made-up value with that of its input, of which there is none. The message says that None is not None.
#
# Seen, Linux x86-64, Python 3.11:
#   10 numbers: Block output concat_1: None is not equal to block input x_x0: None after value changes; 11 numbers: builds
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "coremltools==9.0" "numpy>=2,<3"
cat > "$folder/show.py" <<'PY'
import sys

import coremltools as ct
import numpy as np
from coremltools.converters.mil.mil import Builder as mb
from coremltools.converters.mil.mil import types


def outcome(count: int) -> str:
    def build():
        @mb.program(input_specs=[mb.TensorSpec((count,), types.fp32)], opset_version=ct.target.iOS18)
        def looped(x):
            def body(k, x):
                return mb.add(x=k, y=np.float32(1)), mb.concat(values=[mb.mul(x=x, y=np.float32(2))], axis=0)

            first = mb.reduce_sum(x=mb.mul(x=x, y=np.float32(0)))
            return mb.while_loop(_cond=lambda k, x: mb.less(x=k, y=np.float32(3)), _body=body, loop_vars=(first, x))[1]

    try:
        build()
    except ValueError as error:
        return str(error)
    return "builds"


found = [outcome(10), outcome(11)]
print(f"10 numbers: {found[0]}; 11 numbers: {found[1]}")
sys.exit("None is not equal to" not in found[0] or found[1] != "builds")
PY
"$folder/venv/bin/python" "$folder/show.py" 2>/dev/null
