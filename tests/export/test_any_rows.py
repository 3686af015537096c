"""Methods traced once for calls of any number of rows, and what is traced for each number by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line
from later import later
from torch import Tensor, nn

from rmse_edge.arch.rmse.model import RMSE
from rmse_edge.errors import ExportError
from rmse_edge.export import LoopProgram, trace
from rmse_edge.export.gate.methods import compare_methods
from rmse_edge.export.program import ROWS, at_rows, shared_signature, signature
from rmse_edge.export.targets import LowerOptions, get_target
from rmse_edge.loop.contract import LoopSpec, Tensors, TensorSpec
from rmse_edge.runtimes.engines.onnx import OnnxMethods

onnx = later("onnx")
onnx_passes = later("rmse_edge.export.onnx.passes")

pytestmark = [pytest.mark.onnx, pytest.mark.slow]

WIDTH, LOOPS, CHUNKS = 4, 5, (1, 8)
DIALS = {"max_loops": LOOPS, "min_loops": 1, "exit_threshold": 0.5}


class Rows(nn.Module):
    """The least that has rows: they are refined each by itself, and every iteration emits their state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.refine = nn.Linear(WIDTH, WIDTH)
        self.asked: list[int] = []  # what `spec` was called with

    def spec(self, chunk: int) -> LoopSpec:
        assert type(chunk) is int
        self.asked.append(chunk)
        return LoopSpec(
            chunk=chunk,
            max_loops=LOOPS,
            inputs=(TensorSpec("given", (1, chunk, WIDTH)),),
            prelude=(TensorSpec("x", (1, chunk, WIDTH)),),
            h=TensorSpec("h", (1, chunk, WIDTH)),
            active=TensorSpec("active", (1, chunk), torch.bool),
            emits=(TensorSpec("seen", (1, WIDTH, chunk)),),
            head=(TensorSpec("sum", (1, chunk)),),
            extra={"rest": ((TensorSpec("h", (1, chunk, WIDTH)),), (TensorSpec("first", (1, WIDTH)),))}
            if chunk > 1
            else {},
            dials=tuple(DIALS),
        )

    def prelude(self, tensors: Tensors) -> Tensors:
        return {"x": tensors["given"] * 2}

    def begin(self, tensors: Tensors) -> tuple[Tensors, Tensors]:
        return {"h": tensors["x"].clone(), "active": torch.ones_like(tensors["x"][..., 0], dtype=torch.bool)}, {}

    def step(self, k: Tensor, carry: Tensors, past: Tensors, fixed: Tensors, dials: Tensors) -> tuple[Tensors, Tensors]:
        h, active = carry["h"], carry["active"]
        new = torch.where(active[..., None], torch.tanh(self.refine(h) + fixed["x"]), h)
        stop = (new.sum(-1) >= dials["exit_threshold"]) & (k + 1 >= dials["min_loops"])
        return {"h": new, "active": active & ~stop}, {"seen": new.transpose(1, 2)}

    def head(self, h: Tensor) -> Tensors:
        return {"sum": h.sum(-1)}

    def rest(self, tensors: Tensors) -> Tensors:
        return {"first": tensors["h"][:, 0] * 1.0}

    def commit(self, tensors: Tensors) -> Tensors:
        raise NotImplementedError("nothing is left behind")


class Doubled(Rows):
    """A head whose output has two entries per row: its calls differ in more than rows."""

    def spec(self, chunk: int) -> LoopSpec:
        spec = super().spec(chunk)
        return LoopSpec(**(vars(spec) | {"head": (TensorSpec("sum", (1, 2 * chunk)),)}))

    def head(self, h: Tensor) -> Tensors:
        return {"sum": torch.cat([h.sum(-1)] * 2, -1)}


class OneMore(Rows):
    def head(self, h: Tensor) -> Tensors:
        return {"sum": torch.cat([h.sum(-1), h.new_zeros(1, 1)], -1)}


class OneSize(Rows):
    def head(self, h: Tensor) -> Tensors:
        return {"sum": h.new_zeros(1, CHUNKS[-1])}


def served(program: LoopProgram) -> dict[str, list[tuple[int, ...]]]:
    found: dict[str, list[tuple[int, ...]]] = {}
    for method in program.methods:
        found.setdefault(method.name, []).append(method.chunks)
    return found


def test_a_method_is_traced_once_for_calls_of_any_size() -> None:
    """What exists for calls of one size only is static; the model is never asked for a size that no call has."""
    model = Rows()
    told: list[str] = []
    program = trace(model, CHUNKS, told.append, any_rows=True)
    shared = {name: [CHUNKS] for name in ("prelude", "loop", "begin", "step", "head")}
    assert served(program) == shared | {"rest": [(8,)]}
    assert told == [*(f"tracing {name} (1 or 8 rows)" for name in shared), "tracing rest (8 rows)"]
    assert model.asked == [*CHUNKS]
    for name in shared:
        method = program.method(name, 1)
        assert method is program.method(name, 8)
        for chunk in CHUNKS:
            sides = (method.takes, method.gives), signature(program.specs[chunk], name)
            for ours, theirs in zip(*sides):
                assert tuple(at_rows(t, chunk) for t in ours) == theirs
        assert any(ROWS in t.shape for t in method.gives)
    assert not any(ROWS in t.shape for t in (*program.method("rest", 8).takes, *program.method("rest", 8).gives))


@pytest.mark.parametrize(("chunks", "any_rows"), [(CHUNKS, False), ((8,), True)])
def test_otherwise_there_is_a_program_for_each_size(chunks: tuple[int, ...], any_rows: bool) -> None:
    """Without any_rows, as engines with static shapes need it, and where calls have one size anyway."""
    program = trace(Rows(), chunks, any_rows=any_rows)
    names = [(name, chunk) for chunk in chunks for name in ("prelude", "loop", "begin", "step", "head")] + [("rest", 8)]
    assert [(m.name, *m.chunks) for m in program.methods] == names
    for method in program.methods:
        assert (method.takes, method.gives) == signature(program.specs[method.chunks[0]], method.name)
        assert_static(program, method.name, method.chunks[0])


def assert_static(program: LoopProgram, name: str, chunk: int) -> None:
    """Every tensor in the traced graph has a shape of plain numbers, and inputs and outputs those of the spec."""
    method = program.method(name, chunk)
    nodes = {node.name: node for node in method.program.graph.nodes}
    for node in nodes.values():
        for value in [v for v in (node.meta.get("val"),) if isinstance(v, Tensor)]:
            assert all(type(d) is int for d in value.shape), (name, node.name)
    signed = method.program.graph_signature
    for names, specs in ((signed.user_inputs, method.takes), (signed.user_outputs, method.gives)):
        assert [tuple(nodes[n].meta["val"].shape) for n in names] == [t.shape for t in specs], name


def test_a_language_model_is_static_where_a_target_asks_for_nothing_else(tiny: RMSE) -> None:
    program = trace(tiny, (1, 64))
    for chunk in (1, 64):
        for name in ("prelude", "loop", "begin", "step", "head", "commit"):
            assert program.method(name, chunk).chunks == (chunk,)
            assert_static(program, name, chunk)


@pytest.mark.parametrize("kind", [Rows, Doubled])
def test_calls_of_every_size_agree_with_pytorch(kind: type[Rows], tmp_path: Path) -> None:
    """Also where a method needs a graph for each size: it is then named after it."""
    program = trace(kind(), CHUNKS, any_rows=True)
    made = get_target("onnx").lower(program, tmp_path, LowerOptions())
    files = {name: f"{name.split('_')[0]}.onnx" for name in made["graphs"]}
    if kind is Doubled:
        files |= {"head_1": "head_1.onnx", "head_8": "head_8.onnx"}
    assert made["graphs"] == files
    assert {p.name for p in tmp_path.iterdir()} == {*files.values(), "weights.bin"}
    methods = OnnxMethods(tmp_path, made["graphs"], threads=1)
    worst = compare_methods(program, methods, DIALS, 1e-5)
    assert {label for label in worst if not label.startswith("step")} == set(files) - {"step_1", "step_8"}
    for rows in CHUNKS:
        x = np.random.default_rng(rows).standard_normal((1, rows, WIDTH)).astype(np.float32)
        dials = {"max_loops": np.array(LOOPS), "min_loops": np.array(1), "exit_threshold": np.float32(0.5)}
        found = methods.run("loop", rows, {"x": x} | {k: np.asarray(v) for k, v in dials.items()})
        assert found["seen"].shape == (LOOPS, 1, WIDTH, rows)
    loop = onnx_passes.find_loop(onnx.load(tmp_path / "loop.onnx", load_external_data=False))
    assert loop is not None and len(loop.output) == len(loop.input) - 2 + 1  # what is emitted is scanned


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (OneMore, "head (1 or 8 rows): sum is (1, rows + 1) torch.float32, its spec says (1, rows) torch.float32"),
        (OneSize, "head (1 or 8 rows): sum is (1, 8) torch.float32, its spec says (1, rows) torch.float32"),
    ],
)
def test_a_method_that_gives_other_rows_is_named(kind: type[Rows], said: str) -> None:
    with pytest.raises(ExportError) as caught:
        trace(kind(), CHUNKS, any_rows=True)
    assert_one_line(str(caught.value), said)


def test_what_counts_as_differing_in_rows_only() -> None:
    """A dimension that is the number of rows in every spec is one; any other difference is none to share over."""
    specs = {chunk: Rows().spec(chunk) for chunk in CHUNKS}
    takes, gives = shared_signature(specs, "loop") or ((), ())
    assert [t.shape for t in takes] == [(1, ROWS, WIDTH), (), (), ()]
    assert [t.shape for t in gives] == [(1, ROWS, WIDTH), (1, ROWS), (), (LOOPS, 1, WIDTH, ROWS)]
    assert shared_signature(specs, "rest") is None
    assert shared_signature({8: specs[8]}, "loop") is None
    assert shared_signature({chunk: Doubled().spec(chunk) for chunk in CHUNKS}, "head") is None
