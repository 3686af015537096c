"""The kernels of the routed experts, compiled and run by the ExecuTorch runtime: numbers, instruction sets, compilers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_one_line, require_executorch
from later import later

from rmse_edge.errors import UserError
from rmse_edge.layers.experts import NO_CAPS, gathered_experts, select
from rmse_edge.quantize import Format
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes.engines import kernels

executorch_ops = later("rmse_edge.export.executorch.ops")

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

require_executorch()

# bits, width, expert width; the wider ones have soft caps
KERNEL_CASES = [(32, 64, 32), (32, 96, 32), (8, 64, 32), (4, 64, 32), (4, 96, 64), (8, 160, 96)]


class Experts(torch.nn.Module):
    """The operator alone, with its weights as constants."""

    def __init__(self, bits: int, width: int, hidden: int) -> None:
        super().__init__()
        self.draw = torch.Generator().manual_seed(bits)
        self.bits, self.caps = bits, NO_CAPS if width == 64 else (1.5, 2.0)
        self.up, self.down = (self._random(12, *shape) for shape in ((2 * hidden, width), (width, hidden)))
        self.bias = torch.nn.Buffer(self._random(12))
        if bits == 32:
            self.weights = [torch.nn.Buffer(self.up), torch.nn.Buffer(self.down)]
            self.names = ("a", "b")
        else:
            fmt = Format(bits, 32 if bits == 4 else None)
            both = [round_to_nearest(w, fmt) for w in (self.up, self.down)]
            self.up, self.down = (q.dequantize() for q in both)
            self.weights = [t for q in both for t in (executorch_ops.stored_codes(q), q.scales.to(torch.bfloat16))]
            self.names = ("a", "as_", "b", "bs")
        for name, weight in zip(self.names, self.weights):
            self.register_buffer(name, weight)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw) * 0.3

    def forward(self, x: torch.Tensor, logits: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        weights = [getattr(self, name) for name in self.names]
        operator = torch.ops.rmse_edge.sparse_experts if self.bits == 32 else torch.ops.rmse_edge.quantized_experts
        return operator(x, logits, logits + self.bias, active, *weights, 3, *self.caps)


def kernel_program(folder: Path, case: tuple[int, int, int]) -> tuple[Path, Experts, list[torch.Tensor]]:
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    assert executorch_ops.OUT_VARIANTS  # which are known from its import on
    module = Experts(*case).eval()
    draw = torch.Generator().manual_seed(7)
    inputs = [torch.randn(9, case[1], generator=draw), torch.randn(9, 12, generator=draw), torch.arange(9) % 3 != 1]
    config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    program = to_edge(torch.export.export(module, tuple(inputs), strict=False)).to_executorch(config)
    path = folder / f"{case[0]}-{case[1]}.pte"
    path.write_bytes(program.buffer)
    return path, module, inputs


RUN_KERNEL = """
import sys, torch
from rmse_edge.runtimes.engines.kernels import bindings, load_kernels

load_kernels()
for path in sys.argv[1:]:
    inputs = torch.load(path + ".inputs")
    torch.save(bindings()._load_program(path).load_method("forward")(inputs)[0], path + ".out")
print(load_kernels().rmse_instruction_set().decode())
"""


@pytest.fixture(scope="module")
def kernels_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[int, int, int], Any]]:
    """Every case through the runtime, with the processor's own instructions and in plain C++."""
    folder = tmp_path_factory.mktemp("kernels")
    made = {case: kernel_program(folder, case) for case in KERNEL_CASES}
    for path, _, inputs in made.values():
        torch.save(inputs, f"{path}.inputs")
    found: dict[str, dict[tuple[int, int, int], Any]] = {}
    for way in ("", "portable"):
        environment = os.environ | {"RMSE_PRODUCTS": way}
        command = [sys.executable, "-c", RUN_KERNEL, *(str(path) for path, _, _ in made.values())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert way != "portable" or done.stdout.split()[-1] == "portable"
        found[way] = {case: (torch.load(f"{path}.out"), made[case]) for case, (path, _, _) in made.items()}
    return found


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_kernels_agree_with_pytorch(kernels_run: dict[str, dict[Any, Any]], case: tuple[int, int, int]) -> None:
    """Selection with bias, weights without it, SwiGLU, stopped rows; int8 and int4 within what rounding activations does."""
    out, (_, module, (x, logits, active)) = kernels_run[""][case]
    expected = gathered_experts(x, select(logits, module.bias, 3), module.up, module.down, module.caps)
    assert (out[~active] == 0).all()
    difference = (out - expected)[active].square().mean().sqrt() / expected[active].square().mean().sqrt()
    assert difference < (1e-6 if case[0] == 32 else 0.015)


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_operator_itself_computes_what_its_integers_stand_for(case: tuple[int, int, int]) -> None:
    """In PyTorch, with float activations."""
    module = Experts(*case).eval()
    x, logits = torch.randn(5, case[1]), torch.randn(5, 12)
    expected = gathered_experts(x, select(logits, module.bias, 3), module.up, module.down, module.caps)
    torch.testing.assert_close(module(x, logits, torch.ones(5, dtype=torch.bool)), expected)


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_all_instruction_sets_give_the_same_bits(kernels_run: dict[str, dict[Any, Any]], case: Any) -> None:
    assert torch.equal(kernels_run[""][case][0], kernels_run["portable"][case][0])


def test_without_a_compiler_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RMSE_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError) as caught:
        kernels.compiled()
    assert_one_line(str(caught.value), "C++ compiler", "no-such-compiler", "set CXX")
    monkeypatch.setenv("CXX", "false")  # a compiler that fails
    with pytest.raises(UserError) as caught:
        kernels.compiled()
    assert_one_line(str(caught.value), "false cannot compile")
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RMSE_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError) as caught:
        kernels.compiled()
    assert_one_line(str(caught.value), "cannot be written", "RMSE_EDGE_CACHE")
