"""The kernels of runtimes/native, compiled and run by the ExecuTorch runtime: numbers, instruction sets, compilers."""

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
from rmse_edge.layers.attend import attention
from rmse_edge.layers.attention import rotary
from rmse_edge.layers.experts import NO_CAPS, gathered_experts, select
from rmse_edge.layers.masks import MASKED
from rmse_edge.quantize import Format
from rmse_edge.quantize.tensors import round_to_nearest
from rmse_edge.runtimes.engines import kernels

operators = later("rmse_edge.export.executorch.operators")
tiles = later("rmse_edge.export.executorch.tiles")

pytestmark = [pytest.mark.executorch, pytest.mark.native, pytest.mark.slow]

require_executorch()

# bits, width, expert width; the wider ones have soft caps
EXPERTS = [(32, 64, 32), (32, 96, 32), (8, 64, 32), (4, 64, 32), (4, 96, 64), (8, 160, 96)]
# bits, inputs, outputs, group, rows; of outputs that fill no tile, and of inputs that fill no block
LINEAR = [
    (4, 64, 48, 32, 1), (4, 128, 37, 64, 1), (4, 96, 80, 32, 13), (4, 64, 5, 32, 3),
    (8, 64, 48, None, 1), (8, 50, 37, None, 1), (8, 96, 80, None, 13), (8, 33, 5, None, 3),
]  # fmt: skip
# heads, groups, rows, slots, channels, whether there are biases and sinks; 0 slots: there is nothing before the call. In calls
# of more than ten rows some are not active.
ATTENTION = [
    (6, 2, 1, 40, 64, False), (4, 4, 9, 33, 48, True), (4, 2, 17, 0, 32, False), (3, 1, 2, 16, 20, True),
    (2, 2, 1, 70, 80, True), (4, 2, 1, 48, 32, False), (4, 2, 20, 33, 32, True),
]  # fmt: skip
PARTS = [
    ("norm", 70), ("norm of some", 70), ("gated", 70), ("swiglu", 70), ("float", 70), ("float of some", 70),
    ("rotary", 12), ("where", 33),
]  # fmt: skip
WAYS = ("", "avx2", "neon", "portable")  # RMSE_PRODUCTS; those of another processor are plain C++


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
            self.names, self.hidden = ("a", "b"), ()
        else:
            fmt = Format(bits, 32 if bits == 4 else None)
            both = [round_to_nearest(w, fmt) for w in (self.up, self.down)]
            self.up, self.down = (q.dequantize() for q in both)
            places = torch.randperm(12, generator=self.draw)  # where the experts lie
            self.weights = [t[places.argsort()] for q in both for t in tiles.tiles_of(q)]
            self.places = torch.nn.Buffer(places)
            self.hidden = (hidden,)
            self.names = ("a", "as_", "b", "bs")
        for name, weight in zip(self.names, self.weights):
            self.register_buffer(name, weight)

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.draw) * 0.3

    def forward(self, x: torch.Tensor, logits: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
        weights = [getattr(self, name) for name in self.names]
        operator = torch.ops.rmse_edge.sparse_experts if self.bits == 32 else torch.ops.rmse_edge.quantized_experts
        places = () if self.bits == 32 else (self.places,)
        return operator(x, logits, logits + self.bias, active, *weights, *self.hidden, 3, *self.caps, *places)


class Linear(torch.nn.Module):
    """A quantised linear layer alone, with rows that are not active where it has more than one."""

    def __init__(self, bits: int, inputs: int, outputs: int, group: int | None, rows: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(bits + outputs)
        self.q = round_to_nearest(torch.randn(outputs, inputs, generator=draw), Format(bits, group))
        self.outputs = outputs
        self.bias = torch.nn.Buffer(torch.randn(outputs, generator=draw)) if outputs % 2 else None
        for name, tensor in tiles.tiles_of(self.q)._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        return operators.quantized_linear(x, self.codes, self.scales, self.bias, active, self.outputs)


class Attends(torch.nn.Module):
    """The attention operator alone, on the tensors among its arguments."""

    def __init__(self, given: list[torch.Tensor | None], first: int) -> None:
        super().__init__()
        self.first = first
        self.there = [tensor is not None for tensor in given]

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        left = iter(tensors)
        return attention(*(next(left) if there else None for there in self.there), self.first)


class Part(torch.nn.Module):
    """One of the smaller operators alone."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__()
        self.name, self.width = name, width
        self.weight = torch.nn.Buffer(torch.randn(width, generator=torch.Generator().manual_seed(1)))
        self.matrix = torch.nn.Buffer(torch.randn(37, width, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.name.startswith("norm"):
            return operators.rms_norm(x, self.weight, 1e-6, y[..., 0] > 0 if self.name.endswith("some") else None)
        if self.name == "gated":
            return operators.gated(x, y)
        if self.name == "swiglu":
            return operators.swiglu(x)
        if self.name.startswith("float"):  # a flag is of eleven rows
            return operators.float_linear(
                x, self.matrix, None, y[..., 0, 0] > 0 if self.name.endswith("some") else None
            )
        if self.name == "rotary":
            return rotary(x, *y[:, :1].chunk(2, -1))
        return operators.where_rows(x[..., :1] > 0, x, y)


def kernel_program(path: Path, module: torch.nn.Module, inputs: list[torch.Tensor]) -> None:
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    assert operators.OUT_VARIANTS  # which are known from its import on
    config = ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False))
    program = to_edge(torch.export.export(module.eval(), tuple(inputs), strict=False)).to_executorch(config)
    path.write_bytes(program.buffer)
    torch.save(inputs, f"{path}.inputs")


def made_up(case: tuple[Any, ...]) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """The module of a case, and what it is given."""
    draw = torch.Generator().manual_seed(7)
    if case in EXPERTS:
        inputs = [torch.randn(9, case[1], generator=draw), torch.randn(9, 12, generator=draw), torch.arange(9) % 3 != 1]
        return Experts(*case), inputs
    if case in PARTS:
        return Part(*case), [torch.randn(2, 3, 11, case[1], generator=draw) * 4 for _ in range(2)]
    if case in ATTENTION:
        heads, groups, rows, slots, dims, more = case
        own = [torch.randn(1, groups, rows, dims, generator=draw) for _ in range(2)]
        before, behind = (2, 1) if more and slots else (0, 0)  # groups of other layers in the same cache
        all_of_them = 1, before + groups + behind, slots, dims
        past = [torch.randn(all_of_them, generator=draw) for _ in range(2)] if slots else [None, None]
        # Some slots are seen by nobody, others by some, and padding sees itself alone.
        hidden = MASKED * ((torch.rand(rows, slots, generator=draw) < 0.3) | (torch.arange(slots) // 16 == 1)).float()
        mask = MASKED * torch.ones(rows, rows).triu(1)
        biases = [torch.randn(1, heads, rows, n, generator=draw) if more else None for n in (rows, slots)]
        sinks = torch.randn(1, heads, rows, 1, generator=draw) if more else None
        masks = [mask[None, None], hidden[None, None] if slots else None]
        query = torch.randn(1, heads, rows, dims, generator=draw)
        given = [query, *own, masks[0], biases[0], *past, masks[1], biases[1] if slots else None, sinks]
        given.append(torch.arange(rows) % 3 != 1 if rows > 10 else None)
        return Attends(given, before), [tensor for tensor in given if tensor is not None]
    rows = case[-1]
    x = torch.randn(1, rows, case[1], generator=draw) * torch.logspace(-3, 3, rows)[:, None]
    return Linear(*case), [x] if rows == 1 else [x, torch.arange(rows)[None] % 3 != 1]


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
def kernels_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[tuple[Any, ...], Any]]:
    """Every case through the runtime, with the processor's own instructions, with fewer of them, and in plain C++."""
    folder = tmp_path_factory.mktemp("kernels")
    made = {
        case: (folder / f"{i}.pte", *made_up(case)) for i, case in enumerate([*EXPERTS, *LINEAR, *ATTENTION, *PARTS])
    }
    for part in made.values():
        kernel_program(*part)
    found: dict[str, dict[tuple[Any, ...], Any]] = {}
    for way in WAYS:
        environment = os.environ | {"RMSE_PRODUCTS": way}
        command = [sys.executable, "-c", RUN_KERNEL, *(str(path) for path, _, _ in made.values())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert way == "" or done.stdout.split()[-1] in (way, "portable")
        found[way] = {case: (torch.load(f"{part[0]}.out"), *part[1:]) for case, part in made.items()}
    return found


@pytest.mark.parametrize("case", EXPERTS)
def test_kernels_agree_with_pytorch(kernels_run: dict[str, dict[Any, Any]], case: tuple[int, int, int]) -> None:
    """Selection with bias, weights without it, SwiGLU, stopped rows; int8 and int4 within what rounding activations does."""
    out, module, (x, logits, active) = kernels_run[""][case]
    expected = gathered_experts(x, select(logits, module.bias, 3), module.up, module.down, module.caps)
    assert (out[~active] == 0).all()
    difference = (out - expected)[active].square().mean().sqrt() / expected[active].square().mean().sqrt()
    assert difference < (1e-6 if case[0] == 32 else 0.015)


@pytest.mark.parametrize("case", EXPERTS)
def test_the_operator_itself_computes_what_its_integers_stand_for(case: tuple[int, int, int]) -> None:
    """In PyTorch, with float activations."""
    module = Experts(*case).eval()
    x, logits = torch.randn(5, case[1]), torch.randn(5, 12)
    expected = gathered_experts(x, select(logits, module.bias, 3), module.up, module.down, module.caps)
    torch.testing.assert_close(module(x, logits, torch.ones(5, dtype=torch.bool)), expected)


def rounded_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., K) rounded to int8 in blocks of 32, times weight (N, K), in float64."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % 32)).unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1, keepdim=True)
    values = (blocks * (127 / largest)).round().double() * (largest / 127).double()
    return values.flatten(-2)[..., : x.shape[-1]] @ weight.double().T


@pytest.mark.parametrize("case", LINEAR)
def test_linear_layers_round_activations_and_nothing_else(kernels_run: dict[str, dict[Any, Any]], case: Any) -> None:
    out, module, (x, *rest) = kernels_run[""][case]
    expected = rounded_product(x, module.q.dequantize())
    if module.bias is not None:
        expected = expected + module.bias
    if rest:
        assert (out[~rest[0]] == 0).all() and not rest[0].all()
        expected = torch.where(rest[0].unsqueeze(-1), expected, 0.0)
    difference = (out - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)
    assert out.shape == (*x.shape[:-1], case[2]) and (difference < 1e-6).all()
    floats = module(x, *rest)
    assert ((out - floats).norm(dim=-1) <= 0.015 * floats.norm(dim=-1)).all()


@pytest.mark.parametrize("case", [*ATTENTION, *PARTS])
def test_float_operators_agree_with_pytorch(kernels_run: dict[str, dict[Any, Any]], case: Any) -> None:
    out, module, inputs = kernels_run[""][case]
    if case in ATTENTION:
        expected = module(*(given.double() if given.is_floating_point() else given for given in inputs))
    else:
        expected = module(*inputs)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [*EXPERTS, *LINEAR, *ATTENTION, *PARTS])
@pytest.mark.parametrize("way", WAYS[1:])
def test_all_instruction_sets_give_the_same_bits(kernels_run: dict[str, dict[Any, Any]], way: str, case: Any) -> None:
    assert torch.equal(kernels_run[""][case][0], kernels_run[way][case][0])


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
