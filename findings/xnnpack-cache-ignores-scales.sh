#!/usr/bin/env bash
# ExecuTorch 1.5.1, XNNPACK's weight cache: two int8 linear layers whose weights have the same codes and different scales get one
# packed weight, so the second answers with the scales of the first. The cache names a packed weight by the SHA-256 of the bytes of
# its codes (and of its bias, where XNNPACK packs one: not for int8 rows). It is off by default and switched on by the backend option
# "weight_cache_enabled".
#
# Seen, Linux x86-64, Python 3.11:
#   cache off: ratio of the two layers' results 2.00 (their scales are 1 : 2)
#   cache on:  ratio of the two layers' results 1.00
# Valid input: a program exported by the public API, whose layers were quantised by torchao's own types. Needs g++.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check "torch==2.13.0" "executorch==1.5.1" "setuptools<81"
packages=$("$folder/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# The option can be set from C++ only.
cat > "$folder/option.cpp" <<'CPP'
#include <cstring>
#include <executorch/runtime/backend/interface.h>
#include <executorch/runtime/backend/options.h>
extern "C" int share(bool on) {
  executorch::runtime::BackendOption option{};
  std::strncpy(option.key, "weight_cache_enabled", sizeof option.key - 1);
  option.value = on;
  return static_cast<int>(executorch::runtime::set_option("XnnpackBackend", {&option, 1}));
}
CPP
et="$packages/executorch"
g++ -std=c++20 -shared -fPIC -DC10_USING_CUSTOM_GENERATED_MACROS -isystem "$et/include" \
    -isystem "$et/include/executorch/runtime/core/portable_type/c10" "$folder/option.cpp" -o "$folder/option.so" \
    -L "$et/lib" -lexecutorch -Wl,-rpath,"$et/lib"
cat > "$folder/show.py" <<'PY'
import ctypes
import sys

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.extension.pybindings.portable_lib import _load_for_executorch_from_buffer as load
from torch import nn
from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
    IntxUnpackedToInt8Tensor,
    IntxUnpackedToInt8TensorActivationQuantization,
)

torch.manual_seed(0)
codes = torch.randint(-127, 128, (32, 64), dtype=torch.int8)
scales = torch.rand(32, 1) + 0.5


def layer(scale: torch.Tensor) -> nn.Linear:
    made = nn.Linear(64, 32, bias=False)
    weight = IntxUnpackedToInt8Tensor(
        qdata=codes, scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int8), target_dtype=torch.int8,
        block_size=(1, 64), dtype=torch.float32,
        activation_quantization=IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.once, self.twice = layer(scales), layer(2 * scales)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.once(x), self.twice(x)


x = torch.randn(1, 64)
exported = torch.export.export(Two().eval(), (x,))
program = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
option = ctypes.CDLL(sys.argv[1])
ratios = []
for on in (False, True):
    option.share(ctypes.c_bool(on))
    once, twice = load(program.buffer).run_method("forward", (x,))
    ratios.append(float(twice.norm() / once.norm()))
    print(f"cache {'on' if on else 'off'}: ratio of the two layers' results {ratios[-1]:.2f}")
sys.exit(not (abs(ratios[0] - 2) < 0.01 and abs(ratios[1] - 1) < 0.01))
PY
"$folder/venv/bin/python" -W ignore "$folder/show.py" "$folder/option.so" 2> /dev/null
